//! The fork suite of `vmm bench`, and how it follows what one command leaves behind. In a program of their own: what they start and
//! lose is found among all children of this process, so one test runs at a time.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use vmm_bench::measure::crowd::Life;
use vmm_bench::measure::{Plan, offspring};
use vmm_bench::result::Suite;
use vmm_bench::rivals::Setting;
use vmm_bench::rivals::idle::all_processes;
use vmm_bench::suites::{self, Name};

const LIMIT: Duration = Duration::from_secs(20);

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows `count` processes of a shell whose first argument is the pipe that they share.
fn shell(script: &str, count: usize, limit: Duration) -> Result<Vec<Life>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pipe");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let pipe = rustix::fs::open(&path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(&path);
    offspring::measure(command, pipe.into(), count, &[b"a", b"b"], limit)
}

#[test]
fn those_that_outlive_their_command_are_followed_to_their_ends() {
    let _alone = alone();
    let script =
        "for n in 1 2 5; do (sleep 0.$n; echo a; echo b; sleep 0.1; exit 5) >$1 & done; exec sleep 0.4";
    let lives = shell(script, 3, LIMIT).unwrap();
    assert_eq!(lives.len(), 3);
    for (tenths, life) in [1, 2, 5].into_iter().zip(&lives) {
        assert!(life.marks.len() == 2 && life.marks[0] >= Duration::from_millis(100 * tenths), "{lives:?}");
        assert!(life.exit >= life.marks[1] + Duration::from_millis(80), "{lives:?}");
        assert_eq!(life.status, Some(5));
    }
    assert!(lives[0].exit < Duration::from_millis(400), "it ended before its command: {lives:?}");
}

#[test]
fn what_fails_is_told_and_nobody_is_left() {
    let _alone = alone();
    let error = shell("echo woe >&2; exit 3", 1, LIMIT).unwrap_err();
    assert!(error.contains("woe") && error.contains("exit code 3"), "{error}");
    let error = shell("(echo a >$1) & wait", 1, LIMIT).unwrap_err();
    assert!(error.contains("they said \"a\\n\""), "{error}");
    let error = shell("sleep 1234.5 &", 1, Duration::from_millis(300)).unwrap_err();
    assert!(error.contains("0 of 1"), "{error}");
    let line = b"sleep\x001234.5\0";
    let sleeps = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words == line);
    assert!(!all_processes().unwrap().any(sleeps));
}

/// The medians of `who` in every figure of `what`, in the order of the figures.
fn medians(suite: &Suite, what: &str, who: &str) -> Vec<f64> {
    let figures = suite.figures.iter().filter(|figure| figure.name.contains(what));
    let series = figures.flat_map(|figure| figure.series.iter().filter(|series| series.who == who));
    series.map(|series| vmm_bench::measure::stats::quantile(&series.samples, 0.5)).collect()
}

#[test]
fn saved_machines_go_on_one_and_ten_at_once() {
    let _alone = alone();
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIP: saved_machines_go_on_one_and_ten_at_once: this machine lacks /dev/kvm");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let own = Path::new(env!("CARGO_BIN_EXE_vmm-bench"));
    let setting = Setting {
        vmm: own.with_file_name("vmm"),
        own: own.to_owned(),
        with: Default::default(),
        kernel: None,
        bzimage: None,
        stock: None,
        agent: None,
        scratch: scratch.path().to_owned(),
        instances: 10,
        repeatable_clock: false,
    };
    let plan = Plan { samples: 2, warm_up: 0, seed: 7, limit: None };
    let suite = suites::run(Name::Fork, &setting, plan, &mut |share, _| {
        assert!((0.0..=1.0).contains(&share), "{share}");
    });
    let suite = suite.unwrap();
    for who in ["vmm restore, no Linux", "vmm fork, no Linux"] {
        let contender = suite.contenders.iter().find(|contender| contender.name == who).unwrap();
        assert_eq!(contender.failure, None, "{who}");
        // One; and p50, p90 and p99 of ten.
        let (outputs, exits) = (medians(&suite, "first output", who), medians(&suite, "exit", who));
        assert_eq!((outputs.len(), exits.len()), (4, 4), "{who}");
        assert!(outputs[1] <= outputs[2] && outputs[2] <= outputs[3], "{who}: {outputs:?}");
        assert!(
            outputs.iter().zip(&exits).all(|(output, exit)| output < exit),
            "{who}: {outputs:?} {exits:?}"
        );
        assert!(medians(&suite, "command", who).is_empty(), "nothing runs there");
        let private = medians(&suite, "private memory", who);
        assert!(
            private.len() == 2 && private.iter().all(|kib| (100.0..10_000.0).contains(kib)),
            "{private:?}"
        );
    }
    for linux in ["vmm restore", "vmm fork", "QEMU microvm, restored"] {
        let contender = suite.contenders.iter().find(|contender| contender.name == linux).unwrap();
        assert!(contender.failure.is_some(), "{linux}: without a kernel");
    }
}
