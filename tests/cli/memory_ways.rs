//! `vmm snapshot create --compress` and `vmm restore --memory`: whichever way memory takes, the machine is the same.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::process::Signal;

use crate::counting::*;
use crate::fuse::Fuse;
use crate::images::*;
use crate::place::*;

const WAYS: [&str; 4] = ["auto", "map", "copy", "lazy"];

/// Writes its number to the start of each page from 2 to 10 MiB, and then counts aloud as [`COUNTING`] does.
pub const FULL: [u8; 21] = [
    0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x89, 0x3f, // mov [edi], edi
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0xa0, 0x00, // cmp edi, 0xa00000
    0x72, 0xf0, // jb to the mov to [edi]
];

/// A place with a machine `v` that counts and whose memory is in use.
fn full() -> (Place, Running) {
    speaking(&[&FULL[..], &COUNTING].concat(), "")
}

pub fn blocks(place: &Place, name: &str) -> u64 {
    fs::metadata(place.path(name).join("memory")).unwrap().blocks()
}

/// The memory of snapshot `name`, but for the generation ID, which each restored machine has of its own.
pub fn memory(place: &Place, name: &str) -> Vec<u8> {
    let mut memory = fs::read(place.path(name).join("memory")).unwrap();
    memory[0xe_0030..0xe_0040].fill(0);
    memory
}

#[test]
fn a_machine_is_the_same_whichever_way_its_memory_takes() {
    if !has_kvm("a_machine_is_the_same_whichever_way_its_memory_takes") {
        return;
    }
    let (place, guest) = full();
    for command in ["plain", "packed --compress", "over --base packed", "packed-over --compress --base plain"]
    {
        place.done(&format!("snapshot create v {command}"));
    }
    drop(guest);
    assert!(4 * blocks(&place, "packed") < blocks(&place, "plain"));
    assert!(blocks(&place, "packed-over") <= blocks(&place, "packed"));
    let expected = memory(&place, "plain");
    for name in ["plain", "packed", "over", "packed-over"] {
        place.done(&format!("snapshot verify {name}"));
        for way in WAYS {
            let run = format!("{name}-{way}");
            let command = format!("restore {name} --memory {way} --serial file={run} --name {run}");
            if way == "map" && name != "plain" {
                let said = place.fails(&command, BAD_ARGUMENT);
                assert!(
                    said.contains("compressed memory cannot be mapped") && said.contains("--memory map"),
                    "{said}"
                );
                continue;
            }
            let restored = Running::new(place.command(&command));
            assert!(is_counted(&await_words(&place, &run, 3)), "{run}");
            // It can be saved in each way, and copied.
            place.done(&format!("snapshot create {run} {run}.again --compress --base plain"));
            place.done(&format!("snapshot create {run} {run}.snap"));
            place.done(&format!("fork {run} --name copy"));
            while place.done("logs copy").len() < 3 {}
            assert!(is_counted(&place.done("logs copy")), "{run}");
            place.done("kill copy");
            place.done(&format!("snapshot create --stop {run} {run}.last --compress"));
            restored.finish();
            assert!(memory(&place, &format!("{run}.snap")) == expected, "{run}");
            place.done(&format!("snapshot verify {run}.again"));
            let said = format!("{run}-last");
            let _next =
                Running::new(place.command(&format!("restore {run}.last --serial file={said} --name n")));
            assert!(is_counted(&await_words(&place, &said, 3)), "{said}");
            for saved in ["again", "snap", "last"] {
                place.done(&format!("snapshot rm --force {run}.{saved}"));
            }
        }
        place.done(&format!("fork ./{name} --name copy"));
        while place.done("logs copy").len() < 3 {}
        place.done("snapshot create copy copied");
        place.done("kill copy");
        assert!(memory(&place, "copied") == expected, "{name}");
        place.done("snapshot rm copied");
    }
}

#[test]
fn memory_that_comes_page_by_page_and_cannot_be_read_any_more_ends_the_machine() {
    let name = "memory_that_comes_page_by_page_and_cannot_be_read_any_more_ends_the_machine";
    if !has_kvm(name) {
        return;
    }
    for (compress, why) in [("", "it was cut short: 32 bytes are left"), ("--compress", "it was cut short")] {
        let place = Place::new();
        // Reads what nobody has touched, as long as it counts.
        place.file("kernel", kernel(&[&FULL[..], &crate::lost::READING].concat()));
        let command = "--kernel kernel --mem 32M --serial file=said --console off --name v";
        let guest = Running::new(place.command(command));
        await_words(&place, "said", 3);
        place.done(&format!("snapshot create v s {compress}"));
        drop(guest);
        let restored = Running::new(place.command("restore s --memory lazy --serial file=more --name w"));
        await_words(&place, "more", 3);
        File::options().write(true).open(place.path("s/memory")).unwrap().set_len(32).unwrap();
        let output = restored.finish();
        let said = text(&output.stderr);
        assert!(said.starts_with("vmm: error: the guest's memory is lost: ") && said.contains(why), "{said}");
        assert!(said.contains("s/memory") && said.lines().count() == 2, "{said}");
        assert_eq!(output.status.code(), Some(HOST));
    }
}

#[test]
fn compressed_memory_that_is_damaged_is_told_before_the_machine_or_by_its_end() {
    if !has_kvm("compressed_memory_that_is_damaged_is_told_before_the_machine_or_by_its_end") {
        return;
    }
    let (place, guest) = full();
    place.done("snapshot create v s --compress");
    drop(guest);
    let file = File::options().read(true).write(true).open(place.path("s/memory")).unwrap();
    let len = file.metadata().unwrap().len();
    let mut whole = vec![0; len as usize];
    file.read_exact_at(&mut whole, 0).unwrap();
    // A byte of each part: the head, a piece, the index.
    for (at, why) in [(3, "not compressed memory"), (len / 2, "piece"), (len - 9, "checksum of its index")] {
        file.write_all_at(&[!whole[at as usize]], at).unwrap();
        let said = place.fails("snapshot verify s", BAD_ARGUMENT);
        assert!(said.contains("s/memory: ") && said.contains(why), "{said}");
        let code = if why == "piece" { HOST } else { BAD_ARGUMENT };
        let said = place.fails("restore s --memory copy --serial file=more", code);
        assert!(said.contains("s/memory") && said.contains(why), "{said}");
        let said = place.fails("fork ./s --name f", BAD_ARGUMENT);
        assert!(said.contains("s/memory") && said.contains(why), "{said}");
        file.write_all_at(&[whole[at as usize]], at).unwrap();
    }
    place.done("snapshot verify s");
    file.set_len(len - 1).unwrap();
    assert!(place.fails("restore s", BAD_ARGUMENT).contains("s/memory: cut short"));
}

#[test]
fn a_process_that_may_not_serve_memory_page_by_page_says_so_or_copies_it() {
    let name = "a_process_that_may_not_serve_memory_page_by_page_says_so_or_copies_it";
    if !has_kvm(name) {
        return;
    }
    let (place, guest) = full();
    place.done("snapshot create v s --compress");
    drop(guest);
    // Without the capability, and with another device under the name of the one that would do instead.
    let without = "mount --bind /dev/null /dev/userfaultfd && exec setpriv --bounding-set=-sys_ptrace --inh-caps=-all -- \"$@\"";
    let hidden = |arguments: &str| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", without, "sh"]).args(arguments.split(' '));
        place.set_up(&mut command);
        command
    };
    let may_hide = hidden("true").stdin(Stdio::null()).status().is_ok_and(|status| status.success());
    let is_open =
        fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|text| text.trim() == "1");
    if !may_hide || is_open {
        eprintln!("SKIP: {name}: wants root's right to mount, and vm.unprivileged_userfaultfd=0");
        return;
    }
    let run = |way: &str| {
        hidden(&format!("{} restore s --memory {way} --serial file={way} --name {way}", crate::PROGRAM))
    };
    let output = finish(run("lazy").spawn().unwrap());
    let said = text(&output.stderr);
    assert!(said.contains("(userfaultfd)") && said.contains("--memory copy"), "{said}");
    assert_eq!(output.status.code(), Some(HOST), "{said}");
    let _copied = Running::new(run("auto"));
    assert!(is_counted(&await_words(&place, "auto", 3)));
}

#[test]
fn a_restore_that_reads_all_memory_is_ended_by_whoever_wants_that() {
    if !has_kvm("a_restore_that_reads_all_memory_is_ended_by_whoever_wants_that") {
        return;
    }
    let place = Place::new();
    place.file("count", kernel(&COUNTING));
    let guest =
        Running::new(place.command("--kernel count --mem 1G --serial file=said --console off --name v"));
    await_words(&place, "said", 3);
    place.done("snapshot create v s");
    drop(guest);
    // Some 20 s of reading.
    fs::create_dir(place.path("slow")).unwrap();
    let _slow = match Fuse::mount(&place.path("slow"), 1 << 30) {
        Ok(mounted) => mounted,
        Err(error) => {
            eprintln!(
                "SKIP: a_restore_that_reads_all_memory_is_ended_by_whoever_wants_that: wants /dev/fuse and CAP_SYS_ADMIN: {error}"
            );
            return;
        }
    };
    mount_bind(place.path("slow/disk"), place.path("s/memory")).unwrap();
    for order in ["kill", "signal"] {
        let mut restore = Running::new(place.command("restore s --memory copy --serial file=again --name c"));
        while place.status("c")["state"] != "starting" {
            assert!(restore.child().try_wait().unwrap().is_none(), "it has ended");
        }
        let begun = Instant::now();
        match order {
            "kill" => _ = place.done("kill c"),
            _ => restore.signal(Signal::HUP),
        }
        let status = wait(restore.child());
        assert_eq!(status.code(), Some(KILLED), "{order}");
        assert!(begun.elapsed() < Duration::from_secs(8), "{order}: {:?}", begun.elapsed());
    }
    unmount(place.path("s/memory"), UnmountFlags::DETACH).unwrap();
}
