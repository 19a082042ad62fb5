//! `vmm device` with tiny guests: some let go of whatever they are asked for, some write what they like, some hear nothing.

use serde_json::Value;

use crate::images::*;
use crate::place::*;

/// Lets go of every device that it is asked for: what it reads from `pci::hot_plug`'s register of these it writes to the other.
const OBLIGING: [u8; 16] = [
    0x66, 0xba, 0x14, 0x06, // mov dx, 0x614
    0xed, // in eax, dx
    0x85, 0xc0, // test eax, eax
    0x74, 0xfb, // jz to the in
    0x66, 0xba, 0x18, 0x06, // mov dx, 0x618
    0xef, // out dx, eax
    0xeb, 0xf0, // jmp to the start
];

/// Lets go of everything, all the time.
const RECKLESS: [u8; 12] = [
    0x66, 0xba, 0x18, 0x06, // mov dx, 0x618
    0xb8, 0xff, 0xff, 0xff, 0xff, // mov eax, -1
    0xef, // out dx, eax
    0xeb, 0xfd, // jmp to the out
];

/// A place with images `a` and `b`, and a guest `v` of `code` with a PCI bus.
fn guest(code: &[u8], more: &str) -> (Place, Running) {
    let place = Place::new();
    place.file("code", kernel(code));
    ["a", "b"].into_iter().for_each(|name| place.file(name, vec![0; 1 << 20]));
    let running = Running::new(
        place.command(&format!("--kernel code --mem 64M --console off --name v --transport pci {more}")),
    );
    place.await_running("v");
    (place, running)
}

fn devices(place: &Place) -> Vec<(String, String)> {
    let list: Vec<Value> = serde_json::from_str(&place.done("device list v --json")).unwrap();
    let of = |device: &Value, key: &str| device[key].as_str().unwrap().to_owned();
    list.iter().map(|device| (of(device, "name"), of(device, "state"))).collect()
}

fn present(name: &str) -> (String, String) {
    (name.to_owned(), "present".to_owned())
}

#[test]
fn a_guest_that_lets_go_loses_a_disk_and_gets_another() {
    if !has_kvm("a_guest_that_lets_go_loses_a_disk_and_gets_another") {
        return;
    }
    // A network that the machine did not start with is nothing that a sandbox has (sandbox.rs).
    let (place, _guest) = guest(&OBLIGING, "--disk a --rng --sandbox off");
    assert_eq!(devices(&place), [present("virtio-blk0"), present("virtio-rng")]);
    assert_eq!(place.done("device remove v virtio-blk0"), "");
    assert_eq!(devices(&place), [present("virtio-rng")]);
    for _ in 0..30 {
        // Also from the directory that the path is relative to.
        assert_eq!(place.done("device add v disk=b,readonly"), "virtio-blk0\n");
        assert_eq!(place.done("device add v net=user"), "virtio-net0\n");
        let list = place.done("device list v");
        let line =
            |name| list.lines().find(|line: &&str| line.starts_with(name)).unwrap_or_default().to_owned();
        let b = place.path("b");
        assert!(list.starts_with("NAME         PCI      STATE     DEVICE\n"), "{list}");
        assert_eq!(
            line("virtio-blk0"),
            format!("virtio-blk0  00:01.0  present   disk={},readonly", b.display())
        );
        assert_eq!(line("virtio-net0"), "virtio-net0  00:03.0  present   net=user");
        assert_eq!(line("virtio-rng "), "virtio-rng   00:02.0  present   rng");
        assert!(place.done("status v").contains("virtio-net0 (user"));
        for name in ["virtio-net0", "virtio-blk0"] {
            place.done(&format!("device remove v {name}"));
            let twice = place.fails(&format!("device remove v {name}"), HOST);
            assert!(twice.contains(&format!("it has no device called \"{name}\"")), "{twice}");
        }
        assert_eq!(devices(&place), [present("virtio-rng")]);
    }
    // Another machine may have the image that went.
    let other = place.command("--kernel code --mem 64M --console off --name other --disk a");
    let _other = Running::new(other);
    place.await_running("other");
    let taken = place.fails("device add v disk=a", BAD_ARGUMENT);
    assert!(taken.contains("disk image") && taken.contains("is in use by another process"), "{taken}");
}

#[test]
fn a_guest_that_lets_go_of_everything_all_the_time_loses_only_what_it_was_asked_for() {
    if !has_kvm("a_guest_that_lets_go_of_everything_all_the_time_loses_only_what_it_was_asked_for") {
        return;
    }
    let (place, _guest) = guest(&RECKLESS, "--disk a --cpus 2");
    for _ in 0..10 {
        assert_eq!(place.done("device add v disk=b"), "virtio-blk1\n");
        assert_eq!(devices(&place), [present("virtio-blk0"), present("virtio-blk1")]);
        place.done("device remove v virtio-blk1");
        assert_eq!(devices(&place), [present("virtio-blk0")]);
    }
    place.done("kill v");
}

#[test]
fn a_guest_that_hears_nothing_keeps_its_disk_until_it_is_taken_away() {
    if !has_kvm("a_guest_that_hears_nothing_keeps_its_disk_until_it_is_taken_away") {
        return;
    }
    let (place, _guest) = guest(&HALT, "");
    place.done("device add v disk=a,serial=x");
    let error = place.fails("device remove v virtio-blk0 --timeout 0", HOST);
    assert!(
        error.contains("the guest of \"v\" has not let virtio-blk0 go within 0 seconds\nhint: "),
        "{error}"
    );
    assert_eq!(devices(&place), [("virtio-blk0".to_owned(), "ejecting".to_owned())]);
    // A machine that stands still changes nothing, nor hangs anybody.
    place.done("pause v");
    for command in ["add v disk=b", "remove v virtio-blk0", "remove v virtio-blk0 --force"] {
        let error = place.fails(&format!("device {command}"), HOST);
        assert_eq!(
            error, "vmm: error: \"v\" refused: it is paused\nhint: resume it first: vmm resume NAME\n",
            "{command}"
        );
    }
    place.done("resume v");
    place.done("device remove v virtio-blk0 --force");
    assert_eq!(devices(&place), []);
    // Eight may come.
    for number in 0..8 {
        place.file(&format!("image{number}"), vec![0; 4096]);
        place.done(&format!("device add v disk=image{number}"));
    }
    let full = place.fails("device add v disk=a", HOST);
    assert!(full.contains("no place is free for another device\nhint: remove a device"), "{full}");
    place.done("kill v");
    let gone = place.fails("device list v", HOST);
    assert!(gone.contains("no virtual machine called \"v\" is running"), "{gone}");
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_try() {
    if !has_kvm("what_makes_no_sense_is_refused_with_what_to_try") {
        return;
    }
    let (place, _guest) = guest(&HALT, "--rng --net-dump dump --net user --sandbox off");
    for (command, code, words) in [
        ("add v", BAD_ARGUMENT, "<disk=FILE|net=WHERE>"),
        (
            "add v floppy=a",
            BAD_ARGUMENT,
            "is neither a disk nor a network device\nhint: write disk=FILE or net=user",
        ),
        ("add v disk=a,readonly=maybe", BAD_ARGUMENT, "readonly"),
        ("add v net=user,colour=red", BAD_ARGUMENT, "unknown field `colour`"),
        ("add w disk=a", HOST, "no virtual machine called \"w\" is running"),
        ("add v disk=missing", BAD_ARGUMENT, "No such file or directory (os error 2)\nhint: check the path"),
        ("add v disk=dump", HOST, "the network dump"),
        ("add v disk=a,block-size=100", HOST, "unsupported block size\nhint: use block-size=512"),
        ("add v net=user", HOST, "a guest has one user network"),
        ("add v net=switch=s", HOST, "\nhint: start it without --net-dump"),
        ("add v net=fd=3", HOST, "\nhint: name a tap, a switch or a socket"),
        (
            "remove v virtio-rng",
            HOST,
            "virtio-rng is there for good\nhint: disks and network devices can be removed",
        ),
        (
            "remove v vda",
            HOST,
            "it has no device called \"vda\"\nhint: see what it has: vmm device list NAME",
        ),
        ("remove v", BAD_ARGUMENT, "<DEVICE>"),
    ] {
        let error = place.fails(&format!("device {command}"), code);
        assert!(error.contains(words), "{command}: {error}");
    }
    place.file("halt", kernel(&HALT));
    let _mmio = place.start("mmio", "--mem 64M --disk a");
    assert!(place.done("device list mmio").contains("virtio-blk0  -        present   disk="));
    for command in ["add mmio disk=b", "add mmio disk=b,overlay=new", "remove mmio virtio-blk0"] {
        let error = place.fails(&format!("device {command}"), HOST);
        let words =
            "devices come and go on a PCI bus only, and it has none\nhint: start it with --transport pci";
        assert!(error.contains(words), "{command}: {error}");
    }
    assert!(!place.path("new").exists(), "it was of no use");
}
