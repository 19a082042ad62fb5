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
    assert!(first["hardware"].as_str().unwrap().ends_with("(out 1B 0x3f8)"), "{first}");
    assert_eq!(first["rip"], "0x1000006");
    let advice = text(&place.vmm("trace report record --advise").stdout);
    assert!(advice.starts_with("nothing to say"), "five exits waste nothing: {advice}");
    let stats: Value =
        serde_json::from_slice(&place.vmm("trace report record --stats --json").stdout).unwrap();
    let serial = stats["devices"].as_array().unwrap().iter().find(|row| row["name"] == "serial").unwrap();
    assert_eq!(serial["count"], 3);
}

#[test]
fn a_trace_is_told_in_the_terms_of_the_vendors_that_are_asked_for() {
    if !has_kvm("a_trace_is_told_in_the_terms_of_the_vendors_that_are_asked_for") {
        return;
    }
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    let told = |arguments: &str| {
        let report = place.vmm(&format!("trace report record {arguments}"));
        assert_eq!(report.status.code(), Some(0), "{arguments}: {}", text(&report.stderr));
        text(&report.stdout)
    };
    let (vtx, svm) = ("VT-x 30 I/O instruction", "AMD-V 0x7b IOIO");
    let amd = std::fs::read_to_string("/proc/cpuinfo").unwrap().contains("AuthenticAMD");
    let both = if amd { [svm, vtx] } else { [vtx, svm] }.join(" = ");
    for arguments in ["", "--vendor both", "--stats", "--json", "--stats --json"] {
        assert!(told(arguments).contains(&both), "{arguments}: {}", told(arguments));
    }
    for (vendor, said, silent) in [("intel", vtx, "AMD-V"), ("amd", svm, "VT-x")] {
        for form in ["", "--stats"] {
            let told = told(&format!("--vendor {vendor} {form}"));
            assert!(told.contains(said) && !told.contains(silent), "{vendor} {form}: {told}");
        }
    }
    let refused = place.vmm("trace report record --vendor via");
    assert_eq!(refused.status.code(), Some(BAD_ARGUMENT), "{}", text(&refused.stderr));
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
fn registers_are_recorded_where_a_place_is_new_or_everywhere() {
    if !has_kvm("registers_are_recorded_where_a_place_is_new_or_everywhere") {
        return;
    }
    let place = Place::new();
    // Three times the same instruction, with another number each time; then the end.
    let code = [
        0xb9, 0x03, 0x00, 0x00, 0x00, // mov ecx, 3
        0x66, 0xba, 0x34, 0x12, // mov dx, 0x1234
        0x89, 0xc8, // mov eax, ecx
        0xef, // out dx, eax
        0xff, 0xc9, // dec ecx
        0x75, 0xf9, // jnz (mov eax)
        0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xb0, 0x00, 0xee, // mov al, 0; out dx, al
        0xf4, 0xeb, 0xfd,
    ];
    place.file("loop", kernel(&code));
    let run = "--kernel loop --console off --debug-exit";
    let registers = |options: &str| -> Vec<Option<(String, String)>> {
        let ended = place.vmm(&format!("--trace record {options} {run}"));
        assert_eq!(ended.status.code(), Some(1), "{}", text(&ended.stderr));
        let json = text(&place.vmm("trace report record --json --port 0x1234").stdout);
        let exits = json.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let of = |exit: Value| {
            let registers = exit["registers"].as_object()?.clone();
            let read = |name: &str| registers[name].as_str().unwrap_or_default().to_owned();
            assert_eq!((read("rdx"), read("rip").is_empty()), ("0x1234".to_owned(), false));
            Some((read("rcx"), registers.get("cr3").map_or("none", |_| "known").to_owned()))
        };
        exits.map(of).collect()
    };
    let at = |rcx: &str, cr3: &str| Some((rcx.to_owned(), cr3.to_owned()));
    assert_eq!(registers(""), [at("0x3", "known"), None, None]);
    assert_eq!(registers("--trace-registers"), [at("0x3", "known"), at("0x2", "none"), at("0x1", "none")]);
    refused(&place, &format!("--trace-registers {run}"), BAD_ARGUMENT, &["--trace-registers"]);
}

/// What the format of Chromium's trace events asks of each: the keys of its phase, times, tracks that have names, and slices of
/// one track that lie inside each other or apart. ("Trace Event Format", the document; ui.perfetto.dev reads this subset.)
fn check_perfetto(text: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(text).unwrap();
    assert!(matches!(all["displayTimeUnit"].as_str(), Some("ms" | "ns")));
    let events = all["traceEvents"].as_array().unwrap();
    let mut named = std::collections::BTreeSet::new();
    let mut slices: std::collections::BTreeMap<u64, Vec<(f64, f64)>> = Default::default();
    let mut process = false;
    for event in events {
        let track = |key: &str| event[key].as_u64().unwrap_or_else(|| panic!("no {key}: {event}"));
        let name = event["name"].as_str().unwrap_or_else(|| panic!("no name: {event}"));
        assert!(!name.is_empty() && track("pid") == 1, "{event}");
        let time = || event["ts"].as_f64().filter(|ts| *ts >= 0.0).unwrap_or_else(|| panic!("when? {event}"));
        match event["ph"].as_str() {
            Some("M") => {
                assert!(event["args"]["name"].is_string(), "{event}");
                match name {
                    "process_name" => process = true,
                    "thread_name" => _ = named.insert(track("tid")),
                    _ => panic!("{event}"),
                }
            }
            Some("X") => {
                let length = event["dur"].as_f64().filter(|dur| *dur >= 0.0);
                let length = length.unwrap_or_else(|| panic!("how long? {event}"));
                assert!(event["cat"].is_string() && event["args"].is_object(), "{event}");
                slices.entry(track("tid")).or_default().push((time(), time() + length));
            }
            Some("i") => {
                time();
                assert!(matches!(event["s"].as_str(), Some("t" | "p" | "g")), "{event}");
            }
            _ => panic!("an unknown phase: {event}"),
        }
        assert!(name == "process_name" || named.contains(&track("tid")), "a track without a name: {event}");
    }
    assert!(process);
    for (track, mut slices) in slices {
        slices.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut open: Vec<f64> = Vec::new();
        for (from, to) in slices {
            // A nanosecond is a thousandth; times are rounded.
            open.retain(|end| *end > from + 0.002);
            assert!(
                open.iter().all(|end| to <= end + 0.002),
                "track {track}: {from} to {to} crosses {open:?}"
            );
            open.push(to);
        }
    }
    events.clone()
}

#[test]
fn the_perfetto_file_is_as_its_format_says() {
    if !has_kvm("the_perfetto_file_is_as_its_format_says") {
        return;
    }
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    let report = place.vmm("trace report record --perfetto out.json");
    assert_eq!(report.status.code(), Some(0), "{}", text(&report.stderr));
    let events = check_perfetto(&std::fs::read_to_string(place.path("out.json")).unwrap());
    let of = |category: &str| events.iter().filter(|event| event["cat"] == category).collect::<Vec<_>>();
    let names = |category: &str| of(category).iter().map(|e| e["name"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(names("exit"), ["serial", "serial", "serial", "nobody", "debug-exit"]);
    assert_eq!(of("exit")[0]["args"]["answer"], "serial THR <- 'H'");
    assert_eq!(of("guest").len(), 5);
    let mut steps = names("monitor");
    steps.sort_unstable();
    assert_eq!(
        steps,
        ["VM", "devices", "load", "memory", "open /dev/kvm", "processor", "this record", "vCPUs"]
    );
    // It would be found out.
    let whole = std::fs::read_to_string(place.path("out.json")).unwrap();
    for (from, to) in [("\"ph\":\"X\"", "\"ph\":\"Q\""), ("\"dur\"", "\"d\""), ("thread_name", "thread")] {
        let broken = whole.replace(from, to);
        assert!(broken != whole && std::panic::catch_unwind(|| check_perfetto(&broken)).is_err(), "{from}");
    }
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
