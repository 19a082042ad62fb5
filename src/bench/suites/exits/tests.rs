//! The suite on this host's KVM, with few samples.

use super::*;
use crate::elf;
use vmm_monitor::machine;

/// A folder for kernels, and whether there is a KVM. Says so if not.
fn folder(test: &str) -> Option<tempfile::TempDir> {
    if std::fs::File::options().read(true).write(true).open(machine::kvm_path()).is_err() {
        eprintln!("SKIP: {test}: this machine lacks {}", machine::kvm_path().display());
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

/// The least of a few samples: what else the host does only adds.
fn best(who: Who, kind: Kind, config: &VmConfig, rounds: u32) -> f64 {
    let trip = RoundTrip { who, kind, rounds, config: config.clone(), tsc_khz: None };
    (0..5).map(|_| trip.nanoseconds().unwrap()).fold(f64::INFINITY, f64::min)
}

#[test]
fn the_bare_loop_and_the_monitor_seen_or_not_are_measured() {
    let Some(folder) = folder("exits") else { return };
    const ROUNDS: u32 = 300;
    for kind in [Kind::PioOut, Kind::MmioRead, Kind::Cpuid] {
        let config = config(kind, ROUNDS, folder.path().join("kernel")).unwrap();
        for who in Who::ALL {
            let span = best(who, kind, &config, ROUNDS);
            assert!((50.0..5e6).contains(&span), "{kind:?}, {who:?}: {span} ns");
        }
    }
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["kernel"]);
}

#[test]
fn interrupts_are_answered() {
    let Some(folder) = folder("interrupts") else { return };
    for who in Who::ALL {
        let config = config(Kind::Wake, 1, folder.path().join("kernel")).unwrap();
        let trip = RoundTrip { who, kind: Kind::Wake, rounds: 1, config, tsc_khz: None };
        let span = trip.nanoseconds().unwrap();
        assert!((100.0..1e9).contains(&span), "{who:?}: {span} ns");
    }
}

#[test]
fn a_guest_that_crashes_is_no_measurement_and_says_why() {
    let Some(folder) = folder("crash") else { return };
    let mut config = config(Kind::PioOut, 1, folder.path().join("kernel")).unwrap();
    let crash = folder.path().join("crash");
    // UD2, with no IDT.
    std::fs::write(&crash, elf::pvh_kernel(&[0x0f, 0x0b])).unwrap();
    config.kernel = Some(crash);
    for who in Who::ALL {
        let kind = Kind::PioOut;
        let trip = RoundTrip { who, kind, rounds: 1, config: config.clone(), tsc_khz: None };
        let why = trip.nanoseconds().unwrap_err();
        assert!(why.contains("triple fault") || why.contains("could not emulate"), "{who:?}: {why}");
    }
}

#[test]
fn cycles_follow_the_counter() {
    let Some(folder) = folder("cycles") else { return };
    let config = config(Kind::Cpuid, 100, folder.path().join("kernel")).unwrap();
    let mut trip =
        RoundTrip { who: Who::Bare, kind: Kind::Cpuid, rounds: 100, config, tsc_khz: Some(2_500_000) };
    let sample = trip.sample().unwrap();
    assert_eq!(sample.len(), 2);
    assert!((sample[1] / sample[0] - 2.5).abs() < 1e-9, "{sample:?}");
}

#[test]
fn a_report_is_cut_to_what_happened_and_where() {
    assert_eq!(brief("vcpu0: stuck\n  rax=0\n  0x10: f4  hlt"), "vcpu0: stuck: 0x10: f4  hlt");
    assert_eq!(brief("alone"), "alone");
}
