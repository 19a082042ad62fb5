//! Machines whose memory is of huge pages (`--mem SIZE,hugepages=2M`): saved, restored, forked, and where the host has no more of them.

use std::fs::{self, File};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::counting::*;
use crate::images::*;
use crate::memory_ways::{FULL, blocks, memory};
use crate::place::*;
use crate::pool::World;
use crate::working_set::{TURNS, is_one_turn};

/// The kernel's folder of pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Those of a machine with 32 MiB.
const EACH: u64 = 16;
const HUGE: &str = "--mem 32M,hugepages=2M";

fn count(what: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{what}")).unwrap_or_default().trim().parse().unwrap_or(0)
}

/// Huge pages that the host has set aside while this lives. Nobody else changes how many there are: other tests wait.
struct HugePages {
    before: u64,
    _lock: File,
}

impl HugePages {
    /// As many as `machines` of 32 MiB take, and none beside those that somebody has already. Says so where the host gives none.
    fn of(test: &str, machines: u64) -> Option<Self> {
        if !has_kvm(test) {
            return None;
        }
        let reserve = || {
            let lock = File::options().write(true).open(format!("{POOL}/nr_hugepages"))?;
            flock(&lock, FlockOperation::LockExclusive)?;
            let pages = Self { before: count("nr_hugepages"), _lock: lock };
            let used = pages.before + count("resv_hugepages") - count("free_hugepages");
            pages.set(used + machines * EACH)?;
            match free() {
                free if free == machines * EACH => Ok(pages),
                free => Err(io::Error::other(format!("{free} are free"))),
            }
        };
        reserve()
            .inspect_err(|error| eprintln!("SKIP: {test}: wants root's right to reserve huge pages: {error}"))
            .ok()
    }

    fn set(&self, pages: u64) -> io::Result<()> {
        fs::write(format!("{POOL}/nr_hugepages"), pages.to_string())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = self.set(self.before);
    }
}

/// Huge pages that a machine could have.
fn free() -> u64 {
    count("free_hugepages") - count("resv_hugepages")
}

/// Those who had the others have ended, which takes its time.
#[track_caller]
fn await_free(machines: u64) {
    let deadline = Instant::now() + PATIENCE;
    while free() != machines * EACH {
        assert!(Instant::now() < deadline, "{} pages are free", free());
        thread::sleep(Duration::from_millis(5));
    }
}

/// A place with a machine `v` of huge pages that counts and whose memory is in use.
fn full(more: &str) -> (World, Running) {
    let place = World(Place::new());
    place.file("count", kernel(&[&FULL[..], &COUNTING].concat()));
    let command = format!("--kernel count {HUGE}{more} --serial file=said --console off --name v");
    let guest = Running::new(place.command(&command));
    await_words(&place, "said", 3);
    (place, guest)
}

/// What the guest `name` has said in the background, once that is a few characters.
fn await_log(place: &Place, name: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = place.done(&format!("logs {name}"));
        if said.len() >= 3 {
            return said;
        }
        assert!(Instant::now() < deadline, "{name}: {said}");
    }
}

#[test]
fn a_machine_of_huge_pages_is_saved_and_goes_on_in_huge_pages_or_in_others() {
    let name = "a_machine_of_huge_pages_is_saved_and_goes_on_in_huge_pages_or_in_others";
    let Some(_pages) = HugePages::of(name, 2) else { return };
    for backing in ["", ",backing=memfd"] {
        let (place, guest) = full(backing);
        await_free(1);
        for command in
            ["plain", "packed --compress", "over --base packed", "packed-over --compress --base plain"]
        {
            place.done(&format!("snapshot create v {command}"));
        }
        let said = fs::read_to_string(place.path("said")).unwrap();
        let said = await_words(&place, "said", said.len() + 3);
        assert!(is_counted(&said), "it goes on: {said}");
        drop(guest);
        await_free(2);
        // 8 MiB are in use, and tables; and what is zero is a hole.
        assert!((16 << 10..20 << 10).contains(&blocks(&place, "plain")), "{}", blocks(&place, "plain"));
        assert!(4 * blocks(&place, "packed") < blocks(&place, "plain"));
        assert!(blocks(&place, "packed-over") <= blocks(&place, "packed"));
        let expected = memory(&place, "plain");
        for saved in ["plain", "packed", "over", "packed-over"] {
            place.done(&format!("snapshot verify {saved}"));
            // As it was; copied, said in words; in a memfd; in pages of the usual size.
            let ways = ["", "--memory copy", "--mem 32M,hugepages=2M,backing=memfd", "--mem 32M"];
            for (index, way) in ways.iter().enumerate() {
                let run = format!("{saved}-{index}");
                let restored = format!("restore {saved} {way} --serial file={run} --name {run}");
                let restored = Running::new(place.command(&restored));
                assert!(is_counted(&await_words(&place, &run, 3)), "{run}");
                await_free(if *way == "--mem 32M" { 2 } else { 1 });
                place.done(&format!("snapshot create --stop {run} {run}.snap --base {saved}"));
                restored.finish();
                place.done(&format!("fork ./{run}.snap --name copy --mem 32M"));
                assert!(is_counted(&await_log(&place, "copy")), "{run}");
                place.done("snapshot create copy copied");
                place.done("kill copy");
                assert!(memory(&place, "copied") == expected, "{run}");
                place.done(&format!("snapshot rm copied {run}.snap"));
                await_free(2);
            }
        }
    }
}

#[test]
fn a_machine_of_other_pages_goes_on_in_huge_ones() {
    let Some(_pages) = HugePages::of("a_machine_of_other_pages_goes_on_in_huge_ones", 1) else { return };
    let (place, guest) = speaking(&[&FULL[..], &COUNTING].concat(), "");
    place.done("snapshot create v s");
    drop(guest);
    let restored = Running::new(place.command(&format!("restore s {HUGE} --serial file=more --name w")));
    assert!(is_counted(&await_words(&place, "more", 3)));
    await_free(0);
    // Which of its huge pages a guest touches first is of no use to anybody.
    thread::sleep(Duration::from_millis(1300));
    assert!(!place.path("s/working-set").exists());
    place.done("snapshot create --stop w t");
    restored.finish();
    assert!(memory(&place, "t") == memory(&place, "s"));
    // It is told as it is: those who go on from it do so in huge pages.
    assert!(
        place.done("snapshot show t").contains(r#""hugepages": "2M""#),
        "{}",
        place.done("snapshot show t")
    );
}

#[test]
fn memory_of_huge_pages_takes_no_other_way_than_a_copy_and_is_as_long_as_it_was() {
    let name = "memory_of_huge_pages_takes_no_other_way_than_a_copy_and_is_as_long_as_it_was";
    let Some(_pages) = HugePages::of(name, 1) else { return };
    let (place, guest) = full("");
    place.done("snapshot create v plain");
    place.done("snapshot create v packed --compress");
    drop(guest);
    await_free(1);
    for saved in ["plain", "packed"] {
        for way in ["map", "lazy"] {
            let said = place.fails(&format!("restore {saved} --memory {way}"), BAD_ARGUMENT);
            assert!(said.contains("huge pages can only be filled by a copy"), "{said}");
            assert!(said.contains("--memory copy") && said.contains("--mem 32M"), "{said}");
        }
        for other in ["16M,hugepages=2M", "16M", "64M"] {
            for way in ["auto", "copy"] {
                let said =
                    place.fails(&format!("restore {saved} --mem {other} --memory {way}"), BAD_ARGUMENT);
                assert!(said.contains("the saved memory has 32M") && said.contains("--mem 32M"), "{said}");
            }
        }
    }
    await_free(1);
}

/// A copy of a page on its way into the file would be taken from the child that writes it.
#[test]
fn a_machine_that_has_the_hosts_last_huge_pages_is_saved_as_it_was_at_one_moment() {
    let name = "a_machine_that_has_the_hosts_last_huge_pages_is_saved_as_it_was_at_one_moment";
    let Some(_pages) = HugePages::of(name, 1) else { return };
    let place = Place::new();
    place.file("turns", kernel(&TURNS));
    let guest = format!("--kernel turns {HUGE} --console off --serial file=said --name v");
    let _guest = Running::new(place.command(&guest));
    await_words(&place, "said", 2);
    await_free(0);
    for (index, how) in ["", "--compress", "--base s0"].into_iter().enumerate() {
        place.done(&format!("snapshot create v s{index} {how}"));
        place.done(&format!("snapshot verify s{index}"));
        let turns = fs::metadata(place.path("said")).unwrap().len() as usize;
        await_words(&place, "said", turns + 2);
    }
    assert!(is_one_turn(&place, "s0"));
    // The copy is of a process without huge pages; what is zero there was so here.
    for saved in ["s1", "s2"] {
        place.done(&format!("fork ./{saved} --mem 32M --name copy"));
        place.done(&format!("snapshot create --stop copy {saved}.copy"));
        assert!(is_one_turn(&place, &format!("{saved}.copy")), "{saved}");
    }
}

#[test]
fn too_few_huge_pages_are_told_and_nothing_is_left_behind() {
    let Some(_pages) = HugePages::of("too_few_huge_pages_are_told_and_nothing_is_left_behind", 2) else {
        return;
    };
    let (place, _guest) = full("");
    place.done("snapshot create v s");
    place.done("snapshot create v packed --compress");
    let restored = Running::new(place.command("restore s --serial file=more --name w"));
    await_words(&place, "more", 3);
    await_free(0);
    // What they say would be a change.
    place.done("pause v w");
    let all = count("nr_hugepages");
    for restore in ["restore s", "restore packed", "restore s --mem 32M,hugepages=2M,backing=memfd"] {
        refused(&place, restore, HOST, &["cannot map 32M of guest memory", ", 2 MiB huge pages"]);
        let said = place.fails(restore, HOST);
        let pool = format!("16 huge pages must be free: echo {} | sudo tee {POOL}/nr_hugepages", all + EACH);
        assert!(said.trim_end().ends_with(&pool), "{said}");
    }
    place.done("resume v");
    place.done("kill w");
    restored.finish();
    await_free(1);
    // One that there are pages for runs, and the one that there are none for says so.
    let output = place.vmm("fork v --count 2");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(HOST), "{said}");
    assert_eq!(text(&output.stdout).lines().count(), 1, "{said}");
    assert!(
        said.contains("cannot map 32M of guest memory") && said.contains("huge pages must be free"),
        "{said}"
    );
    assert_eq!(fs::read_dir(place.path("run/vmm")).unwrap().count(), 2);
}

#[test]
fn copies_of_a_machine_of_huge_pages_have_their_own_and_none_of_what_they_were_copied_from() {
    let name = "copies_of_a_machine_of_huge_pages_have_their_own_and_none_of_what_they_were_copied_from";
    let Some(_pages) = HugePages::of(name, 4) else { return };
    let (place, first) = full("");
    assert_eq!(place.done("fork v --count 2"), "v-1\nv-2\n");
    await_free(1);
    drop(first);
    for copy in ["v-1", "v-2"] {
        assert!(is_counted(&await_log(&place, copy)), "{copy}");
        let files = format!("/proc/{}/fd", place.status(copy)["pid"]);
        let files = fs::read_dir(files).unwrap().filter_map(|file| fs::read_link(file.unwrap().path()).ok());
        let files: Vec<_> = files.map(|file| file.display().to_string()).collect();
        assert!(!files.iter().any(|file| file.contains("memfd:memory")), "{files:?}");
    }
    // A copy of a copy; one that is on its host's other pages shares what it does not write to.
    assert_eq!(place.done("fork v-1 --name again"), "again\n");
    assert_eq!(place.done("fork v-1 --name other --mem 32M"), "other\n");
    assert!(is_counted(&await_log(&place, "again")) && is_counted(&await_log(&place, "other")));
    place.done("kill v-1 again other");
    await_free(3);

    // A pool: what stands ready has its pages.
    assert_eq!(place.done("pool start web v-2 --size 1"), "web\n");
    await_free(2);
    let pools: serde_json::Value = serde_json::from_str(&place.done("pool list --json")).unwrap();
    assert!(pools[0]["private_bytes"].as_u64().unwrap() > 8 << 20, "{pools}");
    assert_eq!(place.done("pool take web"), "web-1\n");
    assert!(is_counted(&await_log(&place, "web-1")));
    await_free(1);
    place.done("pool stop web");
    place.done("kill v-2 web-1");
    await_free(4);
}

#[test]
fn a_template_of_a_machine_of_huge_pages_is_gone_on_from() {
    let Some(_pages) = HugePages::of("a_template_of_a_machine_of_huge_pages_is_gone_on_from", 1) else {
        return;
    };
    let place = Place::new();
    place.file("ready", crate::template::readying(1));
    let run = |name: &str| {
        let run = format!("run --template --kernel ready {HUGE} --boot-marks --console off");
        Running::new(place.command(&format!("{run} --serial file={name} --name {name}")))
    };
    let first = run("one");
    assert!(await_words(&place, "one", 5).starts_with('!'));
    crate::template::await_templates(&place, 1);
    drop(first);
    await_free(1);
    let _second = run("two");
    assert!(is_counted(&await_words(&place, "two", 5)), "it has not booted");
    await_free(0);
}
