//! Traces that are damaged, symbols that are not the guest's, hosts that do not tell all: an error, or less of a report, and it
//! says so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use crate::place::*;
use crate::trace::{RUN, place};

const VIEWS: [&str; 6] = ["", "--stats", "--json", "--advise", "--html out", "--perfetto out"];

/// Ended as a command should, whatever it read.
#[track_caller]
fn ended_well(output: &Output, case: &str) {
    let error = text(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 2 | 4)), "{case}: {:?} {error}", output.status);
    assert!(!error.contains("panic"), "{case}: {error}");
    assert_eq!(output.status.success(), !error.contains("error:"), "{case}: {error}");
}

#[test]
fn damaged_traces_are_read_as_far_as_they_make_sense() {
    if !has_kvm("damaged_traces_are_read_as_far_as_they_make_sense") {
        return;
    }
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    let whole = fs::read(place.path("record")).unwrap();
    let header = 12 + u32::from_le_bytes(whole[8..12].try_into().unwrap()) as usize;
    let tail = |bytes: &[u8]| [&whole[..header], bytes].concat();
    let chunk = |kind: u32, track: u32, bytes: &[u8]| {
        let head = [kind, track, bytes.len() as u32].map(u32::to_le_bytes).concat();
        [&head[..], bytes].concat()
    };
    let flipped = |step: usize| {
        let mut bytes = whole.clone();
        bytes[header..].iter_mut().step_by(step).for_each(|byte| *byte ^= 0xa5);
        bytes
    };
    for (what, bytes, good) in [
        ("nothing", Vec::new(), false),
        ("no more than magic", whole[..8].to_vec(), false),
        ("another version", [b"vmmtrac\xff", &whole[8..]].concat(), false),
        ("half a header", whole[..header / 2].to_vec(), false),
        ("a header of 4 GiB", [&whole[..8], &[0xff; 4], &whole[12..]].concat(), false),
        (
            "a header that is no JSON",
            [&whole[..12], &vec![b'x'; header - 12], &whole[header..]].concat(),
            false,
        ),
        ("no events", whole[..header].to_vec(), true),
        ("half", whole[..(header + whole.len()) / 2].to_vec(), true),
        ("noise behind the header", tail(&[0x5a; 5000]), false),
        ("zeros behind the header", tail(&[0; 5000]), true),
        ("ones behind the header", tail(&[0xff; 5000]), false),
        ("unknown chunks", tail(&chunk(999, 7, b"later")), true),
        ("events of noise", tail(&chunk(2, 0, &[0xe7; 48 * 100])), true),
        (
            "events of every kind",
            tail(&chunk(2, 0, &(0..=255u8).flat_map(|n| [n; 48]).collect::<Vec<_>>())),
            true,
        ),
        ("a track's name that is no text", tail(&chunk(1, u32::MAX, &[0xff; 300])), true),
        ("counters that are no JSON", tail(&chunk(6, 0, b"{{{")), true),
        ("clocks that run back", tail(&[chunk(4, 0, &[0xff; 16]), chunk(4, 0, &[0; 16])].concat()), true),
        ("symbols that are none", tail(&chunk(7, 0, &[0x80; 4000])), true),
        ("losses without end", tail(&[chunk(3, 0, &[0xff; 8]), chunk(3, 0, &[0xff; 8])].concat()), true),
    ] {
        place.file("bad", &bytes);
        for view in VIEWS {
            let output = place.vmm(&format!("trace report bad {view}"));
            ended_well(&output, &format!("{what}, {view}"));
            assert_eq!(output.status.success(), good, "{what}, {view}: {}", text(&output.stderr));
        }
    }
    for step in [1, 2, 3, 7, 50, 333] {
        place.file("bad", flipped(step));
        for view in VIEWS {
            ended_well(
                &place.vmm(&format!("trace report bad {view}")),
                &format!("every {step}th byte, {view}"),
            );
        }
    }
}

#[test]
fn symbols_that_are_not_the_guests_are_refused() {
    if !has_kvm("symbols_that_are_not_the_guests_are_refused") {
        return;
    }
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    place.file("text", "what is this?\n");
    place.file("empty", "");
    place.file("noise", [0xc3; 5000]);
    fs::create_dir(place.path("folder")).unwrap();
    // The head of this very program: an ELF file that is cut off.
    place.file("cut", &fs::read(env!("CARGO_BIN_EXE_vmm")).unwrap()[..5000]);
    for (file, words) in [
        ("text", &["text", "no symbols", "System.map"][..]),
        ("empty", &["empty", "no symbols"]),
        ("noise", &["noise", "no symbols"]),
        ("cut", &["cut", "no symbols"]),
        ("folder", &["folder", "directory"]),
        ("missing", &["missing", "No such file"]),
    ] {
        refused(&place, &format!("trace report record --symbols {file}"), BAD_ARGUMENT, words);
    }
    refused(&place, "trace report record --kaslr-offset some", BAD_ARGUMENT, &["some"]);
    // Names of Rust and C++ functions, at the guest's code.
    place.file("names", "1000000 T _RNvNtCs1234_7mycrate6serial5write\n1000009 t _ZN4Uart6statusEv\n");
    let lines = text(&place.vmm("trace report record --symbols names").stdout);
    assert!(lines.contains("mycrate::serial::write+0x6") && lines.contains("Uart::status()+"), "{lines}");
}

#[test]
fn another_kernels_vmlinux_is_told_from_the_right_one() {
    if !has_kvm("another_kernels_vmlinux_is_told_from_the_right_one") {
        return;
    }
    // A kernel in the upper half cannot be had here; a list that the guest itself gave is in the file for one that can.
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    let mut record = fs::read(place.path("record")).unwrap();
    let list = (0..50).map(|n| format!("ffffffff9{n:03x}0000 t function_{n}\n")).collect::<String>();
    record.extend([7, 0, list.len() as u32].map(u32::to_le_bytes).concat());
    record.extend(list.as_bytes());
    place.file("linux", record);
    let shifted = list.replace("ffffffff9", "ffffffff8");
    place.file("right.map", &shifted);
    place.file("other.map", shifted.replace("function_1", "other_1").replace("function_", "function_1"));
    let good = place.vmm("trace report linux --symbols right.map");
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    let words = ["other.map", "not those of the kernel that ran"];
    refused(&place, "trace report linux --symbols other.map", BAD_ARGUMENT, &words);
    let forced = place.vmm("trace report linux --symbols other.map --kaslr-offset 0");
    assert_eq!(forced.status.code(), Some(0), "{}", text(&forced.stderr));
}

/// `arguments` as an ordinary user who may use /dev/kvm, or, with `hidden`, as root where tracefs is not mounted.
fn elsewhere(place: &Place, arguments: &str, hidden: bool) -> Command {
    let program = env!("CARGO_BIN_EXE_vmm");
    let mut command = if hidden {
        let mut command = Command::new("unshare");
        let script = format!(
            "umount -l /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug 2>/dev/null; \
                              mount -t tmpfs none /sys && exec {program} {arguments}"
        );
        command.args(["--mount", "sh", "-c", &script]);
        command
    } else {
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace()).uid(65534).gid(65534);
        command
    };
    place.set_up(&mut command);
    command
}

#[test]
fn a_host_that_does_not_show_exits_inside_kvm_is_told_and_the_rest_recorded() {
    const NAME: &str = "a_host_that_does_not_show_exits_inside_kvm_is_told_and_the_rest_recorded";
    // SAFETY: no arguments, cannot fail.
    if !has_kvm(NAME) || unsafe { libc::geteuid() } != 0 {
        eprintln!("SKIP: {NAME}: needs root, to become somebody else and to hide tracefs");
        return;
    }
    let place = place();
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mode = fs::metadata("/dev/kvm").unwrap().permissions().mode();
    for hidden in [true, false] {
        if !hidden && mode & 0o006 != 0o006 {
            eprintln!("NOT TRIED: {NAME} as an ordinary user: /dev/kvm is root's here (mode {mode:o})");
            continue;
        }
        let record = format!("record-{hidden}");
        let mut command = elsewhere(&place, &format!("--trace {record} {RUN}"), hidden);
        if !hidden {
            // The runtime directory must be the user's own.
            command.env("XDG_RUNTIME_DIR", place.path("own"));
            fs::create_dir(place.path("own")).unwrap();
            std::os::unix::fs::chown(place.path("own"), Some(65534), Some(65534)).unwrap();
            fs::set_permissions(place.path("own"), fs::Permissions::from_mode(0o700)).unwrap();
        }
        let run = finish(command.spawn().unwrap());
        assert_eq!((run.status.code(), text(&run.stdout).as_str()), (Some(1), "Hi"), "{}", text(&run.stderr));
        let stats = text(&place.vmm(&format!("trace report {record} --stats")).stdout);
        assert!(stats.contains("5 exits reached the monitor"), "{stats}");
        let said = stats.lines().find(|line| line.starts_with("exits inside KVM: ")).unwrap();
        assert!(said.contains("not recorded: "), "{said}");
        let why = if hidden { "no tracefs" } else { "ermission denied" };
        assert!(said.contains(why) || said.contains("no tracefs"), "{said}");
    }
}

#[test]
fn a_record_that_finds_no_room_fails_loudly() {
    if !has_kvm("a_record_that_finds_no_room_fails_loudly") {
        return;
    }
    let output = place().vmm(&format!("--trace /dev/full {RUN}"));
    let error = text(&output.stderr);
    assert!(output.status.code() == Some(HOST) && error.contains("/dev/full"), "{:?} {error}", output.status);
}
