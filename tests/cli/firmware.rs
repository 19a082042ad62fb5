//! Machines with firmware that are saved, forked and kept as templates: a ROM of a few instructions that counts aloud.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// 16-bit code that counts as [`COUNTING`] does, and asks fw_cfg for the number of processors, 1, before each word.
const COUNTING_ROM: [u8; 34] = [
    0x31, 0xdb, // xor bx, bx
    0x43, // inc bx
    0xba, 0x10, 0x05, // mov dx, 0x510
    0xb8, 0x05, 0x00, // mov ax, 5
    0xef, // out dx, ax
    0x42, // inc dx
    0xec, // in al, dx
    0x04, 0x2f, // add al, '0' - 1
    0x88, 0xc4, // mov ah, al
    0x88, 0xd8, // mov al, bl
    0x24, 0x3f, // and al, 63
    0x00, 0xe0, // add al, ah
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0x00, 0x40, // mov cx, 0x4000
    0x49, // dec cx
    0x75, 0xfd, // jnz to the dec
    0xeb, 0xe0, // jmp to the inc
];

/// Of 4 KiB, in the last 256 bytes of which `code` stands. A processor begins 16 bytes before the end, which is IP 0xfff0.
fn rom(code: &[u8]) -> Vec<u8> {
    let mut rom = vec![0xff; 4096];
    rom[0xf00..0xf00 + code.len()].copy_from_slice(code);
    rom[0xff0..0xff3].copy_from_slice(&[0xe9, 0x0d, 0xff]); // jmp to IP 0xff00
    rom
}

/// A place with a machine called `v` that has counted for a while.
fn counting_rom(more: &str) -> (Place, Running) {
    let place = Place::new();
    place.file("rom", rom(&COUNTING_ROM));
    let command = format!("--firmware rom --mem 32M --serial file=said --console off --name v {more}");
    let guest = Running::new(place.command(&command));
    await_words(&place, "said", 3);
    (place, guest)
}

#[test]
fn a_machine_with_firmware_goes_on_with_its_rom_and_what_firmware_reads() {
    if !has_kvm("a_machine_with_firmware_goes_on_with_its_rom_and_what_firmware_reads") {
        return;
    }
    for more in ["--rng", "--transport pci --rng --pit"] {
        let (place, guest) = counting_rom(more);
        place.done("snapshot create --stop v s");
        guest.finish();
        let said = fs::read_to_string(place.path("said")).unwrap();
        // What it was started from is not needed.
        fs::remove_file(place.path("rom")).unwrap();
        let restored = Running::new(place.command("restore s --serial file=more --name w"));
        let on = await_words(&place, "more", 100);
        assert!(is_counted(&on) && is_counted(&said), "{more}: {said}\n{on}");
        assert!(is_counted(&format!("{}{}", said.trim_end(), &on[..10])), "{more}: {said}\n{on}");
        // A copy of the copy, and one that was saved again.
        assert_eq!(place.done("fork w"), "w-1\n");
        place.done("snapshot create w t");
        let again = Running::new(place.command("restore t --serial file=third --name x"));
        assert!(is_counted(&await_words(&place, "third", 100)));
        let log = || place.done("logs w-1");
        while log().len() < 10 {}
        assert!(is_counted(&log()[..10]), "{}", log());
        place.done("kill w w-1 x");
        drop((restored, again));
    }
}

#[test]
fn a_template_of_a_machine_with_firmware_goes_on_from_its_mark() {
    if !has_kvm("a_template_of_a_machine_with_firmware_goes_on_from_its_mark") {
        return;
    }
    let place = Place::new();
    // What is said before the mark is said by those that boot, however soon they are saved.
    let ready = [
        0xba, 0xf8, 0x03, 0xb0, b'#', 0xee, // mov dx, 0x3f8; mov al, '#'; out dx, al
        0xb0, 123, 0xe6, 0x80, // mov al, 123; out 0x80, al
    ];
    place.file("rom", rom(&[&ready[..], &COUNTING_ROM].concat()));
    let run = |name: &str| {
        let options = "run --template --boot-marks --firmware rom --mem 32M --console off";
        let guest = Running::new(place.command(&format!("{options} --serial file={name} --name {name}")));
        let said = await_words(&place, name, 10);
        assert!(is_counted(said.trim_start_matches('#')), "{said}");
        (guest, said)
    };
    let (_first, booted) = run("a");
    assert!(booted.starts_with("#123"), "{booted}");
    while place.done("template list").lines().count() < 2 {}
    let (_second, went_on) = run("b");
    assert!(!went_on.contains('#'), "{went_on}");
    // Other firmware is another machine.
    place.file("rom", rom(&[&ready[..], &COUNTING_ROM, &[0]].concat()));
    assert!(run("c").1.starts_with("#123"));
}

#[test]
fn what_firmware_is_given_is_saved_up_to_a_size() {
    if !has_kvm("what_firmware_is_given_is_saved_up_to_a_size") {
        return;
    }
    let place = Place::new();
    place.file("rom", rom(&COUNTING_ROM));
    place.file("big", bzimage(1, 33 << 20));
    let command = "--firmware rom --kernel big --mem 256M --serial file=said --console off --name v";
    let _guest = Running::new(place.command(command));
    await_words(&place, "said", 3);
    let error = place.fails("snapshot create v s", HOST);
    assert!(error.contains("firmware is given 34 MiB, and 32 can be saved"), "{error}");
    assert!(!place.path("s").exists());
    let said = await_words(&place, "said", 10);
    assert!(is_counted(&await_words(&place, "said", said.len() + 3)), "it goes on");
}

/// Where SeaBIOS is at hand and this KVM runs it: from its first word on, again and again, up to the boot sector.
#[test]
fn seabios_is_saved_on_its_way() {
    const SEABIOS: &str = "/usr/share/seabios/bios-microvm.bin";
    let test = "seabios_is_saved_on_its_way";
    if !has_kvm(test) {
        return;
    }
    if !fs::exists(SEABIOS).unwrap() {
        return eprintln!("SKIP: {test}: no {SEABIOS}: apt-get install seabios");
    }
    let place = Place::new();
    let mut disk = vec![0; 1 << 20];
    // 16-bit code: "k" to the serial port, and halt; and what makes it a boot sector.
    disk[..8].copy_from_slice(&[0xb0, b'k', 0xba, 0xf8, 0x03, 0xee, 0xf4, 0xeb]);
    disk[8] = 0xfd;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    place.file("disk", disk);
    let start = "--mem 64M --serial file=said --console off --name v0 --transport pci --firmware";
    let mut command: Command = place.command(start);
    command.args([SEABIOS, "--disk", "path=disk,readonly"]);
    let mut guest = Running::new(command);
    for number in 0..40 {
        place.await_running(&format!("v{number}"));
        thread::sleep(Duration::from_millis(300));
        let folder = format!("s{number}");
        place.done(&format!("snapshot create --stop v{number} {folder}"));
        guest.finish();
        // Each has a file of its own words.
        if text(&fs::read(place.path("said")).unwrap()).ends_with('k') {
            return assert!(number > 2, "it was too fast to be saved on its way");
        }
        let restore = format!("restore {folder} --name v{} --serial file=said", number + 1);
        guest = Running::new(place.command(&restore));
    }
    panic!("{}", text(&fs::read(place.path("said")).unwrap()));
}
