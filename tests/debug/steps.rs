//! `vmm trace --step`: each instruction with its mode and what it changed.

use std::fs;

use crate::guests::{counter, down, up};
use crate::images::{bzimage, kernel};
use crate::place::*;

const RUN: &str = "--console off --serial file=out --debug-exit";

/// Compares with the file of that name beside this one.
#[track_caller]
pub fn golden(name: &str, said: &str) {
    let file = format!("{}/../../tests/debug/{name}", env!("CARGO_MANIFEST_DIR"));
    let expected = fs::read_to_string(&file).unwrap_or_default();
    assert!(said == expected, "{file} is otherwise; now it is:\n{said}");
}

#[test]
fn the_way_to_long_mode_and_fifty_instructions() {
    if !has_kvm("the_way_to_long_mode_and_fifty_instructions") {
        return;
    }
    let place = Place::new();
    place.file("up", up());
    let run = place.vmm(&format!("trace --step --count 50 -- --kernel up {RUN}"));
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    golden("up.golden", &text(&run.stdout));
    assert_eq!(fs::read(place.path("out")).unwrap(), b"hello", "devices are served meanwhile");
}

#[test]
fn the_way_to_real_mode_and_to_the_end() {
    if !has_kvm("the_way_to_real_mode_and_to_the_end") {
        return;
    }
    let place = Place::new();
    place.file("down", down());
    let run = place.vmm(&format!("trace --step -- --kernel down {RUN}"));
    assert_eq!(run.status.code(), Some(7), "the guest's own: {}", text(&run.stderr));
    golden("down.golden", &text(&run.stdout));
}

#[test]
fn from_a_symbol_or_an_address() {
    if !has_kvm("from_a_symbol_or_an_address") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    place.file("map", "0000000001000000 T start\n0000000001000009 T again\n");
    for from in ["again", "0x1000009"] {
        let arguments =
            format!("trace --step --from {from} --count 4 --symbols map -- --kernel counter {RUN}");
        let run = place.vmm(&arguments);
        let told = text(&run.stdout);
        assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
        let instructions: Vec<_> = told.lines().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
        assert_eq!(instructions, ["again", "again+0x3", "again+0xd", "again"], "{told}");
        assert!(told.lines().next().unwrap().contains("| rax=0x1 "), "{told}");
    }
}

#[test]
fn a_guest_that_never_comes_there_ends_as_it_would() {
    if !has_kvm("a_guest_that_never_comes_there_ends_as_it_would") {
        return;
    }
    let place = Place::new();
    place.file("up", up());
    let run = place.vmm(&format!("trace --step --from 0x1234 -- --kernel up {RUN}"));
    assert_eq!((run.status.code(), text(&run.stdout).as_str()), (Some(5), ""));
    assert!(text(&run.stderr).contains("without reaching 0x1234"), "{}", text(&run.stderr));
}

#[test]
fn what_cannot_be_stepped_from_is_refused() {
    let place = Place::new();
    place.file("kernel", kernel(&[0xf4]));
    place.file("bz", bzimage(1, 64 << 10));
    place.file("map", "ffffffff81000000 T start_kernel\n");
    for (arguments, words) in [
        ("--from nowhere --symbols map -- --kernel kernel", &["nowhere", "map"][..]),
        ("--from start_kernel -- --kernel kernel", &["start_kernel", "no symbols"]),
        ("--from start_kernel --symbols map -- --kernel bz", &["start_kernel", "KASLR"]),
        ("--stats -- --kernel kernel", &["--stats"]),
        ("--count many -- --kernel kernel", &["many"]),
    ] {
        refused(&place, &format!("trace --step {arguments}"), BAD_ARGUMENT, words);
    }
    refused(&place, "trace --count 5 -- --kernel kernel", BAD_ARGUMENT, &["--step"]);
}
