//! The vmm binary with guests of a few instructions on this host's /dev/kvm: how a Multiboot kernel is entered, the test
//! device, and CPUID as a guest sees it. The guests write to COM1 and end by the debug-exit port.

use std::process::Command;

use iced_x86::code_asm::{CodeAssembler, CodeLabel, al, byte_ptr, dword_ptr, dx, eax, ebx, ecx, edx, esi};

/// Where the guests lie.
const BASE: u64 = 0x10_0000;
const CODE: usize = 0x40;

/// A flat Multiboot image around `code`.
fn image(code: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(32).unwrap();
    code(&mut assembler);
    let code = assembler.assemble(BASE + CODE as u64).unwrap();
    let (magic, flags, base) = (0x1bad_b002u32, 1u32 << 16, BASE as u32);
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, sum, base, base, 0, base + 0x4000, base + CODE as u32];
    let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.resize(CODE, 0);
    image.extend(code);
    image
}

/// Runs `image`; gives its output and the number that it wrote to the debug-exit port.
fn run(image: &[u8], arguments: &[&str]) -> (Vec<u8>, i32) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("micro");
    std::fs::write(&kernel, image).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.env("XDG_RUNTIME_DIR", folder.path()).arg("run").arg("--kernel").arg(&kernel);
    let out =
        command.args(["--serial", "stdio", "--debug-exit", "--mem", "4M"]).args(arguments).output().unwrap();
    let code = out.status.code().unwrap_or(-1);
    assert_eq!(code & 1, 1, "{}", String::from_utf8_lossy(&out.stderr));
    (out.stdout, code >> 1)
}

fn exit(a: &mut CodeAssembler, value: u32) {
    a.mov(eax, value).unwrap();
    a.out(0xf4, al).unwrap();
}

/// Goes to `failed` unless the last comparison was equal.
fn or(a: &mut CodeAssembler, failed: CodeLabel) {
    a.jne(failed).unwrap();
}

#[test]
fn a_multiboot_kernel_finds_its_magic_number_command_line_and_module() {
    let image = image(|a| {
        let (mut failed, mut next, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.cmp(eax, 0x2bad_b002u32 as i32).unwrap();
        or(a, failed);
        a.mov(esi, dword_ptr(ebx + 16)).unwrap();
        a.mov(dx, 0x3f8u32).unwrap();
        a.set_label(&mut next).unwrap();
        a.lodsb().unwrap();
        a.test(al, al).unwrap();
        a.je(done).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut done).unwrap();
        a.mov(ecx, dword_ptr(ebx + 24)).unwrap();
        a.mov(ecx, dword_ptr(ecx)).unwrap();
        a.mov(al, byte_ptr(ecx)).unwrap();
        a.out(0xf4, al).unwrap();
        a.set_label(&mut failed).unwrap();
        exit(a, 0x7f);
    });
    let initrd = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initrd.path(), b"\x2a...").unwrap();
    let initrd = initrd.path().to_str().unwrap();
    for boot in ["auto", "multiboot"] {
        let (said, code) = run(&image, &["--cmdline", "one two", "--initrd", initrd, "--boot", boot]);
        assert_eq!((String::from_utf8_lossy(&said).as_ref(), code), ("micro one two", 0x2a), "{boot}");
    }
}

/// Memory testers do so: they leave the local APIC as firmware has left it.
#[test]
fn the_last_cpu_starts_though_nobody_wrote_to_an_apic_before() {
    let image = image(|a| {
        // At 0x8000: mov al, 0x15; out 0xf4, al; hlt.
        a.mov(dword_ptr(0x8000), 0xf4e6_15b0u32 as i32).unwrap();
        a.mov(dword_ptr(0x8004), 0xf4).unwrap();
        // INIT and a start-up IPI for page 8, to APIC 1.
        a.mov(dword_ptr(0xfee0_0310u64), 1 << 24).unwrap();
        a.mov(dword_ptr(0xfee0_0300u64), 0x4500).unwrap();
        a.mov(dword_ptr(0xfee0_0300u64), 0x4608).unwrap();
        a.mov(ecx, 1_000_000u32).unwrap();
        let mut wait = a.create_label();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.dec(ecx).unwrap();
        a.jne(wait).unwrap();
        exit(a, 2);
    });
    assert_eq!(run(&image, &["--cpus", "2"]), (vec![], 0x15));
}

#[test]
fn the_test_device_keeps_a_register_memory_and_pages() {
    let image = image(|a| {
        let mut failed = a.create_label();
        a.mov(eax, 0x1234_5678u32).unwrap();
        a.out(0xe0, eax).unwrap();
        a.xor(eax, eax).unwrap();
        a.in_(al, 0xe9).unwrap();
        a.cmp(al, 0x56).unwrap();
        or(a, failed);
        // Memory that is not RAM.
        a.mov(dword_ptr(0xff00_0ff0u64), 0x55aa_1234u32 as i32).unwrap();
        a.cmp(dword_ptr(0xff00_0ff0u64), 0x55aa_1234u32 as i32).unwrap();
        or(a, failed);
        // A page that goes and comes back, with what it held; then it takes a write.
        a.mov(dword_ptr(0x10_2000), 0x0bad_cafeu32 as i32).unwrap();
        a.mov(eax, 0x10_2000u32).unwrap();
        a.out(0xe4, eax).unwrap();
        a.cmp(dword_ptr(0x10_2000), 0x0bad_cafeu32 as i32).unwrap();
        or(a, failed);
        a.out(0xe4, eax).unwrap();
        a.inc(dword_ptr(0x10_2000)).unwrap();
        a.cmp(dword_ptr(0x10_2000), 0x0bad_caffu32 as i32).unwrap();
        or(a, failed);
        // Line 5 of the PIC, whose request register then shows it; and no longer when it is low.
        a.mov(dx, 0x2005u32).unwrap();
        a.mov(al, 1).unwrap();
        a.out(dx, al).unwrap();
        a.in_(al, 0x20).unwrap();
        a.test(al, 1 << 5).unwrap();
        a.je(failed).unwrap();
        exit(a, 1);
        a.set_label(&mut failed).unwrap();
        exit(a, 2);
    });
    assert_eq!(run(&image, &["--test-device"]), (vec![], 1));
    assert_eq!(run(&image, &[]), (vec![], 2), "without it nothing answers");
}

#[test]
fn cpuid_shows_the_model_that_was_asked_for() {
    // A KVM in software lets the guest have the processor's own CPUID. `make test` runs this test in the rig too.
    if !vmm::kvm::host_has_hardware_virtualization() {
        assert!(std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(), "no hardware virtualization here");
        eprintln!(
            "SKIP: cpuid_shows_the_model_that_was_asked_for: this machine lacks hardware virtualization"
        );
        return;
    }
    // Writes ECX and EDX of leaf 1, and ECX of 0x80000001, to the serial port.
    let image = image(|a| {
        for (leaf, twice) in [(1u32, true), (0x8000_0001, false)] {
            a.mov(eax, leaf).unwrap();
            a.xor(ecx, ecx).unwrap();
            a.cpuid().unwrap();
            a.mov(ebx, edx).unwrap();
            a.mov(dx, 0x3f8u32).unwrap();
            for register in if twice { vec![ecx, ebx] } else { vec![ecx] } {
                a.mov(eax, register).unwrap();
                for _ in 0..4 {
                    a.out(dx, al).unwrap();
                    a.shr(eax, 8).unwrap();
                }
            }
        }
        exit(a, 0);
    });
    let cpuid = |cpu: &str| -> [u32; 3] {
        let (said, _) = run(&image, &["--cpu", cpu]);
        assert_eq!(said.len(), 12, "{cpu}");
        [0, 4, 8].map(|at| u32::from_le_bytes(said[at..at + 4].try_into().unwrap()))
    };
    const SSE2: u32 = 1 << 26;
    const X2APIC: u32 = 1 << 21;
    const VIRTUALIZATION: u32 = 1 << 5 | 1 << 2;
    let [host, ..] = cpuid("host");
    let [baseline, features, extended] = cpuid("x86-64-v1");
    assert_ne!(features & SSE2, 0);
    // x2APIC, the deadline timer where there is one, the hypervisor bit; no SSE3 and later.
    assert_eq!(baseline & !(1 << 24), X2APIC | 1 << 31);
    assert_eq!(extended & VIRTUALIZATION, 0);
    let without = cpuid("host,-x2apic");
    assert_eq!(without[0], host & !X2APIC);
}

#[test]
fn cpu_wishes_that_cannot_be_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("micro");
    std::fs::write(&kernel, image(|a| exit(a, 0))).unwrap();
    let said = |cpu: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.env("XDG_RUNTIME_DIR", folder.path()).arg("run").arg("--kernel").arg(&kernel);
        let out = command.args(["--console", "off", "--debug-exit", "--cpu", cpu]).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, text) = said("host,+avx3");
    assert!(code == Some(2) && text.contains("avx2"), "{text}");
    // No processor has both makers' virtualization, nor this feature of one that was never sold.
    let (code, text) = said("host,+avx512pf,+fma4");
    assert!(code == Some(4) && text.contains("lacks"), "{text}");
}
