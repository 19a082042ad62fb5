//! The trace of a distribution's kernel: names of functions with KASLR on and no file of symbols, held against what the guest
//! itself says of them; and as many exits as KVM counted. Of a kernel that goes on from a snapshot: who touched which memory first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::guest::{Guest, Kernel, available, vmm};
use crate::snapshot::{await_running, exec};

/// `vmm trace report FILE` with `arguments`.
fn report(record: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    let output = command.args(["trace", "report"]).arg(record).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn a_stock_kernel_has_its_own_names_and_as_many_exits_as_kvm_counted() {
    if !available("stock trace") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("record");
    // What is code, in the kernel itself: the same that the trace is to name. By a disk, as a console would take minutes.
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; 8 << 20]).unwrap();
    let script = "grep -e ' [tTwW] ' /proc/kallsyms >/k; dd if=/k of=/dev/vda bs=256k conv=fsync 2>/dev/null";
    let mut command = vmm(Kernel::Stock, script);
    command.args(["--mem", "512M", "--disk"]).arg(&disk).arg("--trace").arg(&record);
    let ended = Guest::start(command).finish();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    // That of another run, which is not over yet, may be there.
    let instances = fs::read_dir("/sys/kernel/tracing/instances").unwrap();
    let names = instances.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pid = |name: &str| name.strip_prefix("vmm-")?.split('-').nth(1).map(str::to_owned);
    let left: Vec<_> =
        names.filter(|name| pid(name).is_some_and(|pid| !Path::new("/proc").join(pid).exists())).collect();
    assert!(left.is_empty(), "{left:?}");
    let list = String::from_utf8(fs::read(&disk).unwrap()).unwrap();
    let mut theirs: BTreeMap<u64, BTreeSet<&str>> = BTreeMap::new();
    for line in list.trim_end_matches('\0').lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let [address, _, name, ..] = words[..] else { panic!("{line:?}") };
        theirs.entry(hex(address)).or_default().insert(name);
    }
    assert!(theirs.len() > 10_000, "{}", theirs.len());
    let (start, _) = theirs.iter().find(|(_, names)| names.contains("_stext")).unwrap();
    let moved = start - 0xffff_ffff_8100_0000;
    println!("the kernel was moved by {moved:#x}");

    let exits = objects(&report(&record, &["--json", "--only", "pio,mmio"]));
    let last = exits.last().unwrap()["ns"].as_f64().unwrap() / 1e6;
    let late = format!("{:.0}", last - 3000.0);
    let inside = objects(&report(&record, &["--json", "--only", "kvm", "--after", &late]));
    let mut agreed = BTreeSet::new();
    for exit in exits.iter().chain(&inside) {
        let Some((name, offset)) = exit["symbol"].as_str().and_then(|symbol| symbol.rsplit_once('+')) else {
            continue;
        };
        let (rip, offset) = (hex(exit["rip"].as_str().unwrap()), hex(offset));
        let (address, names) = theirs.range(..=rip).next_back().unwrap();
        assert!(
            *address == rip - offset && names.contains(name),
            "{rip:#x} is {name}+{offset:#x}: {names:?}"
        );
        agreed.insert(name);
    }
    println!("{} functions have the guest's own names: {agreed:?}", agreed.len());
    assert!(agreed.len() >= 10, "{agreed:?}");
    assert!(agreed.contains("read_pci_config_16"), "among those that reach the monitor: {agreed:?}");
    assert!(agreed.contains("vm_notify"), "of a module: {agreed:?}");

    // KVM's counters are kept without the trace's help.
    let stats = report(&record, &["--stats"]);
    let counted = |what: &str| -> u64 {
        let (_, counters) = stats.split_once("KVM's own count, vcpu0: ").expect("KVM's counters");
        let words = counters.lines().next().unwrap().split(", ");
        words
            .filter_map(|part| part.split_once(' '))
            .find(|(name, _)| *name == what)
            .unwrap()
            .1
            .parse()
            .unwrap()
    };
    let lost: u64 = stats
        .lines()
        .filter_map(|line| line.split_once(" events were lost")?.0.split_once(": ")?.1.parse::<u64>().ok())
        .sum();
    let json: Value = serde_json::from_str(&report(&record, &["--stats", "--json"])).unwrap();
    let recorded = |table: &str, names: &[&str]| -> u64 {
        let rows = json[table].as_array().unwrap().iter();
        let wanted = rows.filter(|row| names.is_empty() || names.contains(&row["name"].as_str().unwrap()));
        wanted.map(|row| row["count"].as_u64().unwrap()).sum()
    };
    let monitor = recorded("reasons", &[]);
    for (what, counted, recorded) in [
        ("port I/O", counted("io_exits"), recorded("reasons", &["in", "out"])),
        ("MMIO", counted("mmio_exits"), recorded("reasons", &["mmio read", "mmio write"])),
        ("all", counted("exits"), monitor + recorded("in_kernel", &[])),
    ] {
        println!("{what}: KVM counted {counted}, recorded {recorded}, lost {lost}");
        assert!(recorded <= counted && counted - recorded <= lost, "{what}\n{stats}");
    }
}

/// What `record` says of memory that was touched first, of a machine that goes on and has read its disk. Functions have their own
/// names, and so have devices.
#[track_caller]
fn told_first_touches(record: &Path) {
    let text = report(record, &["--stats"]);
    println!("{text}");
    for words in ["saved memory: the guest wrote to", "first touches of guest memory: ", "state "] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let stats: Value = serde_json::from_str(&report(record, &["--stats", "--json"])).unwrap();
    let touches = &stats["first_touches"];
    let rows = |table: &str| touches[table].as_array().unwrap().clone();
    let sum = |rows: &[Value], what: &str| rows.iter().filter_map(|row| row[what].as_u64()).sum::<u64>();
    let (faults, pages) = (touches["faults"].as_u64().unwrap(), touches["pages"].as_u64().unwrap());
    let (ranges, by) = (rows("ranges"), rows("by"));
    assert!(faults >= 100 && pages >= 100, "{touches}");
    assert!(sum(&ranges, "faults") <= faults && sum(&by, "faults") <= faults, "{touches}");
    assert!(sum(&ranges, "pages") <= pages, "{touches}");
    // What the guest's programs touch has no name. Devices touch little: their rows come late.
    let names: BTreeSet<_> = by.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(names.iter().filter(|name| !name.contains(' ')).count() >= 3, "{names:?}");
    assert!(names.iter().any(|name| name.starts_with("monitor: virtio-")), "{names:?}");
}

#[test]
fn a_restored_and_a_forked_kernel_have_their_first_touches_by_page_and_by_whom() {
    if !available("a_restored_and_a_forked_kernel_have_their_first_touches_by_page_and_by_whom") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![7; 16 << 20]).unwrap();
    let mut command = vmm(Kernel::Stock, "echo up; until [ -e /tmp/end ]; do sleep 1; done");
    command.args(["--name", "web", "--vsock", "--mem", "256M", "--disk"]);
    command.arg(format!("path={},readonly", disk.display()));
    let web = Guest::start(command);
    web.wait_for("up", 1);
    let (saved, state) = (dir.path().join("saved"), dir.path().join("state"));
    assert_eq!(web.control(&["snapshot", "create", "web", saved.to_str().unwrap()]).0, Some(0));
    // More than the guest has of it in memory, to places that are free there.
    let read = "dd if=/dev/vda of=/dev/null bs=64k";

    let record = dir.path().join("restored");
    let mut command = web.command(&["restore", saved.to_str().unwrap(), "--name", "next", "--trace"]);
    command.arg(&record).stdin(Stdio::null());
    let next = Guest::start_in(command, web.runtime());
    await_running(&web, &next, "next");
    exec(&web, "next", read);
    // Of one that is killed the names are not looked for as long as it takes here.
    exec(&web, "next", "touch /tmp/end");
    next.finish();
    told_first_touches(&record);

    let record = dir.path().join("forked");
    let mut command = web.command(&["fork", "web", "--name", "copy", "--trace"]);
    let forked = command.arg(&record).env("XDG_STATE_HOME", &state).output().unwrap();
    assert_eq!(forked.status.code(), Some(0), "{}", String::from_utf8_lossy(&forked.stderr));
    exec(&web, "copy", read);
    exec(&web, "copy", "touch /tmp/end");
    let mut wait = web.command(&["wait", "copy"]);
    wait.env("XDG_STATE_HOME", &state).output().unwrap();
    told_first_touches(&record);
}
