//! Every lab by the binary on this machine's /dev/kvm, against what it said when the files in `golden/` were last renewed:
//! `VMM_RENEW_GOLDEN=1 cargo test --test labs`. Times, and what differs from run to run, are left out of the comparison.
//!
//! The files are of a KVM without hardware virtualization, and without the kernel's own trace. Where there is some, hardware decides what exits there are, and
//! `tests/boot/labs.rs` looks at those.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where its user may read the kernel's trace, the command gets mounts of its own without it.
fn vmm(arguments: &[&str]) -> Output {
    const WITHOUT_TRACE: &str =
        "umount -l /sys/kernel/tracing /sys/kernel/debug/tracing /sys/kernel/debug 2>/dev/null; exec \"$@\"";
    let vmm = env!("CARGO_BIN_EXE_vmm");
    let traced = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
        .iter()
        .any(|root| Path::new(root).join("events").exists());
    let mut command = Command::new(if traced { "unshare" } else { vmm });
    if traced {
        command.args(["--mount", "sh", "-c", WITHOUT_TRACE, "sh", vmm]);
    }
    command.args(arguments).env_remove("RUST_LOG").env_remove("VMM_KVM").output().unwrap()
}

fn said(arguments: &[&str]) -> String {
    let output = vmm(arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), error.as_str()), (Some(0), ""), "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The names of all labs.
fn labs() -> Vec<String> {
    said(&["lab"]).lines().map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
}

/// A time or a duration: `+1.234ms`, `5.6us`.
fn is_time(word: &str) -> bool {
    let number = word.trim_start_matches('+').trim_end_matches(['.', ';', ',']);
    let unit = ["ns", "us", "ms", "s"].into_iter().find_map(|unit| number.strip_suffix(unit));
    unit.is_some_and(|number| number.parse::<f64>().is_ok())
}

/// `text` without what differs from run to run: times; the turns of devices' workers; and which of the two
/// vendors' names for the same exit comes first.
fn lasting(text: &str) -> String {
    const SAME: [(&str, &str); 4] = [
        ("VT-x 30 I/O instruction = AMD-V 0x7b IOIO", "AMD-V 0x7b IOIO = VT-x 30 I/O instruction"),
        ("VT-x 49 EPT misconfiguration = AMD-V 0x400 NPF", "AMD-V 0x400 NPF = VT-x 49 EPT misconfiguration"),
        ("VT-x 2 triple fault = AMD-V 0x7f SHUTDOWN", "AMD-V 0x7f SHUTDOWN = VT-x 2 triple fault"),
        ("this host's (VT-x) first", "this host's (AMD-V) first"),
    ];
    let line = |line: &str| {
        let mut words: Vec<_> = line.split_whitespace().collect();
        if !words.iter().any(|word| is_time(word)) {
            return line.to_owned();
        }
        words.iter_mut().filter(|word| is_time(word)).for_each(|word| *word = "TIME");
        words.join(" ")
    };
    let text = SAME.iter().fold(text.to_owned(), |text, (one, other)| text.replace(one, other));
    // Whether a worker finds requests one by one, and before the vCPU does, is luck; their sum is not, and it is told.
    let lasts = |line: &&str| !["virtio-", "Within those exits"].iter().any(|start| line.starts_with(start));
    text.lines().filter(lasts).map(|text| line(text) + "\n").collect()
}

fn file(lab: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/labs/golden")
        .join(format!("{lab}.txt"))
}

#[test]
fn every_lab_says_what_it_said() {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let hardware = cpus.split_whitespace().any(|word| word == "svm" || word == "vmx");
    let open = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = open {
        return eprintln!("SKIP: every_lab_says_what_it_said: needs /dev/kvm: {error}");
    }
    if hardware {
        return eprintln!(
            "SKIP: every_lab_says_what_it_said: needs a KVM without hardware virtualization, of which its golden files are; \
             tests/boot/labs.rs is for this one"
        );
    }
    let renew = std::env::var_os("VMM_RENEW_GOLDEN").is_some();
    for lab in labs() {
        let mut now = lasting(&said(&["lab", &lab]));
        if lab == "hypercall" {
            // A KVM in software stays at the call: VMCALL with Intel's processors, VMMCALL with AMD's.
            now = now.replace("start+0x18", "start+0x13");
        }
        if renew {
            fs::write(file(&lab), &now).unwrap();
        }
        let golden = fs::read_to_string(file(&lab)).unwrap_or_else(|error| panic!("{lab}: {error}"));
        assert_eq!(
            now, golden,
            "{lab} says something else than it did: VMM_RENEW_GOLDEN=1, if that is meant"
        );
    }
}

#[test]
fn the_golden_files_are_those_of_the_labs() {
    let mut files: Vec<_> =
        fs::read_dir(file("").parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
    let mut wanted: Vec<_> = labs().iter().map(|lab| file(lab)).collect();
    files.sort();
    wanted.sort();
    assert_eq!(files, wanted);
}

#[test]
fn labs_are_listed_and_their_sources_shown() {
    let list = said(&["lab"]);
    assert!(list.lines().count() >= 14 && list.contains("pio            port I/O, the oldest"), "{list}");
    let readme =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../guest/labs/README.md")).unwrap();
    for lab in labs() {
        let source = said(&["lab", &lab, "--source"]);
        assert!(source.starts_with(&format!("# {lab}: ")) && source.contains("\nstart:\n"), "{source}");
        assert!(readme.contains(&format!("## {lab}\n")), "{lab} is not in guest/labs/README.md");
    }
    let output = vmm(&["lab", "nonsense"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("no lab \"nonsense\"") && error.contains("hint: vmm lab lists them"), "{error}");
}

#[test]
fn a_lab_is_told_in_the_terms_of_the_vendors_that_are_asked_for() {
    if !Path::new("/dev/kvm").exists() {
        return eprintln!(
            "SKIP: a_lab_is_told_in_the_terms_of_the_vendors_that_are_asked_for: needs /dev/kvm"
        );
    }
    let (vtx, svm) = ("VT-x 30 I/O instruction", "AMD-V 0x7b IOIO");
    for (vendor, said_of, silent_of) in [("intel", vtx, "AMD-V 0x"), ("amd", svm, "VT-x 3")] {
        let text = said(&["lab", "pio", "--vendor", vendor]);
        assert!(text.contains(&format!("{said_of} (out 1B 0x3f8)")) && !text.contains(silent_of), "{text}");
    }
    let both = said(&["lab", "pio", "--vendor", "both"]);
    let maker = fs::read_to_string("/proc/cpuinfo").unwrap();
    let order = if maker.contains("AuthenticAMD") { [svm, vtx] } else { [vtx, svm] };
    assert!(both.contains(&format!("{} (out 1B 0x3f8)", order.join(" = "))), "{both}");
    for manual in ["Intel SDM vol. 3, appendix C", "AMD APM vol. 2, appendix C"] {
        assert!(both.replace('\n', " ").contains(manual), "{both}");
    }
    let output = vmm(&["lab", "pio", "--vendor", "via"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected intel, amd or both"));
}

#[test]
fn times_are_left_out() {
    let text = "vcpu0      +1.234ms  x | serial THR <- 'H' | 5.60us\nvirtio-rng +2ms y\nfor 300ms on end. 300 ms\n a  b\n";
    assert_eq!(lasting(text), "vcpu0 TIME x | serial THR <- 'H' | TIME\nfor TIME on end. 300 ms\n a  b\n");
}
