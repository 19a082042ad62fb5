//! Assembles the labs' guests.

use std::env;
use std::path::{Path, PathBuf};

const LABS: [&str; 15] = [
    "halt",
    "pio",
    "rep-outs",
    "mmio",
    "cpuid",
    "msr",
    "hypercall",
    "longmode",
    "interrupt",
    "apic-timer",
    "triple-fault",
    "sipi",
    "doorbell",
    "msix",
    "dirty-log",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    assemble::assemble(Path::new("../../guest/labs"), "lab.ld", &LABS, &out);
}
