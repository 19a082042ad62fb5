//! The labs on hardware virtualization (the rig's, which is AMD-V): the exits that hardware makes, told as such.

use std::process::Command;

use crate::guest::available;

/// What a lab must say: with AMD-V's terms first, which is not asked for on VT-x, and in any case.
const SAYS: [(&str, &[&str], &[&str]); 15] = [
    (
        "pio",
        &["AMD-V 0x7b IOIO = VT-x 30 I/O instruction (out 1B 0x3f8) | serial THR <- 'H'"],
        &["gave \"Hi\""],
    ),
    (
        "rep-outs",
        &["AMD-V 0x7b IOIO = VT-x 30 I/O instruction (in 1B 0x3fd, string of 6)"],
        &["sent 6 bytes in 6 round trips", "got 6 bytes in one round trip"],
    ),
    (
        "mmio",
        &[
            "AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (read 4B at 0xfe000000)",
            "AMD-V 0x400 NPF = VT-x 48 EPT violation (guest address 0x200000) | in KVM",
        ],
        &["virtio-rng MagicValue -> 0x74726976", "where there is memory, made no exit to the monitor"],
    ),
    (
        "halt",
        &["AMD-V 0x78 HLT = VT-x 12 HLT | in KVM", "HLT: one exit (AMD-V 0x78 HLT = VT-x 12 HLT)"],
        &["vmm ended it after 300 ms"],
    ),
    (
        "cpuid",
        &["CPUID: 3 exits (AMD-V 0x72 CPUID = VT-x 10 CPUID)"],
        &["its name begins with \"KVMK\"", "processor 0"],
    ),
    (
        "msr",
        &["RDMSR and WRMSR: 4 exits (AMD-V 0x7c MSR = VT-x 31 RDMSR, 32 WRMSR)"],
        &["whose handler noted its vector, 0xd"],
    ),
    (
        "hypercall",
        &["The hypercalls: 2 exits (AMD-V 0x81 VMMCALL = VT-x 18 VMCALL)"],
        &["Both calls came back: with 0, and for nobody's number with -1000."],
    ),
    ("longmode", &["EFER: one exit (AMD-V 0x7c MSR = VT-x 32 WRMSR)"], &["code of 16, 32, 64 bits"]),
    (
        "interrupt",
        &[
            "AMD-V 0x78 HLT = VT-x 12 HLT | in KVM",
            "AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (guest address 0xfee000b0) | in KVM",
        ],
        &["presses the power button", "nobody <- 0x30"],
    ),
    (
        "apic-timer",
        &[
            "AMD-V 0x78 HLT = VT-x 12 HLT | in KVM",
            "AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (guest address 0xfee00380) | in KVM",
        ],
        &["20 ms were set"],
    ),
    (
        "triple-fault",
        &["AMD-V 0x7f SHUTDOWN = VT-x 2 triple fault | the run ends"],
        &["The shutdown reached the monitor as one exit."],
    ),
    (
        "sipi",
        &["AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (guest address 0xfee00300) | in KVM"],
        &["vCPU 1 woke in code of 16 bits, and vCPU 0 saw its sign."],
    ),
    (
        "doorbell",
        &["AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (guest address 0xfe000050) | in KVM"],
        &[
            "was rung 66 times and made 64 exits to the monitor. Its worker completed 2 requests.",
            "The console's was rung twice and made 2 exits to the monitor, for 2 requests.",
        ],
    ),
    (
        "msix",
        &["AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration (guest address 0xfee000b0) | in KVM"],
        &[
            "pci-ports CONFIG_ADDRESS <- 0x80000800: 00:01.0 vendor ID",
            "00:01.0 BAR0 <- 0xffffffff: asks for its size",
            "virtio-rng MSI-X 1 data <- 0x31: vector 0x31",
            "The function's memory is 32 KiB large. The device's worker raised message 1, and it came as vector 0x31.",
        ],
    ),
    (
        "dirty-log",
        &["AMD-V 0x400 NPF = VT-x 48 EPT violation (guest address 0x205000) | in KVM"],
        &["fetches the dirty log: 1 page, 0x205000", "fetches the dirty log: no page"],
    ),
];

#[test]
fn labs_tell_what_hardware_did() {
    if !available("labs") {
        return;
    }
    let amd = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("AuthenticAMD");
    for (lab, hardware, any) in SAYS {
        let output = Command::new(env!("CARGO_BIN_EXE_vmm")).args(["lab", lab]).output().unwrap();
        assert!(output.status.success(), "{lab}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        // The exits inside KVM need tracefs, so root; the rig has that.
        let traced = words.contains("are from the kernel's trace");
        assert!(
            traced || std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(),
            "{lab}: no tracefs\n{text}"
        );
        for wanted in hardware.iter().filter(|_| amd && traced).chain(any) {
            assert!(words.contains(wanted), "{lab} does not say {wanted:?}:\n{text}");
        }
    }
}
