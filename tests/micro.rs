//! The vmm binary with guests of a few instructions on this host's /dev/kvm: how a Multiboot kernel is entered, the test
//! device, CPUID and model-specific registers as a guest sees them. The guests write to COM1 and end by the debug-exit port.

use std::path::Path;
use std::process::Command;

use iced_x86::code_asm::{
    CodeAssembler, CodeLabel, al, byte_ptr, dword_ptr, dx, eax, ebx, ecx, edi, edx, esi, esp, fword_ptr,
    word_ptr,
};

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

/// Loads an IDT that leads `vector` to the address that a call has left on the stack, and nothing else anywhere.
fn catch(a: &mut CodeAssembler, vector: u64) {
    const IDT: u64 = BASE + 0x1000;
    const IDTR: u64 = BASE + 0x1800;
    let gate = IDT + vector * 8;
    a.pop(eax).unwrap();
    a.mov(ebx, eax).unwrap();
    a.and(eax, 0xffff).unwrap();
    a.or(eax, 0x8_0000).unwrap();
    a.mov(dword_ptr(gate), eax).unwrap();
    a.and(ebx, 0xffff_0000u32 as i32).unwrap();
    a.or(ebx, 0x8e00).unwrap();
    a.mov(dword_ptr(gate + 4), ebx).unwrap();
    a.mov(dword_ptr(IDTR), ((IDT as u32) << 16 | 0x7ff) as i32).unwrap();
    a.mov(dword_ptr(IDTR + 4), (IDT >> 16) as i32).unwrap();
    a.lidt(fword_ptr(IDTR)).unwrap();
}

/// The local APIC's timer interrupts by `vector` from now on, nothing else does, and EBX and EDI are 0.
fn start_timer(a: &mut CodeAssembler, vector: u64) {
    // A PC's 8259s would interrupt, too.
    a.mov(al, 0xff).unwrap();
    a.out(0x21, al).unwrap();
    a.out(0xa1, al).unwrap();
    let timer = [(0xf0u64, 0x1ff), (0x3e0, 0xb), (0x320, 1 << 17 | vector as i32), (0x380, 300_000)];
    for (register, value) in timer {
        a.mov(dword_ptr(0xfee0_0000 + register), value).unwrap();
    }
    a.xor(ebx, ebx).unwrap();
    a.xor(edi, edi).unwrap();
}

/// A guest that takes a thousand interrupts of its local APIC's timer while it goes round `sti; nop; nop`, and says how many came
/// before the instruction after STI, which the architecture does not allow (SDM volume 2, STI).
fn shadow_prober() -> Vec<u8> {
    const VECTOR: u64 = 0x40;
    image(|a| {
        let [mut again, mut legal, mut set_up, mut learn] = std::array::from_fn(|_| a.create_label());
        a.mov(esp, BASE as u32 + 0x3f00).unwrap();
        // The handler's address is the call's return address.
        a.call(set_up).unwrap();
        // No IRET, which a KVM in software lacks: EIP, CS, EFLAGS.
        a.pop(eax).unwrap();
        a.add(esp, 8).unwrap();
        a.cmp(eax, esi).unwrap();
        a.jne(legal).unwrap();
        a.inc(edi).unwrap();
        a.set_label(&mut legal).unwrap();
        a.mov(dword_ptr(0xfee0_00b0u64), 0).unwrap();
        a.inc(ebx).unwrap();
        a.cmp(ebx, 1000).unwrap();
        a.jb(again).unwrap();
        a.mov(dx, 0x3f8u32).unwrap();
        a.mov(eax, edi).unwrap();
        for _ in 0..2 {
            a.out(dx, al).unwrap();
            a.shr(eax, 8).unwrap();
        }
        exit(a, 1);
        a.set_label(&mut set_up).unwrap();
        catch(a, VECTOR);
        start_timer(a, VECTOR);
        // Two bytes after its return address is what follows STI.
        a.call(learn).unwrap();
        a.set_label(&mut again).unwrap();
        a.cli().unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut learn).unwrap();
        a.pop(esi).unwrap();
        a.add(esi, 2).unwrap();
        a.jmp(again).unwrap();
    })
}

/// A guest's `sti; hlt` sleeps through what should have woken it if an interrupt is taken in between. QEMU's emulation of AMD-V
/// does that: its VMRUN forgets the interrupt shadow that the VMCB has, whoever is the monitor. So Linux guests keep their tick there
/// (tests/boot/guest.rs); when this test fails in the rig, that can go.
#[test]
fn an_interrupt_waits_for_the_instruction_after_sti() {
    let image = shadow_prober();
    let taken = |said: &[u8]| u16::from_le_bytes(said.try_into().unwrap());
    let ours = taken(&run(&image, &[]).0);
    if !std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG") {
        assert_eq!(ours, 0, "of 1000 interrupts");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("micro");
    std::fs::write(&kernel, &image).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "kvm", "-cpu", "host", "-m", "32", "-nodefaults", "-no-reboot", "-display", "none"]);
    qemu.args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel"]).arg(&kernel);
    let out = qemu.output().unwrap();
    assert_eq!(out.status.code(), Some(3), "{}", String::from_utf8_lossy(&out.stderr));
    let theirs = taken(&out.stdout[out.stdout.len() - 2..]);
    println!("of 1000 interrupts in the shadow of STI: with vmm {ours}, with QEMU as the monitor {theirs}");
    assert!(
        ours > 0 && theirs > 0,
        "QEMU's VMRUN is mended: with vmm {ours}, with QEMU as the monitor {theirs}"
    );
}

/// A guest that takes 150 interrupts of its local APIC's timer, stays in the handler for a while, and says how many came to it while
/// it had interrupts disabled, which the architecture does not allow (SDM volume 3, 6.8.1).
fn double_prober() -> Vec<u8> {
    const VECTOR: u64 = 0x40;
    image(|a| {
        let [mut again, mut first, mut set_up, mut work, mut rest] =
            std::array::from_fn(|_| a.create_label());
        a.mov(esp, BASE as u32 + 0x3f00).unwrap();
        a.call(set_up).unwrap();
        a.test(dword_ptr(esp + 8), 0x200).unwrap();
        a.jne(first).unwrap();
        // Back to where it came from, which was below: no IRET, no flags that matter.
        a.inc(edi).unwrap();
        a.pop(eax).unwrap();
        a.add(esp, 8).unwrap();
        a.jmp(eax).unwrap();
        a.set_label(&mut first).unwrap();
        a.mov(ecx, 60_000).unwrap();
        a.set_label(&mut work).unwrap();
        a.nop().unwrap();
        a.loop_(work).unwrap();
        a.add(esp, 12).unwrap();
        a.mov(dword_ptr(0xfee0_00b0u64), 0).unwrap();
        a.inc(ebx).unwrap();
        a.cmp(ebx, 150).unwrap();
        a.jb(again).unwrap();
        a.mov(dx, 0x3f8u32).unwrap();
        a.mov(eax, edi).unwrap();
        for _ in 0..2 {
            a.out(dx, al).unwrap();
            a.shr(eax, 8).unwrap();
        }
        exit(a, 1);
        a.set_label(&mut set_up).unwrap();
        catch(a, VECTOR);
        start_timer(a, VECTOR);
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.set_label(&mut rest).unwrap();
        a.pause().unwrap();
        a.jmp(rest).unwrap();
    })
}

/// A guest that is interrupted in a handler may wait for itself. QEMU's emulation of AMD-V does that now and then, with `--icount` often
/// (tests/rig/README.md).
#[test]
fn an_interrupt_comes_once() {
    let (said, _) = run(&double_prober(), &[]);
    let twice = u16::from_le_bytes(said.as_slice().try_into().unwrap());
    println!("of 150 interrupts twice, the second time with interrupts disabled: {twice}");
    if !std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG") {
        assert_eq!(twice, 0);
    }
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
    if !vmm_monitor::kvm::host_has_hardware_virtualization() {
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

/// A guest that reads each of `msrs` and writes back what it read: two characters each on the serial port, `+` where it could
/// and `-` where it got #GP.
fn msr_prober(msrs: &[u32]) -> Vec<u8> {
    image(|a| {
        let (mut set_up, mut tell) = (a.create_label(), a.create_label());
        a.mov(esp, BASE as u32 + 0x3f00).unwrap();
        // The handler's address is the call's return address. Both instructions that may fault are two bytes long.
        a.call(set_up).unwrap();
        a.mov(esi, u32::from(b'-')).unwrap();
        // No IRET, which a KVM in software lacks: error code, EIP, CS, EFLAGS.
        a.pop(edi).unwrap();
        a.pop(edi).unwrap();
        a.add(esp, 8).unwrap();
        a.add(edi, 2).unwrap();
        a.jmp(edi).unwrap();
        a.set_label(&mut set_up).unwrap();
        catch(a, 13);
        for msr in msrs {
            a.mov(ecx, *msr).unwrap();
            a.mov(esi, u32::from(b'+')).unwrap();
            a.rdmsr().unwrap();
            a.call(tell).unwrap();
            a.mov(esi, u32::from(b'+')).unwrap();
            a.wrmsr().unwrap();
            a.call(tell).unwrap();
        }
        exit(a, 0);
        a.set_label(&mut tell).unwrap();
        a.push(eax).unwrap();
        a.push(edx).unwrap();
        a.mov(dx, 0x3f8u32).unwrap();
        a.mov(eax, esi).unwrap();
        a.out(dx, al).unwrap();
        a.pop(edx).unwrap();
        a.pop(eax).unwrap();
        a.ret().unwrap();
    })
}

#[test]
fn a_denied_msr_is_a_protection_fault_that_the_log_and_the_trace_name() {
    let image = msr_prober(&[0x174, 0x175, 0x176]);
    assert_eq!(String::from_utf8_lossy(&run(&image, &[]).0), "++++++");
    let denied = ["--cpu", "host,msr-deny=0x174,msr-deny=IA32_SYSENTER_EIP"];
    assert_eq!(String::from_utf8_lossy(&run(&image, &denied).0), "--++--");

    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("micro");
    std::fs::write(&kernel, &image).unwrap();
    let trace = folder.path().join("trace");
    let vmm = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.env("XDG_RUNTIME_DIR", folder.path());
        command
    };
    let mut recorded = vmm();
    recorded.arg("--trace").arg(&trace).arg("--kernel").arg(&kernel).args([
        "--console",
        "off",
        "--debug-exit",
    ]);
    let out = recorded.args(denied).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("reads MSR IA32_SYSENTER_CS (0x174), which its CPU model denies"), "{said}");
    let out = vmm().args(["trace", "report", "--only", "other"]).arg(&trace).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    for (instruction, register) in
        [("rdmsr", "IA32_SYSENTER_CS (0x174)"), ("wrmsr", "IA32_SYSENTER_EIP (0x176) <- ")]
    {
        let line = told.lines().find(|line| line.contains(register) && line.contains(instruction));
        assert!(line.is_some_and(|line| line.contains("denied by the CPU model: #GP")), "{told}");
    }
}

#[test]
fn a_baseline_hides_the_registers_of_what_it_does_not_have() {
    // Of AMD-V; AMD's first performance counters, which every AMD processor has and no bit of CPUID tells of.
    let image = msr_prober(&[0xc001_0114, 0xc001_0117, 0xc001_0000, 0xc001_0007]);
    let probe = |cpu: &str| String::from_utf8_lossy(&run(&image, &["--cpu", cpu]).0).into_owned();
    if !vmm_monitor::kvm::host_has_hardware_virtualization() {
        assert!(std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(), "no hardware virtualization here");
        eprintln!("SKIP: a_baseline_hides_the_registers: a KVM in software has no baseline");
        return;
    }
    assert_eq!(probe("host"), "++++++++", "KVM hides them itself by now");
    assert_eq!(probe("x86-64-v1"), "----++++");
    assert_eq!(probe("x86-64-v1,nested=on"), "++++++++");
}

#[test]
fn a_guest_finds_hyper_v_only_where_it_was_asked_for() {
    if !vmm_monitor::kvm::host_has_hardware_virtualization() {
        assert!(std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(), "no hardware virtualization here");
        eprintln!("SKIP: a_guest_finds_hyper_v_only_where_it_was_asked_for: a KVM in software has none");
        return;
    }
    // Writes EAX and EBX of the hypervisor's leaves to the serial port: the highest leaf or the interface, and the maker's name.
    let leaves = image(|a| {
        for leaf in [0x4000_0000u32, 0x4000_0001, 0x4000_0100] {
            a.mov(eax, leaf).unwrap();
            a.cpuid().unwrap();
            a.mov(dx, 0x3f8u32).unwrap();
            for register in [eax, ebx] {
                a.mov(eax, register).unwrap();
                for _ in 0..4 {
                    a.out(dx, al).unwrap();
                    a.shr(eax, 8).unwrap();
                }
            }
        }
        exit(a, 0);
    });
    let (with, without) = (["--cpu", "host,+hyperv"], ["--cpu", "host"]);
    let words = |cpu| run(&leaves, cpu).0.chunks(4).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (words, plain) = (words(&with), words(&without));
    assert_eq!((&words[0][..], &words[1][..]), (&[6, 0, 0, 0x40][..], &b"Micr"[..]));
    assert_eq!((&words[2][..], &words[5][..]), (&b"Hv#1"[..], &b"KVMK"[..]));
    assert_eq!(plain[1], b"KVMK");
    // The reference clock, which is read-only; the interrupt controller's control register; the debugger's, which is left out.
    let registers = msr_prober(&[0x4000_0020, 0x4000_0080, 0x4000_00f1]);
    assert_eq!(String::from_utf8_lossy(&run(&registers, &with).0), "+-++--");
    assert_eq!(String::from_utf8_lossy(&run(&registers, &without).0), "------");
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
    if vmm_monitor::kvm::host_has_hardware_virtualization() {
        assert_eq!(said("host,+hyperv"), (Some(1), String::new()));
    } else {
        let (code, text) = said("host,+hyperv");
        assert!(code == Some(4) && text.contains("lacks hyperv"), "{text}");
    }
    // No processor has both makers' virtualization, nor this feature of one that was never sold.
    let (code, text) = said("host,+avx512pf,+fma4");
    assert!(code == Some(4) && text.contains("lacks"), "{text}");
}

/// How the run of a PVH kernel made of `code` ends: its exit code, and what the monitor says with `-v`.
fn ending(code: impl FnOnce(&mut CodeAssembler), arguments: &[&str]) -> (Option<i32>, String) {
    let mut assembler = CodeAssembler::new(32).unwrap();
    code(&mut assembler);
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("micro");
    std::fs::write(&kernel, vmm_bench::elf::pvh_kernel(&assembler.assemble(PVH_BASE).unwrap())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .env("XDG_RUNTIME_DIR", folder.path())
        .env_remove("RUST_LOG")
        .args(["run", "-v", "--kernel"])
        .arg(&kernel);
    let out = command.args(["--serial", "stdio", "--mem", "64M"]).args(arguments).output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// Where PVH kernels lie.
const PVH_BASE: u64 = 0x20_0000;

/// Of Debian's qemu-system-data and seabios.
const QBOOT: &str = "/usr/share/qemu/qboot.rom";
const SEABIOS: &str = "/usr/share/seabios/bios-microvm.bin";

fn write_port(a: &mut CodeAssembler, port: u32, value: u32) {
    a.mov(dx, port).unwrap();
    a.mov(al, value).unwrap();
    a.out(dx, al).unwrap();
}

/// Without an IDT any exception is a triple fault.
fn triple_fault(a: &mut CodeAssembler) {
    a.mov(dword_ptr(0x9_0000), 0).unwrap();
    a.mov(dword_ptr(0x9_0004), 0).unwrap();
    a.lidt(fword_ptr(0x9_0000)).unwrap();
    a.ud2().unwrap();
}

/// Back to real mode, and to where a PC's firmware starts: as Linux does it for `reboot=bios`.
fn jump_to_the_reset_vector(a: &mut CodeAssembler) {
    // At 0x8000: mov eax, cr0; and eax, ~1; mov cr0, eax; jmp 0xf000:0xfff0.
    for (at, word) in
        [(0x8000, 0x66c0_200fu32), (0x8004, 0x0ffe_e083), (0x8008, 0xf0ea_c022), (0x800c, 0x00f0_00ff)]
    {
        a.mov(dword_ptr(at), word as i32).unwrap();
    }
    // A GDT with 16-bit code at 8, and where it is.
    for (at, word) in [
        (0x9000u32, 0u32),
        (0x9004, 0),
        (0x9008, 0xffff),
        (0x900c, 0x9b00),
        (0x9010, 0x9000_000f),
        (0x9014, 0),
    ] {
        a.mov(dword_ptr(at), word as i32).unwrap();
    }
    a.lgdt(fword_ptr(0x9010)).unwrap();
    // jmp 8:0x8000
    a.db(&[0xea, 0x00, 0x80, 0x00, 0x00, 0x08, 0x00]).unwrap();
}

#[test]
fn every_way_to_reset_a_pc_resets_this_one() {
    const FLAG: u64 = 0x472;
    type Code = fn(&mut CodeAssembler);
    let ways: [(&str, Code, i32, &str); 8] = [
        ("ACPI", |a| write_port(a, 0x602, 1), 0, "Reset by acpi-pm"),
        ("keyboard", |a| write_port(a, 0x64, 0xfe), 0, "Reset by i8042"),
        (
            "chipset",
            |a| {
                write_port(a, 0xcf9, 0x02);
                write_port(a, 0xcf9, 0x0e);
            },
            0,
            "Reset by reset-control",
        ),
        ("reset vector", jump_to_the_reset_vector, 0, "Reset by i8042"),
        (
            "triple fault, cold",
            |a| {
                a.mov(word_ptr(FLAG), 0).unwrap();
                triple_fault(a);
            },
            0,
            "Reset by a triple fault",
        ),
        (
            "triple fault, warm",
            |a| {
                a.mov(word_ptr(FLAG), 0x1234).unwrap();
                triple_fault(a);
            },
            0,
            "Reset by a triple fault",
        ),
        // With the IDT that firmware or nobody has left: a crash.
        ("crash", |a| a.ud2().unwrap(), 6, "triple fault: an exception"),
        (
            "crash in cleared memory",
            |a| {
                a.mov(dword_ptr(FLAG), 0).unwrap();
                a.ud2().unwrap();
            },
            6,
            "triple fault: an exception",
        ),
    ];
    for firmware in [&[][..], &["--firmware"]] {
        for (way, code, expected, words) in ways {
            let (code, said) = ending(code, firmware);
            assert!(code == Some(expected) && said.contains(words), "{way} {firmware:?}: {code:?} {said}");
        }
    }
    // Whoever starts the machine again starts it, also by firmware that would start its kernel again itself.
    let marks = |a: &mut CodeAssembler| {
        write_port(a, 0x80, 0x77);
        jump_to_the_reset_vector(a);
    };
    let seabios = &["--firmware", SEABIOS, "--option-rom", "/usr/share/qemu/pvh.bin"];
    for firmware in [&[][..], &["--firmware"], &["--firmware", QBOOT], seabios] {
        if let Some(missing) = firmware.iter().find(|word| word.starts_with('/') && !Path::new(word).exists())
        {
            eprintln!("SKIP: every_way_to_reset_a_pc_resets_this_one, its last part: no {missing}");
            continue;
        }
        let firmware = &[&["--boot-marks"], firmware].concat();
        let (code, said) = ending(marks, firmware);
        assert!(
            code == Some(0) && said.matches("boot mark 0x77").count() == 1,
            "{firmware:?}: {code:?} {said}"
        );
    }
}

#[test]
fn a_panic_is_told_as_one() {
    fn say(a: &mut CodeAssembler, text: &str) {
        text.bytes().for_each(|byte| write_port(a, 0x3f8, byte.into()));
    }
    const PANIC: &str = "\n[ 1.0] Kernel panic - not syncing: \x1b[2Jno more\n[ 1.1] CPU: 0\n";
    let by_driver = |a: &mut CodeAssembler| {
        say(a, PANIC);
        write_port(a, 0x505, 1);
    };
    let (code, said) = ending(by_driver, &[]);
    assert_eq!(code, Some(14), "{said}");
    let told = "vmm: error: the guest's kernel panicked; its console says\n  [ 1.0] Kernel panic - not syncing: [2Jno more\n  [ 1.1] CPU: 0\n";
    assert!(said.contains(told), "{said}");
    let (code, said) = ending(|a| write_port(a, 0x505, 1), &[]);
    assert!(code == Some(14) && said.contains("wrote nothing to its console"), "{said}");
    // Without a driver: by what it writes before it reboots, unless it goes on to shut down in order.
    for (last, expected) in [("", 14), ("[ 9.9] reboot: Restarting system\n", 0)] {
        let (code, said) = ending(
            |a| {
                say(a, PANIC);
                say(a, last);
                write_port(a, 0x602, 1);
            },
            &[],
        );
        assert_eq!(code, Some(expected), "{last:?}: {said}");
    }
    // A crash kernel takes over: the guest's affair.
    let (code, said) = ending(
        |a| {
            write_port(a, 0x505, 2);
            write_port(a, 0x602, 1);
        },
        &[],
    );
    assert_eq!(code, Some(0), "{said}");
}

/// The sum of what both mask registers of the 8259s have, in seven bits: as many as the port shows.
fn reader_of_masks() -> Vec<u8> {
    image(|a| {
        a.in_(al, 0x21).unwrap();
        a.mov(ebx, eax).unwrap();
        a.in_(al, 0xa1).unwrap();
        a.and(eax, ebx).unwrap();
        a.and(eax, 0xff).unwrap();
        a.shr(eax, 1).unwrap();
        a.out(0xf4, al).unwrap();
    })
}

/// ACPI says that there are none: a guest that takes interrupts must not get theirs.
#[test]
fn the_8259s_are_masked_until_somebody_programs_them() {
    assert_eq!(run(&reader_of_masks(), &["--pit"]), (vec![], 0x7f));
}

#[test]
fn there_are_8259s_only_where_somebody_needs_them() {
    let image = image(|a| {
        a.mov(al, 0x5a).unwrap();
        a.out(0x21, al).unwrap();
        a.in_(al, 0x21).unwrap();
        a.and(eax, 0x7f).unwrap();
        a.out(0xf4, al).unwrap();
    });
    for (arguments, mask) in [
        (&[][..], 0x7f),
        (&["--pit"], 0x5a),
        (&["--test-device"], 0x5a),
        (&["--cmdline", "quiet acpi=off"], 0x5a),
    ] {
        assert_eq!(run(&image, arguments), (vec![], mask), "{arguments:?}");
    }
}

/// A guest that has its serial port interrupt for an empty transmitter, through the I/O APIC's pin with this entry, and ends with
/// the count of interrupts that it took before it had waited for long: each time it ends it first.
fn listener(entry: i32) -> Vec<u8> {
    const VECTOR: u64 = 0x41;
    const SELECT: u64 = 0xfec0_0000;
    const WINDOW: u64 = 0xfec0_0010;
    image(|a| {
        let [mut set_up, mut wait, mut enough] = std::array::from_fn(|_| a.create_label());
        a.mov(esp, BASE as u32 + 0x3f00).unwrap();
        // The handler's address is the call's return address. No IRET, which a KVM in software lacks.
        a.call(set_up).unwrap();
        a.add(esp, 12).unwrap();
        a.inc(edi).unwrap();
        // End of interrupt; then the transmitter is no reason any more, has something, and is empty again.
        a.mov(dword_ptr(0xfee0_00b0u64), 0).unwrap();
        a.cmp(edi, 3u32).unwrap();
        a.jae(enough).unwrap();
        a.mov(dx, 0x3fau32).unwrap();
        a.in_(al, dx).unwrap();
        a.mov(dx, 0x3f8u32).unwrap();
        a.mov(al, u32::from(b'!')).unwrap();
        a.out(dx, al).unwrap();
        a.set_label(&mut wait).unwrap();
        // Some tenths of a second where all is emulated: an interrupt comes by a thread of the kernel's, which may have to wait its turn.
        a.mov(ecx, 20_000_000u32).unwrap();
        a.sti().unwrap();
        let mut here = a.create_label();
        a.set_label(&mut here).unwrap();
        a.dec(ecx).unwrap();
        a.jne(here).unwrap();
        a.cli().unwrap();
        a.set_label(&mut enough).unwrap();
        a.mov(eax, edi).unwrap();
        a.out(0xf4, al).unwrap();
        a.set_label(&mut set_up).unwrap();
        catch(a, VECTOR);
        a.xor(edi, edi).unwrap();
        a.mov(dword_ptr(0xfee0_00f0u64), 0x1ff).unwrap();
        for (register, value) in [(0x19, 0), (0x18, entry | VECTOR as i32)] {
            a.mov(dword_ptr(SELECT), register).unwrap();
            a.mov(dword_ptr(WINDOW), value).unwrap();
        }
        // Interrupt enable: transmitter empty, which it is.
        a.mov(dx, 0x3f9u32).unwrap();
        a.mov(al, 2).unwrap();
        a.out(dx, al).unwrap();
        a.jmp(wait).unwrap();
    })
}

#[test]
fn a_pin_of_the_io_apic_interrupts_as_its_entry_says_whoever_has_it() {
    const MASKED: i32 = 1 << 16;
    // As edges; masked.
    for (entry, said, taken) in [(0, "!!", 3), (MASKED, "", 0)] {
        let image = listener(entry);
        for arguments in [&[][..], &["--pit"]] {
            assert_eq!(run(&image, arguments), (said.as_bytes().to_vec(), taken), "{entry:#x} {arguments:?}");
        }
    }
}
