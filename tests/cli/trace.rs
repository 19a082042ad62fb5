//! Traces of guests of a few instructions: what is recorded, and how it is told.

use serde_json::Value;

use crate::images::*;
use crate::place::*;

/// 64-bit code: says "Hi" on the serial port, reads its line status, asks a port that nobody answers, ends with status 0.
const TALKER: [u8; 30] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'H', // mov al, 'H'
    0xee, // out dx, al
    0xb0, b'i', // mov al, 'i'
    0xee, // out dx, al
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0x66, 0xba, 0x34, 0x12, // mov dx, 0x1234
    0xed, // in eax, dx
    0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xb0, 0x00, // mov al, 0
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp
];

pub const RUN: &str = "--kernel talker --console off --serial stdio --debug-exit";

pub fn place() -> Place {
    let place = Place::new();
    place.file("talker", kernel(&TALKER));
    place
}

/// What the lines say of instruction and answer, without times and the hardware's name.
fn sentences(report: &str) -> Vec<(String, String)> {
    let fields = report.lines().map(|line| line.split(" | ").map(str::trim).collect::<Vec<_>>());
    fields
        .map(|fields| {
            let instruction = fields[0].splitn(4, ' ').last().unwrap_or_default();
            let words: Vec<_> = instruction.split_whitespace().collect();
            (words[words.len() - 2..].join(" "), fields[2].to_owned())
        })
        .collect()
}

#[test]
fn every_exit_is_a_sentence() {
    if !has_kvm("every_exit_is_a_sentence") {
        return;
    }
    let place = place();
    let run = place.vmm(&format!("--trace record {RUN}"));
    assert_eq!((run.status.code(), text(&run.stdout).as_str()), (Some(1), "Hi"), "{}", text(&run.stderr));
    let report = place.vmm("trace report record");
    assert_eq!(report.status.code(), Some(0), "{}", text(&report.stderr));
    let told = sentences(&text(&report.stdout));
    let expected = [
        ("out dx,al", "serial THR <- 'H'"),
        ("out dx,al", "serial THR <- 'i'"),
        ("in al,dx", "serial LSR -> 0x60"),
        ("in eax,dx", "nobody -> 0xffffffff"),
        ("out dx,al", "debug-exit <- 0x0"),
    ];
    assert_eq!(told, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));

    // Filters, and the same for programs.
    for (filter, count) in [
        ("--device serial", 3),
        ("--port 0x3f8-0x3fc", 2),
        ("--only mmio", 0),
        ("--vcpu 1", 0),
        ("--after 60000", 0),
    ] {
        let report = place.vmm(&format!("trace report record {filter}"));
        assert_eq!(text(&report.stdout).lines().count(), count, "{filter}");
    }
    let json = text(&place.vmm("trace report record --json").stdout);
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(first["instruction"], "out dx,al");
    assert_eq!((&first["vtx"]["number"], &first["svm"]["code"]), (&30.into(), &0x7b.into()));
    assert_eq!(first["rip"], "0x1000006");
    let advice = text(&place.vmm("trace report record --advise").stdout);
    assert!(advice.starts_with("nothing to say"), "five exits waste nothing: {advice}");
    let stats: Value =
        serde_json::from_slice(&place.vmm("trace report record --stats --json").stdout).unwrap();
    let serial = stats["devices"].as_array().unwrap().iter().find(|row| row["name"] == "serial").unwrap();
    assert_eq!(serial["count"], 3);
}

#[test]
fn a_run_can_be_recorded_and_told_at_once() {
    if !has_kvm("a_run_can_be_recorded_and_told_at_once") {
        return;
    }
    let place = place();
    let run = place.vmm(&format!("trace --stats -- {RUN}"));
    let out = text(&run.stdout);
    assert_eq!(run.status.code(), Some(1), "the guest's code: {}", text(&run.stderr));
    assert!(out.starts_with("Hi") && out.contains("5 exits reached the monitor"), "{out}");
    assert!(!place.path("record").exists());
    let kept = place.vmm(&format!("trace --keep record --only pio -- {RUN}"));
    assert_eq!(text(&kept.stdout).lines().count(), 5);
    assert!(place.path("record").exists());
}

#[test]
fn what_is_no_trace_is_an_error() {
    let place = place();
    for (arguments, words) in [
        ("trace report missing", &["missing", "No such file"][..]),
        ("trace report talker", &["talker", "not a trace"]),
        ("trace", &["RUN OPTIONS"]),
        ("trace -- --mem 1G", &["no kernel"]),
        ("trace report --only nonsense talker", &["only"]),
        ("--trace /no/such/folder/file --kernel talker --console off", &["/no/such/folder"]),
    ] {
        if arguments.contains("--console") && !has_kvm("--trace") {
            continue;
        }
        let output = place.vmm(arguments);
        let error = text(&output.stderr);
        assert!(matches!(output.status.code(), Some(2 | 4)), "{arguments}: {:?} {error}", output.status);
        assert!(words.iter().all(|word| error.contains(word)), "{arguments}: {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}
