//! What a command sees in the rig's machine and what its caller sees of the command. Runs the
//! `rig` program; where the machine cannot be had every test says SKIP (with CI=true: fails).

use crate::support::{Output, available, rig, rig_in_cache, run_inside};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn output_error_output_and_exit_code_come_back_apart() {
    if !available("output") {
        return;
    }
    let output = rig(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"]).run();
    assert_eq!(output, Output::new("out\n", "err\n", 7));
}

#[test]
fn surroundings_are_the_callers() {
    if !available("surroundings") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd \xff\nvalue");
    let script = "pwd; umask; ulimit -n; printf '%s|' \"$RIG_TEST\" \"$@\"; echo x >made";
    let mut command = rig(&["--", "sh", "-c", script, "sh", "a b", ""]);
    command.0.current_dir(folder.path()).env("RIG_TEST", odd);
    // SAFETY: both calls are safe between fork and exec.
    unsafe {
        command.0.pre_exec(|| {
            libc::umask(0o027);
            let limit = libc::rlimit { rlim_cur: 777, rlim_max: 999 };
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            Ok(())
        })
    };
    let output = command.run();
    let path = folder.path().display();
    let mut expected = format!("{path}\n0027\n777\n").into_bytes();
    expected.extend(b"odd \xff\nvalue|a b||");
    assert_eq!(output.stdout, expected);
    assert_eq!(output.code, 0);
    assert_eq!(fs::read(folder.path().join("made")).unwrap(), b"x\n");
}

#[test]
fn megabytes_pass_unchanged_in_both_directions() {
    if !available("megabytes") {
        return;
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut state = 1_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(5_000_001)
    .collect();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    let path = file.path().to_str().unwrap();
    let output = rig(&["--", "sh", "-c", "cat \"$0\"; cat \"$0\" >&2", path]).run();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    assert!(output.stderr == bytes, "{} bytes", output.stderr.len());
    let mut command = rig(&["--stdin", "--", "cat"]);
    command.0.stdin(file.reopen().unwrap());
    let output = command.run();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    // Without being asked for, standard input is empty.
    let mut command = rig(&["--", "cat"]);
    command.0.stdin(file.reopen().unwrap());
    assert_eq!(command.run(), Output::new("", "", 0));
}

#[test]
fn ends_other_than_an_exit_have_their_codes() {
    if !available("ends") {
        return;
    }
    assert_eq!(rig(&["--", "sh", "-c", "kill -9 $$"]).run().code, 137);
    assert_eq!(rig(&["--", "sh", "-c", "kill -TERM $$"]).run().code, 143);
    let output = rig(&["--", "no-such-command"]).run();
    assert_eq!(output.code, 127);
    assert!(output.errors().contains("no-such-command"));
    assert_eq!(rig(&["--", "/etc/passwd"]).run().code, 126);
    let mut command = rig(&["--", "true"]);
    command.0.current_dir("/proc/self");
    let output = command.run();
    assert_eq!(output.code, 125);
    assert!(output.errors().contains("working directory"));
}

#[test]
fn a_process_left_behind_does_not_delay_the_end() {
    if !available("left behind") {
        return;
    }
    let start = Instant::now();
    let output = rig(&["--", "sh", "-c", "sleep 300 & yes & echo done; exit 4"]).run();
    assert_eq!(output.code, 4);
    assert!(String::from_utf8_lossy(&output.stdout).contains("done\n"));
    assert!(start.elapsed() < Duration::from_secs(100));
}

#[test]
fn time_runs_out() {
    if !available("time") {
        return;
    }
    let output = rig(&["--timeout", "10", "--", "sh", "-c", "echo begun; sleep 300"]).run();
    assert_eq!(output.code, 124);
    assert_eq!(output.stdout, b"begun\n");
    assert!(output.errors().contains("10 seconds"));
}

#[test]
fn a_signal_to_the_rig_leaves_no_process() {
    if !available("signal") {
        return;
    }
    for (signal, code) in [(libc::SIGTERM, Some(143)), (libc::SIGKILL, None)] {
        let mut command = rig(&["--", "sh", "-c", "echo begun; sleep 300"]).0;
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        assert_eq!(line, "begun\n");
        let id = child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let children: Vec<_> = children.split_whitespace().collect();
        assert_eq!(children.len(), 2, "QEMU and the file server");
        // SAFETY: kill takes numbers only.
        unsafe { libc::kill(id as libc::pid_t, signal) };
        assert_eq!(child.wait().unwrap().code(), code);
        let start = Instant::now();
        let lives = |id: &&str| {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        // After SIGKILL it is the kernel that ends them, a little later.
        while children.iter().any(lives) {
            assert!(signal == libc::SIGKILL && start.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn kvm_creates_a_machine() {
    run_inside("kvm_creates_a_machine");
}

#[test]
fn sockets_and_pipes_work_between_processes() {
    run_inside("sockets_and_pipes_work_between_processes");
}

#[test]
fn file_systems_are_mounted() {
    run_inside("file_systems_are_mounted");
}

#[test]
fn the_second_run_starts_from_a_snapshot_and_a_damaged_one_is_replaced() {
    if !available("snapshot") {
        return;
    }
    let cache = rig_in_cache();
    let console = cache.path().join("console");
    let run = || {
        let arguments = ["--console", console.to_str().unwrap(), "--", "cat", "/proc/version"];
        let mut command = rig(&arguments);
        command.0.env("XDG_CACHE_HOME", cache.path()).env_remove("RIG_QUIET");
        let output = command.run();
        assert_eq!(output.code, 0, "{}", output.errors());
        assert!(output.stdout.starts_with(b"Linux version 6.12"));
        let booted = fs::read_to_string(&console).unwrap().contains("Run /init");
        (booted, output.errors())
    };
    let (booted, text) = run();
    assert!(booted && text.contains("booting the machine once"), "{text}");
    let (booted, text) = run();
    assert!(!booted && text.is_empty(), "{text}");
    let rig_cache = cache.path().join("vmm/rig");
    let snapshot = fs::read_dir(rig_cache)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("snapshot-"))
        .unwrap();
    fs::write(snapshot.join("state"), "damaged").unwrap();
    let (booted, text) = run();
    assert!(booted && text.contains("booting another"), "{text}");
    assert!(!snapshot.exists());
}

/// What the machine lost of its timer's it is given again.
#[test]
fn it_is_interrupted_from_outside_whether_it_was_restored_or_booted() {
    if !available("interrupts from outside") {
        return;
    }
    let count = "awk '/i8042/ { print $2; exit }' /proc/interrupts";
    let script = format!("{count}; sleep 4; {count}");
    for options in [&[][..], &["--cold"]] {
        let output = rig(&[options, &["--", "sh", "-c", &script]].concat()).run();
        let said = String::from_utf8(output.stdout).unwrap();
        let counts: Vec<u32> = said.split_whitespace().map(|count| count.parse().unwrap()).collect();
        assert!(matches!(counts[..], [before, after] if after >= before + 2), "{options:?}: {said}");
    }
}

#[test]
fn a_cold_start_and_shadow_paging_are_had_for_the_asking() {
    if !available("cold") {
        return;
    }
    let script = "cat /sys/module/kvm_amd/parameters/npt; nproc";
    let arguments = ["--cold", "--no-npt", "--smp", "2", "--", "sh", "-c", script];
    assert_eq!(rig(&arguments).run(), Output::new("N\n2\n", "", 0));
}

#[test]
fn machines_run_side_by_side() {
    if !available("side by side") {
        return;
    }
    let random = "od -An -N16 -tx8 /dev/urandom";
    let run = |text: &'static str| {
        let script = format!("echo {text} >/run/mine; sleep 1; cat /run/mine; {random}");
        thread::spawn(move || rig(&["--", "sh", "-c", &script]).run())
    };
    let [first, second] = [run("one"), run("two")].map(|thread| thread.join().unwrap());
    assert!(first.stdout.starts_with(b"one\n"), "{first:?}");
    assert!(second.stdout.starts_with(b"two\n"), "{second:?}");
    assert_ne!(first.stdout[4..], second.stdout[4..], "the same random numbers");
}

#[test]
fn a_repeatable_clock_repeats() {
    if !available("repeatable clock") {
        return;
    }
    let run = |seed| {
        thread::spawn(move || {
            let script = "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; date +%s.%N; ls /var; exit 3";
            rig(&["--icount", "--seed", seed, "--", "sh", "-c", script]).run()
        })
    };
    let [first, second, other] = [run("42"), run("42"), run("43")].map(|thread| thread.join().unwrap());
    assert_eq!(first.code, 3, "{}", first.errors());
    assert!(first.stdout.starts_with(b"17672256"), "a time of 2026-01-01");
    assert!(first.errors().contains("/var"), "files of the host: {first:?}");
    assert_eq!(first, second);
    assert_eq!(other.code, 3, "{}", other.errors());
    assert_ne!(first.stdout, other.stdout, "another seed, and not another run");
}
