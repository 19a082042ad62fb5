//! `rig --where host`: the same rules for a command on the host. Needs no machine.

use crate::support::{Output, rig};
use std::time::{Duration, Instant};

#[test]
fn a_command_on_the_host_keeps_its_output_and_code() {
    let run = |arguments: &[&str]| rig(&[&["--where", "host", "--"], arguments].concat()).run();
    let output = run(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(output, Output::new("out\n", "err\n", 3));
    assert_eq!(run(&["sh", "-c", "kill -9 $$"]).code, 137);
    assert_eq!(run(&["no-such-command"]).code, 127);
    assert_eq!(run(&["/etc/passwd"]).code, 126);
}

#[test]
fn the_place_is_said_unless_quiet() {
    let mut command = rig(&["--where", "host", "--", "true"]);
    command.0.env_remove("RIG_QUIET");
    assert!(command.run().errors().contains("this host's own KVM"));
    assert_eq!(rig(&["--where", "host", "--", "true"]).run().stderr, b"");
}

#[test]
fn time_runs_out_on_the_host() {
    let start = Instant::now();
    let output = rig(&["--where", "host", "--timeout", "1", "--", "sleep", "300"]).run();
    assert_eq!(output.code, 124);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn bad_arguments_are_refused() {
    for arguments in [
        &[][..],
        &["--mem", "1", "--", "true"],
        &["--smp", "0", "--", "true"],
        &["--tty", "--stdin", "--", "true"],
        &["--with", "/bin/sh", "--", "true"],
        &["--where", "moon", "--", "true"],
    ] {
        assert_eq!(rig(arguments).run().code, 2, "{arguments:?}");
    }
    let output = rig(&["--where", "rig", "--tty", "--", "true"]).run();
    assert_eq!(output.code, 125);
    assert!(!output.errors().contains("panic"), "{}", output.errors());
}
