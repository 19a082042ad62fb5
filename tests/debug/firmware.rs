//! Starting at the reset vector, on any KVM: the built-in firmware's way up as single steps, and what the kernel that it enters
//! finds. Linux by firmware is in `tests/boot`.

use crate::images::{bzimage, out, pvh_kernel};
use crate::place::*;
use crate::steps::golden;

const RUN: &str = "--console off --serial off --debug-exit --mem 64M";

/// Goes on where the flags say equal; else ends the run with `number`.
fn or_end(number: u8) -> Vec<u8> {
    let end = out(0xf4, number);
    [&[0x74, end.len() as u8], &end[..]].concat()
}

/// A bzImage whose 64-bit entry looks at what it got, three processors in the machine.
fn linux() -> Vec<u8> {
    let mut code = Vec::new();
    let mut check = |instructions: &[&[u8]], number: u8| {
        code.extend(instructions.concat());
        code.extend(or_end(number));
    };
    check(&[&[0x81, 0xbe, 0x02, 0x02, 0, 0], b"HdrS"], 1); // cmp dword [rsi + 0x202]: the zero page's header
    check(&[&[0x48, 0x8b, 0x5e, 0x70, 0x81, 0x3b], b"RSD "], 2); // mov rbx, [rsi + 0x70]; cmp dword [rbx]
    check(&[&[0x8b, 0x9e, 0x18, 0x02, 0, 0, 0x81, 0x3b], b"init"], 3); // mov ebx, [rsi + 0x218]: the initrd
    check(&[&[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x81, 0x3b], b"line"], 4); // mov ebx, [rsi + 0x228]: the command line
    check(&[&[0x80, 0xbe, 0xe8, 0x01, 0, 0, 3]], 5); // cmp byte [rsi + 0x1e8]: entries of the memory map
    check(&[&[0x81, 0x3c, 0x25, 0x20, 0x50, 0, 0, 2, 0, 0, 0]], 6); // cmp dword [0x5020]: the others are parked
    code.extend(out(0xf4, 0x20));
    let mut file = bzimage(1, 64 << 10);
    file[5 * 512 + 0x200..][..code.len()].copy_from_slice(&code);
    file
}

/// An ELF file whose PVH entry does, and writes to the ROM.
fn pvh() -> Vec<u8> {
    let mut code = Vec::new();
    let mut check = |instructions: &[&[u8]], number: u8| {
        code.extend(instructions.concat());
        code.extend(or_end(number));
    };
    check(&[&[0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33]], 1); // cmp dword [ebx]: start_info
    check(&[&[0x8b, 0x4b, 0x20, 0x81, 0x39], b"RSD "], 2); // mov ecx, [ebx + 32]; cmp dword [ecx]
    check(&[&[0x8b, 0x4b, 0x10, 0x8b, 0x09, 0x81, 0x39], b"init"], 3); // the first module
    check(&[&[0x8b, 0x4b, 0x18, 0x81, 0x39], b"line"], 4); // the command line
    check(&[&[0x83, 0x7b, 0x30, 3]], 5); // entries of the memory map
    let reset = [0xf0, 0xff, 0xff, 0xff];
    check(&[&[0xc6, 0x05], &reset, &[0], &[0x80, 0x3d], &reset, &[0xe9]], 6); // mov byte [reset], 0; cmp with JMP
    code.extend(out(0xf4, 0x20));
    pvh_kernel(&code)
}

#[test]
fn the_first_fifty_instructions_of_a_pc() {
    if !has_kvm("the_first_fifty_instructions_of_a_pc") {
        return;
    }
    let place = Place::new();
    place.file("kernel", linux());
    let run = place.vmm(&format!("trace --step --count 50 -- --firmware --kernel kernel {RUN}"));
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    golden("reset.golden", &text(&run.stdout));
}

#[test]
fn kernels_find_what_the_monitor_placed() {
    if !has_kvm("kernels_find_what_the_monitor_placed") {
        return;
    }
    let place = Place::new();
    place.file("linux", linux());
    place.file("pvh", pvh());
    place.file("initrd", "initrd");
    for (kernel, marks) in [("linux", 7), ("pvh", 7)] {
        let run = format!(
            "-v --firmware --kernel {kernel} --initrd initrd --cmdline line --cpus 3 --boot-marks {RUN}"
        );
        let run = place.vmm(&run);
        let said = text(&run.stderr);
        assert_eq!(run.status.code(), Some(0x41), "{kernel}: {said}");
        assert_eq!(said.matches("boot mark 0x").count(), marks, "{said}");
        assert_eq!(said.contains("to ROM, at 0xff0 "), kernel == "pvh", "{said}");
    }
}

#[test]
fn a_trace_knows_rom_and_firmware() {
    if !has_kvm("a_trace_knows_rom_and_firmware") {
        return;
    }
    let place = Place::new();
    place.file("pvh", pvh());
    place.file("initrd", "initrd");
    let run = place.vmm(&format!("trace --firmware --kernel pvh --initrd initrd --cmdline line {RUN}"));
    let told = text(&run.stdout);
    for words in ["fw-cfg", "rom", "0xfffffff0"] {
        assert!(told.contains(words), "{words}: {told} {}", text(&run.stderr));
    }
}

#[test]
fn what_cannot_be_started_is_refused() {
    let place = Place::new();
    place.file("kernel", linux());
    place.file("short", "0123456789abcde");
    place.file("elf", crate::images::kernel(&[0xf4]));
    for (arguments, words) in [
        ("--firmware", &["no kernel"][..]),
        ("--firmware nowhere --kernel kernel", &["nowhere", "firmware"]),
        ("--firmware short --kernel kernel", &["short", "15 bytes"]),
        ("--firmware --kernel elf", &["elf", "PVH"]),
        ("--firmware --kernel kernel --boot pvh", &["PVH"]),
        ("--firmware --kernel kernel --option-rom nowhere", &["nowhere", "option ROM"]),
        ("--kernel kernel --option-rom short", &["option ROMs"]),
    ] {
        refused(&place, &format!("run {arguments} {RUN}"), BAD_ARGUMENT, words);
    }
}
