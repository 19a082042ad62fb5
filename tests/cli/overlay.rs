//! Disks with an overlay, and saved ones, under a tiny guest that counts on its disk.

use std::fs;

use crate::images::*;
use crate::place::*;

/// What the guest's end is as an exit code.
const ENDED: i32 = 43;

/// Reads the first sector of the first disk, which is a virtio-mmio device (virtio 1.3, 4.2.2), adds one to its first byte, writes it,
/// says that byte on the serial port, and does `end`; without one it does all that again after a moment. It knows how to flush, and
/// does not.
fn counts(end: Option<&[u8]>) -> Vec<u8> {
    const DEVICE: u32 = 0xfe00_0000;
    const DESCRIPTORS: u32 = 32 << 20;
    const AVAILABLE: u32 = DESCRIPTORS + 0x1000;
    const USED: u32 = DESCRIPTORS + 0x2000;
    const HEADERS: u32 = DESCRIPTORS + 0x3000;
    const BUFFER: u32 = DESCRIPTORS + 0x4000;
    let mut code = Vec::new();
    // mov dword [address], value
    let store = |code: &mut Vec<u8>, address: u32, value: u32| {
        code.extend([0xc7, 0x05]);
        code.extend(address.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    for status in [0, 1, 3] {
        store(&mut code, DEVICE + 0x70, status);
    }
    // VIRTIO_BLK_F_FLUSH, and VIRTIO_F_VERSION_1.
    for (half, features) in [(0, 1 << 9), (1, 1)] {
        store(&mut code, DEVICE + 0x24, half);
        store(&mut code, DEVICE + 0x20, features);
    }
    let queue = [(0x30, 0), (0x38, 8), (0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED), (0x44, 1)];
    for (register, value) in [(0x70, 11)].into_iter().chain(queue).chain([(0x70, 15)]) {
        store(&mut code, DEVICE + register, value);
    }
    // Both requests: type and sector; the buffer, which the device writes for the first; a status byte.
    for request in 0..2 {
        let header = HEADERS + 0x100 * request;
        store(&mut code, header, request);
        let chain = [(header, 16, 1), (BUFFER, 512, if request == 0 { 3 } else { 1 }), (header + 0x80, 1, 2)];
        for (link, (at, length, flags)) in (3 * request..).zip(chain) {
            let descriptor = DESCRIPTORS + 16 * link;
            store(&mut code, descriptor, at);
            store(&mut code, descriptor + 8, length);
            store(&mut code, descriptor + 12, flags | (link + 1) << 16);
        }
    }
    for pair in 0..4 {
        store(&mut code, AVAILABLE + 4 + 4 * pair, 3 << 16);
    }
    code.extend([0x31, 0xdb]); // xor ebx, ebx
    let again = code.len();
    for request in 0..2 {
        // inc ebx; mov [AVAILABLE + 2], bx
        code.extend([0x43, 0x66, 0x89, 0x1d]);
        code.extend((AVAILABLE + 2).to_le_bytes());
        store(&mut code, DEVICE + 0x50, 0);
        // cmp [USED + 2], bx; jne to the cmp
        code.extend([0x66, 0x39, 0x1d]);
        code.extend((USED + 2).to_le_bytes());
        code.extend([0x75, 0xf7]);
        if request == 0 {
            // inc byte [BUFFER]
            code.extend([0xfe, 0x05]);
            code.extend(BUFFER.to_le_bytes());
        }
    }
    // mov al, [BUFFER]; mov dx, 0x3f8; out dx, al
    code.push(0xa0);
    code.extend(BUFFER.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    match end {
        Some(end) => code.extend(end),
        None => {
            // mov ecx, 10000; loop to itself; jmp again
            code.extend([0xb9, 0x10, 0x27, 0x00, 0x00, 0xe2, 0xfe, 0xe9]);
            let back = again as i32 - (code.len() as i32 + 4);
            code.extend(back.to_le_bytes());
        }
    }
    code
}

/// A place with the guest that ends, as `counts`, that stays when it has counted, as `stays`, and that goes on, as `goes_on`; an image, whose first byte is a `0`; and
/// folders for what is temporary and for nothing.
fn place() -> Place {
    let place = Place::new();
    place.file("counts", pvh_kernel(&counts(Some(&out(0xf4, 0x15)))));
    place.file("stays", pvh_kernel(&counts(Some(&HALT))));
    place.file("goes_on", pvh_kernel(&counts(None)));
    place.file("base", vec![b'0'; 16 << 10]);
    ["tmp", "folder"].into_iter().for_each(|name| fs::create_dir(place.path(name)).unwrap());
    place
}

fn command(place: &Place, kernel: &str, disk: &str, said: &str) -> std::process::Command {
    let mut command = place.command(&format!(
        "--kernel {kernel} --mem 64M --debug-exit --console off --serial file={said} --disk path={disk}"
    ));
    command.env("TMPDIR", place.path("tmp"));
    command
}

/// What a run says.
#[track_caller]
fn run(place: &Place, disk: &str) -> String {
    let output = finish(command(place, "counts", disk, "said").spawn().unwrap());
    assert_eq!(output.status.code(), Some(ENDED), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "");
    fs::read_to_string(place.path("said")).unwrap()
}

/// One that has counted and stays.
fn staying(place: &Place, disk: &str, said: &str) -> Running {
    let running = Running::new(command(place, "stays", disk, said));
    said_more(place, said, 0);
    running
}

/// What is said once that is more than `count` bytes.
#[track_caller]
fn said_more(place: &Place, said: &str, count: usize) -> Vec<u8> {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let said = fs::read(place.path(said)).unwrap_or_default();
        if said.len() > count {
            return said;
        }
        assert!(std::time::Instant::now() < end, "it does not count");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn is_empty(place: &Place, folder: &str) -> bool {
    fs::read_dir(place.path(folder)).unwrap().next().is_none()
}

#[test]
fn an_overlay_is_thrown_away_or_kept_and_the_image_stays_as_it_is() {
    if !has_kvm("an_overlay_is_thrown_away_or_kept_and_the_image_stays_as_it_is") {
        return;
    }
    let place = place();
    for _ in 0..2 {
        assert_eq!(run(&place, "base,overlay"), "1");
    }
    // Made by the first run; nothing flushes but the end of each.
    for count in ["1", "2", "3"] {
        assert_eq!(run(&place, "base,overlay=kept"), count);
    }
    place.file(
        "machine",
        r#"{"kernel": "counts", "mem": "64M", "console": "off", "serial": "file=said", "debug_exit": 244,
        "disk": [{"path": "base", "overlay": "kept"}]}"#,
    );
    let output = place.vmm("--config machine");
    assert_eq!(output.status.code(), Some(ENDED), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(place.path("said")).unwrap(), "4");
    assert_eq!(run(&place, "base,overlay=other"), "1");
    assert!(fs::read(place.path("base")).unwrap().iter().all(|byte| *byte == b'0'));
    assert!(is_empty(&place, "tmp"));
    let plan = place.done("--kernel counts --disk path=base,overlay=kept --dry-run");
    assert!(plan.contains(r#""overlay": "kept""#), "{plan}");
    // Without one it is the image that counts, and no overlay belongs to it any more.
    assert_eq!(run(&place, "base"), "1");
    let disk = "--kernel counts --disk path=base,overlay=kept";
    refused(&place, disk, BAD_ARGUMENT, &["overlay kept", "the image was last changed"]);
}

#[test]
fn machines_at_once_share_an_image_and_a_killed_one_leaves_nothing() {
    if !has_kvm("machines_at_once_share_an_image_and_a_killed_one_leaves_nothing") {
        return;
    }
    let place = place();
    let running = [
        staying(&place, "base,overlay", "one"),
        staying(&place, "base,overlay", "two"),
        staying(&place, "base,overlay=kept", "three"),
    ];
    for said in ["one", "two", "three"] {
        assert_eq!(fs::read(place.path(said)).unwrap(), b"1");
    }
    assert!(is_empty(&place, "tmp"), "also while they run");
    for (disk, file) in [("base", "base"), ("base,overlay=kept", "kept")] {
        let arguments = format!("--kernel counts --disk path={disk}");
        refused(&place, &arguments, BAD_ARGUMENT, &[file, "in use by another process"]);
    }
    // Dropping them kills them: by SIGKILL.
    drop(running);
    assert!(is_empty(&place, "tmp") && fs::read(place.path("base")).unwrap() == vec![b'0'; 16 << 10]);
    // What was not flushed is lost, as after a power failure.
    assert_eq!(run(&place, "base,overlay=kept"), "1");
}

#[test]
fn a_machine_that_is_ended_keeps_what_it_wrote_paused_or_not() {
    if !has_kvm("a_machine_that_is_ended_keeps_what_it_wrote_paused_or_not") {
        return;
    }
    let place = place();
    let running = staying(&place, "base,overlay=kept --name v", "said");
    running.signal(rustix::process::Signal::HUP);
    assert_eq!(running.finish().status.code(), Some(KILLED));
    let running = staying(&place, "base,overlay=kept --name v", "second");
    assert_eq!(fs::read(place.path("second")).unwrap(), b"2");
    place.done("pause v");
    place.done("kill v");
    assert_eq!(running.finish().status.code(), Some(KILLED));
    assert_eq!(run(&place, "base,overlay=kept"), "3");
}

#[test]
fn overlays_that_cannot_be_are_refused() {
    if !has_kvm("overlays_that_cannot_be_are_refused") {
        return;
    }
    let place = place();
    place.file("text", "no overlay");
    assert_eq!(run(&place, "base,overlay=kept"), "1");
    place.file("larger", vec![b'0'; 20 << 10]);
    place.file("cut", &fs::read(place.path("kept")).unwrap()[..20_000]);
    for (disk, words) in [
        ("base,overlay=text", &["overlay text", "not an overlay"][..]),
        ("base,overlay=base", &["its own overlay"]),
        ("base,overlay=folder", &["overlay folder", "directory"]),
        ("base,overlay=no/folder", &["overlay no/folder", "No such file"]),
        ("base,overlay=cut", &["overlay cut", "20000 bytes"]),
        ("larger,overlay=kept", &["overlay kept", "16384 bytes", "20480"]),
        ("base,overlay,readonly", &["read-only"]),
        ("missing,overlay=new", &["missing", "No such file"]),
        ("kept", &["kept is an overlay, not a raw image"]),
    ] {
        refused(&place, &format!("--kernel counts --disk path={disk}"), BAD_ARGUMENT, words);
    }
    let mut command = place.command("--kernel counts --disk path=base,overlay");
    command.env("TMPDIR", place.path("no/folder"));
    refused_command(&place, command, BAD_ARGUMENT, &["temporary overlay", "no/folder"]);
}

/// That the machine saved in `folder` goes on with what comes after `last`, in `said`.
#[track_caller]
fn goes_on(place: &Place, folder: &str, last: u8, said: &str) -> Running {
    let mut command = place.command(&format!("restore {folder} --serial file={said} --name {said}"));
    command.env("TMPDIR", place.path("tmp"));
    let running = Running::new(command);
    let counted = said_more(place, said, 3);
    let expected: Vec<_> = (1..=counted.len()).map(|more| last.wrapping_add(more as u8)).collect();
    assert_eq!(counted, expected, "after {last}");
    running
}

/// That the copy `name`, which is in the background, goes on with what comes after `last`. What it has said.
#[track_caller]
fn counts_on(place: &Place, name: &str, last: u8) -> Vec<u8> {
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        let said = place.vmm(&format!("logs {name}")).stdout;
        let expected: Vec<_> = (1..=said.len()).map(|more| last.wrapping_add(more as u8)).collect();
        assert_eq!(said, expected, "{name}, after {last}");
        if said.len() > 3 {
            return said;
        }
        assert!(std::time::Instant::now() < end, "{name} does not count");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn copies_have_disks_of_their_own_as_they_were() {
    if !has_kvm("copies_have_disks_of_their_own_as_they_were") {
        return;
    }
    let place = place();
    let fork = |arguments: &str| {
        let mut command = place.command(arguments);
        command.env("TMPDIR", place.path("tmp"));
        let output = finish(command.stdout(std::process::Stdio::piped()).spawn().unwrap());
        assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
    };
    for (disk, file) in [("base,overlay", "one"), ("base,overlay=kept", "two")] {
        let first = Running::new(command(&place, "goes_on", &format!("{disk} --name v"), file));
        said_more(&place, file, 3);
        place.done("pause v");
        let said = fs::read(place.path(file)).unwrap();
        let last = *said.last().unwrap();
        fork("fork v --count 2");
        place.done("resume v");
        said_more(&place, file, said.len() + 3);
        for name in ["v-1", "v-2"] {
            counts_on(&place, name, last);
        }
        // A copy of a copy, which outlives both.
        place.done("pause v-2");
        let last = *counts_on(&place, "v-2", last).last().unwrap();
        fork("fork v-2");
        drop(first);
        place.done("kill v-1 v-2");
        counts_on(&place, "v-2-1", last);
        place.done("kill v-2-1");
        assert!(is_empty(&place, "tmp"));
    }
    assert!(fs::read(place.path("base")).unwrap().iter().all(|byte| *byte == b'0'));
}

#[test]
fn a_restored_machine_has_its_disk_as_it_was_when_it_was_saved() {
    if !has_kvm("a_restored_machine_has_its_disk_as_it_was_when_it_was_saved") {
        return;
    }
    let place = place();
    place.file("own", vec![b'0'; 16 << 10]);
    for (number, disk) in ["base,overlay", "base,overlay=kept", "own"].into_iter().enumerate() {
        let file = |name: &str| format!("{name}{number}");
        let saved = Running::new(command(&place, "goes_on", &format!("{disk} --name v"), &file("said")));
        said_more(&place, &file("said"), 3);
        place.done("pause v");
        let last = *fs::read(place.path(&file("said"))).unwrap().last().unwrap();
        place.done(&format!("snapshot create v {}", file("s")));
        place.done("resume v");
        // The disk of the one that was saved is not that any more.
        let before = fs::read(place.path(&file("said"))).unwrap().len();
        said_more(&place, &file("said"), before + 3);

        // Two of one, at once, and not beside what was saved only.
        let first = goes_on(&place, &file("s"), last, &file("a"));
        let second = goes_on(&place, &file("s"), last, &file("b"));
        drop(saved);
        place.done(&format!("pause {}", file("a")));
        let last = *fs::read(place.path(&file("a"))).unwrap().last().unwrap();
        place.done(&format!("snapshot create {} {}", file("a"), file("t")));
        drop((first, second));
        if disk != "own" {
            // It needs the image, and no other folder.
            fs::remove_dir_all(place.path(&file("s"))).unwrap();
        }
        fs::rename(place.path(&file("t")), place.path("moved")).unwrap();
        drop(goes_on(&place, "./moved", last, &file("c")));
        drop(goes_on(&place, "moved", last, &file("d")));
        place.done("snapshot verify moved");
        let plan = place.done("snapshot show moved");
        assert!(plan.contains(&format!("\"lower\": \"{}\"", place.path("moved/disk0").display())), "{plan}");
        // Copies of what was saved: each counts on a disk of its own.
        place.done("fork ./moved --count 2 --name w");
        ["w-1", "w-2"].into_iter().for_each(|name| _ = counts_on(&place, name, last));
        place.done("pause w-1");
        place.done("snapshot create w-1 again");
        place.done("kill w-1 w-2");
        drop(goes_on(&place, "again", *counts_on(&place, "w-1", last).last().unwrap(), &file("e")));
        fs::remove_dir_all(place.path("again")).unwrap();
        fs::remove_dir_all(place.path("moved")).unwrap();
    }
    assert!(is_empty(&place, "tmp"));
    assert!(fs::read(place.path("base")).unwrap().iter().all(|byte| *byte == b'0'));
}
