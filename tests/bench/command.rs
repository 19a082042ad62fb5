//! `vmm bench` as its user meets it: bad input, earlier results, another machine, a baseline, Ctrl-C.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use serde_json::Value;

use crate::SMALL;
use crate::place::*;

/// `bench --compare` found something worse.
const WORSE: i32 = 12;

fn result(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(text)))
}

#[test]
fn arguments_that_cannot_be() {
    let place = Place::new();
    place.file("good.json", SMALL);
    place.file("garbage", b"\0\xff\x80");
    place.file("words", "hello");
    place.file("other.json", "{\"command\": [], \"interrupted\": false}");
    place.file("null.json", SMALL.replacen("0.31", "null", 1));
    place.file("twice.json", SMALL.replacen("crun twin", "crun", 1));
    place.file("empty.json", "");
    fs::create_dir(place.path("folder")).unwrap();
    for (arguments, words) in [
        ("explode", &["explode", "boot", "scale"][..]),
        ("boot --samples 0", &["--samples", "0"]),
        ("boot --samples 10001", &["--samples", "10000"]),
        ("boot --samples some", &["--samples", "some"]),
        ("boot --warm-up -1", &["-1"]),
        ("boot --with crun", &["--with", "RIVAL=FILE"]),
        ("boot --with =words", &["--with", "RIVAL=FILE"]),
        ("boot --with crun=missing", &["missing", "No such file"]),
        ("boot --with crun=folder", &["folder", "not a file"]),
        ("boot --guests missing", &["missing", "No such file"]),
        ("boot --guests words", &["words", "not a directory"]),
        ("boot --json no/such/folder/x.json", &["no/such/folder"]),
        ("boot --html folder", &["folder"]),
        ("boot --csv words/x", &["words"]),
        ("boot --json - --csv -", &["two outputs"]),
        ("boot --json x --html x", &["x", "two outputs"]),
        ("boot --compare good.json", &["--compare", "repeatable"]),
        ("boot --icount --compare missing", &["missing", "No such file"]),
        ("--from missing.json", &["missing.json", "No such file"]),
        ("--from folder", &["folder", "not a regular file"]),
        ("--from /dev/zero", &["/dev/zero", "not a regular file"]),
        ("--from garbage", &["garbage", "UTF-8"]),
        ("--from words", &["words", "not a result"]),
        ("--from empty.json", &["empty.json", "not a result"]),
        ("--from other.json", &["other.json", "suites"]),
        ("--from null.json", &["null.json", "not a result"]),
        ("--from twice.json", &["twice.json", "crun"]),
        ("--from good.json --from missing.json", &["missing.json"]),
        ("--from good.json boot", &["--from"]),
        ("--from good.json --samples 3", &["--from"]),
        ("--list --icount", &["--list"]),
        ("--through", &["--through"]),
    ] {
        refused(&place, arguments, BAD_ARGUMENT, words);
    }
    let mut blank = place.command("boot --through");
    blank.arg("  ");
    refused_command(&place, blank, BAD_ARGUMENT, &["--through", "no command"]);
    // Paths need not be UTF-8.
    for (option, value) in [("--guests", &b"\xff"[..]), ("--with", b"crun=\xff")] {
        let mut missing = place.command("boot");
        missing.arg(option).arg(std::os::unix::ffi::OsStrExt::from_bytes(value) as &std::ffi::OsStr);
        refused_command(&place, missing, BAD_ARGUMENT, &[option, "No such file"]);
    }
}

#[test]
fn help_and_list_tell_what_there_is() {
    let place = Place::new();
    let help = text(&place.vmm("--help").stdout);
    for word in
        ["Examples:", "--through", "--compare", "--icount", "vmm bench --from", "12 more than 5% worse"]
    {
        assert!(help.contains(word), "{word}: {help}");
    }
    let list = text(&place.vmm("--list").stdout);
    let suites: Vec<_> = list.lines().filter_map(|line| line.split_once(' ')).map(|(name, _)| name).collect();
    assert_eq!(
        suites,
        [
            "boot",
            "fork",
            "steps",
            "memory",
            "image",
            "exits",
            "cpu",
            "mem",
            "block",
            "share",
            "net",
            "console",
            "scale",
            "neighbours"
        ]
    );
}

#[test]
fn idle_instances_are_weighed_alone_and_in_numbers() {
    let place = Place::new();
    // Without the rivals that may be installed here.
    let mut command = place.command("memory --samples 2 --instances 10 --json -");
    let run = result(&command.env("PATH", "").output().unwrap().stdout);
    let figures = run["suites"][0]["figures"].as_array().unwrap();
    let samples = |name: &str, who: &str| -> Vec<f64> {
        let figure = figures.iter().find(|figure| figure["name"] == name);
        let series = figure.and_then(|figure| figure["series"].as_array()).into_iter().flatten();
        let own =
            series.filter(|series| series["who"] == who).flat_map(|series| series["samples"].as_array());
        own.flatten().filter_map(Value::as_f64).collect()
    };
    let mut those = vec!["fork + exec"];
    let bare = "vmm, no Linux: 5 instructions";
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIP: idle VMs: this machine lacks /dev/kvm");
    } else if run["suites"][0]["contenders"].to_string().contains(bare) {
        those.push(bare);
    } else {
        eprintln!("SKIP: idle VMs: this KVM runs Linux, and there is no kernel at hand");
    }
    for who in those {
        let (one, ten) =
            (samples("processes: PSS, each of 1", who), samples("processes: PSS, each of 10", who));
        assert_eq!((one.len(), ten.len()), (2, 1), "{who}: {run:#}");
        // What they share counts once. The one page that processes of the bare program share is no more than what chance gives:
        // whether a stack that begins anywhere in a page reaches into a second.
        let lighter = if who == bare { ten[0] < one[0] } else { ten[0] <= one[0] };
        assert!(ten[0] > 0.0 && lighter, "{who}: {one:?} {ten:?}");
        // The first and nine more are what the ten are.
        let further = samples("processes: PSS, each further one of 10", who)[0];
        let first = (one[0] + one[1]) / 2.0;
        assert!((first + 9.0 * further - 10.0 * ten[0]).abs() < 0.01, "{who}: {one:?} {further} {ten:?}");
        // Of a further VM's weight most is what it has written.
        let own = samples("processes: anonymous, each of 10", who)[0];
        assert!(who != bare || (own > 100.0 && further > own / 2.0), "{who}: {own} {further}");
        let guest = samples("guest RAM resident, each of 10", who)[0];
        assert_eq!(guest > 0.0, who != "fork + exec", "{who}: {guest}");
    }
    let names = || figures.iter().filter_map(|figure| figure["name"].as_str());
    assert!(names().all(|name| !name.ends_with("of 50")), "{:?}", names().collect::<Vec<_>>());
}

#[test]
fn earlier_results_are_shown_and_put_together() {
    let place = Place::new();
    place.file("one.json", SMALL);
    place.file("two.json", SMALL.replace("AMD EPYC", "Another CPU"));
    let shown = place.vmm("--from one.json --json same.json --csv one.csv --html one.html");
    assert_eq!((shown.status.code(), text(&shown.stderr)), (Some(0), String::new()));
    assert!(text(&shown.stdout).contains("no difference shown ("), "{}", text(&shown.stdout));
    // Nothing of it is lost or changed, and the page is as good as the file.
    assert_eq!(result(&fs::read(place.path("same.json")).unwrap()), result(SMALL.as_bytes()));
    let from_page = place.vmm("--from one.html --json -");
    assert_eq!(result(&from_page.stdout), result(SMALL.as_bytes()));
    assert_eq!(fs::read_to_string(place.path("one.csv")).unwrap().lines().count(), 1 + 2 * 4 * 8);
    let both = result(&place.vmm("--from one.json --from two.json --json -").stdout);
    let hosts: Vec<_> =
        both["suites"].as_array().unwrap().iter().map(|suite| &suite["host"]["cpu"]).collect();
    assert_eq!(hosts, ["AMD EPYC", "Another CPU"]);
    // No temporary file stays.
    let names: Vec<_> =
        fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 6, "{names:?}");
}

#[test]
fn an_output_that_cannot_be_written_is_told_and_the_others_are_there() {
    let place = Place::new();
    place.file("one.json", SMALL);
    let output = place.vmm("--from one.json --csv /dev/full --html page.html");
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(HOST), "{stderr}");
    assert!(stderr.starts_with("vmm: error: cannot write /dev/full: "), "{stderr}");
    assert!(text(&output.stdout).contains("exec to first output") && place.path("page.html").exists());
}

#[test]
fn a_baseline_is_held() {
    let place = Place::new();
    let counted = SMALL.replace("\"repeatable_clock\": false", "\"repeatable_clock\": true");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut run = result(counted.as_bytes());
        change(&mut run);
        run.to_string()
    };
    let scaled = |by: f64| {
        with(&|run| {
            let samples = run["suites"][0]["figures"][1]["series"][3]["samples"].as_array_mut().unwrap();
            samples.iter_mut().for_each(|sample| *sample = (sample.as_f64().unwrap() * by).into());
        })
    };
    place.file("base.json", &counted);
    place.file("wall.json", SMALL);
    place.file("slower.json", scaled(1.5));
    place.file("faster.json", scaled(0.5));
    place.file("near.json", scaled(1.04));
    place.file(
        "gone.json",
        with(&|run| {
            run["suites"][0]["contenders"][1]["failure"] = "it broke".into();
            for figure in 0..2 {
                run["suites"][0]["figures"][figure]["baseline"] = "native".into();
                run["suites"][0]["figures"][figure]["series"].as_array_mut().unwrap().remove(1);
            }
        }),
    );
    for (now, code, words) in [
        ("base", 0, &["none of 8 medians is more than 5% worse than in base.json"][..]),
        ("near", 0, &["none of 8"]),
        (
            "faster",
            0,
            &["boot: exec to exit: vmm tuned: 50.0% better (8.22 ms, was 16.4)", "renew it", "none of 8"],
        ),
        (
            "slower",
            WORSE,
            &[
                "boot: exec to exit: vmm tuned: 50.0% worse (24.7 ms, was 16.4)",
                "vmm: error: worse than the baseline base.json: 1 of its figures",
            ],
        ),
        ("gone", WORSE, &["boot: exec to exit: crun: not measured any more: it broke", "2 of its figures"]),
        ("wall", BAD_ARGUMENT, &["suite boot of the result was not taken on a repeatable clock"]),
    ] {
        let output = place.vmm(&format!("--from {now}.json --compare base.json"));
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{now}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{now}: {words:?}: {stderr}");
        assert!(text(&output.stdout).contains("exec to first output"), "{now}");
    }
}

/// A program that takes the place of another machine: it is given the command line of a `vmm bench`.
fn machine(place: &Place, script: &str) -> String {
    place.file("machine", format!("#!/bin/sh\n{script}\n"));
    fs::set_permissions(place.path("machine"), fs::Permissions::from_mode(0o755)).unwrap();
    place.path("machine").display().to_string()
}

/// Whether this host would measure elsewhere at all.
fn needs_another_machine(test: &str) -> bool {
    let needs = !vmm_bench::host::Host::look(false).hardware_virtualization;
    if !needs {
        eprintln!("SKIP: {test}: needs a host without hardware virtualization, where --through is of use");
    }
    needs
}

#[test]
fn another_machine_measures_what_this_one_cannot() {
    if !needs_another_machine("another_machine_measures_what_this_one_cannot") {
        return;
    }
    let place = Place::new();
    place.file("there.json", SMALL.replace("AMD EPYC", "Another CPU"));
    fs::create_dir(place.path("guests")).unwrap();
    // Its arguments: quiet -- VMM-BENCH console --json FILE ...
    let script = "echo \"$@\" >arguments; cp there.json \"$6\"";
    let machine = machine(&place, script);
    let mut command =
        place.command("console --samples 2 --warm-up 0 --guests guests --json run.json --through");
    command.arg(format!("{machine}  quiet --"));
    command.args(["--with", &format!("crun={machine}")]);
    let output = finish(command.spawn().unwrap());
    let stderr = text(&output.stderr);
    let run = result(&fs::read(place.path("run.json")).unwrap());
    let suite = run["suites"].as_array().unwrap().last().unwrap();
    assert_eq!(suite["host"]["cpu"], "Another CPU", "{stderr}");
    let method = suite["method"].as_array().unwrap().last().unwrap();
    assert_eq!(*method, format!("Measured by: {machine} quiet -- vmm bench boot --samples 8"));
    assert!(stderr.contains(&format!("console (1 of 1) through {machine} quiet --")), "{stderr}");
    let arguments = fs::read_to_string(place.path("arguments")).unwrap();
    for words in [
        "quiet -- /",
        "vmm-bench console --json /",
        " --samples 2 --warm-up 0 --instances 100 --with crun=/",
        " --guests /",
    ] {
        assert!(arguments.contains(words), "{words}: {arguments}");
    }
}

#[test]
fn what_another_machine_says_of_its_failure_is_told() {
    if !needs_another_machine("what_another_machine_says_of_its_failure_is_told") {
        return;
    }
    let place = Place::new();
    for (script, words) in [
        ("echo no machine today >&2; exit 5", "exit status: 5): no machine today"),
        ("exit 0", "ended (exit status: 0) and said nothing"),
        ("echo garbage >\"$4\"; exit 0", "not a result of vmm bench"),
        ("kill -9 $$", "signal: 9"),
    ] {
        let mut command = place.command("console --samples 1 --warm-up 0 --through");
        command.arg(machine(&place, script));
        let output = finish(command.spawn().unwrap());
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(HOST), "{stderr}");
        assert!(
            stderr.contains("not measured: console, through another machine: ") && stderr.contains(words),
            "{stderr}"
        );
    }
    let mut command = place.command("console --samples 1 --warm-up 0 --through /no/such/machine");
    let output = finish(command.spawn().unwrap());
    assert!(text(&output.stderr).contains("start /no/such/machine: "), "{}", text(&output.stderr));
}

#[test]
fn an_interrupt_reaches_the_other_machine() {
    if !needs_another_machine("an_interrupt_reaches_the_other_machine") {
        return;
    }
    let place = Place::new();
    place.file("there.json", SMALL.replace("\"interrupted\": false", "\"interrupted\": true"));
    let script =
        "trap 'cp there.json \"$4\"; exit 10' INT\necho it runs >&2; touch running\nsleep 1000 & wait";
    let mut command = place.command("console --samples 1 --warm-up 0 --json run.json --through");
    command.arg(machine(&place, script));
    let child = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !place.path("running").exists() {
        assert!(Instant::now() < deadline, "the other machine is not started");
        thread::sleep(Duration::from_millis(10));
    }
    kill_process(Pid::from_raw(child.id() as i32).unwrap(), Signal::INT).unwrap();
    let output = finish(child);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(KILLED), "{stderr}");
    let run = result(&fs::read(place.path("run.json")).unwrap());
    assert_eq!(run["interrupted"], true);
    // What it had measured by then is there.
    assert_eq!(run["suites"].as_array().unwrap().last().unwrap()["name"], "boot", "{stderr}");
}

#[test]
fn an_interrupt_shows_what_there_is() {
    let place = Place::new();
    // More than can be done while this waits.
    let mut command = place.command("boot --samples 10000 --warm-up 0 --json run.json");
    let (mut terminal, other_end) = terminal();
    let child = command.stderr(other_end).spawn().unwrap();
    // It keeps the other end open.
    drop(command);
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    let (sender, pieces) = mpsc::channel();
    thread::spawn(move || {
        let mut piece = [0; 4096];
        // A terminal whose other end nobody has open any more is an error to read from.
        while let Ok(length @ 1..) = terminal.read(&mut piece) {
            if sender.send(text(&piece[..length])).is_err() {
                break;
            }
        }
    });
    let mut stderr = String::new();
    let mut interrupted = false;
    while let Ok(piece) = pieces.recv_timeout(PATIENCE) {
        stderr.push_str(&piece);
        if !interrupted && begun_twice(&stderr) {
            kill_process(pid, Signal::INT).unwrap();
            interrupted = true;
        }
    }
    let output = finish(child);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(KILLED), "{stdout}{stderr}");
    assert!(stderr.contains("interrupted; showing what there is") && !stderr.contains("error"), "{stderr}");
    assert!(stdout.ends_with("interrupted: fewer samples than asked for\n"), "{stdout}");
    let run = result(&fs::read(place.path("run.json")).unwrap());
    assert_eq!(run["interrupted"], true);
    let series = &run["suites"][0]["figures"][0]["series"];
    let samples = series[0]["samples"].as_array().map_or(0, Vec::len);
    assert!((1..10_000).contains(&samples), "{samples} samples: {series}");
    assert!(stdout.contains(series[0]["who"].as_str().unwrap()), "{stdout}");
}

/// Whether the progress on a terminal tells of a second sample of anyone: the first has been taken then.
fn begun_twice(progress: &str) -> bool {
    let mut whose: Vec<&str> =
        progress.split('\r').filter_map(|line| Some(line.rsplit_once("%  ")?.1)).collect();
    // The last may not have come whole.
    whose.pop();
    let all = whose.len();
    whose.sort_unstable();
    whose.dedup();
    whose.len() < all
}

/// A terminal: its own end, and that of the program that runs on it.
fn terminal() -> (File, File) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    unlockpt(&master).unwrap();
    let path = PathBuf::from(OsString::from_vec(ptsname(&master, Vec::new()).unwrap().into_bytes()));
    // For writing alone: nothing is read from it, nor told to its driver.
    let other_end =
        OpenOptions::new().write(true).custom_flags(OFlags::NOCTTY.bits() as i32).open(path).unwrap();
    (master.into(), other_end)
}
