//! `vmm-bench work`, the workload of `vmm bench`, as a process.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};

fn bench() -> Command {
    Command::new(crate::PROGRAM)
}

fn work(arguments: &[&str]) -> Output {
    bench().arg("work").args(arguments).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn steps_are_done_in_order_between_their_lines() {
    let output = work(&["integer=10", "integer=3"]);
    let said = "begin integer\nend integer 43\nbegin integer\nend integer 8\n";
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()), (Some(0), said));
}

#[test]
fn lines_are_answered_one_by_one() {
    let mut child =
        bench().args(["work", "echo=3"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut lines = BufReader::new(output).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "begin echo");
    for number in 0..3 {
        writeln!(input, "line {number}").unwrap();
        assert_eq!(lines.next().unwrap(), format!("pong line {number}"));
    }
    assert_eq!(lines.next().unwrap(), format!("end echo {:x}", 3 * "line 0\n".len()));
    assert!(child.wait().unwrap().success());
    assert!(!work(&["echo=1"]).status.success(), "no line came");
}

#[test]
fn what_cannot_be_done_says_why_and_has_no_end() {
    let output = work(&["random-read=5:/no/such/disk"]);
    assert_eq!(output.status.code(), Some(4));
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(why.contains("random-read") && why.contains("/no/such/disk"), "{why}");
    assert!(output.stdout.is_empty());
    assert_eq!(work(&["dance=5"]).status.code(), Some(2));
}

#[test]
fn only_pid_1_powers_off() {
    let output = work(&["--guest", "integer=1"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(output.stdout.is_empty());
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(why.contains("PID 1"), "{why}");
}

#[test]
fn people_need_not_know_of_it() {
    let help = bench().arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.contains("--samples") && !help.contains("Do the work"), "{help}");
}
