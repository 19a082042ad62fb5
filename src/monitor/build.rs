//! Builds the firmware, in assembly, and the program that boots a disk, in Rust: both are part of the monitor. Refuses targets
//! that the monitor has no code for.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use assemble::{assemble, run};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Here rather than in the library: the assembler would fail first, and then hundreds of names would be missing.
    let target = |what: &str| env::var(format!("CARGO_CFG_TARGET_{what}")).expect("cargo sets it");
    let (os, architecture) = (target("OS"), target("ARCH"));
    if (&*os, &*architecture) != ("linux", "x86_64") {
        println!(
            "cargo::error=vmm runs on Linux on x86_64 only, and this build is for {os} on {architecture}"
        );
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    assemble(Path::new("../../firmware"), "firmware.ld", &["firmware"], &out);
    boot_disk(&out);
}

/// `firmware/disk` as the file `bootdisk`: its library, then the program around it, for the host's target but without
/// operating system or C library.
fn boot_disk(out: &Path) {
    let sources = Path::new("../../firmware/disk/src");
    println!("cargo:rerun-if-changed={}", sources.display());
    let library = out.join("libbootdisk.rlib");
    let rustc = |source: &str, name: &str| {
        let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets it"));
        rustc
            .args(["--edition=2024", "--target=x86_64-unknown-linux-gnu", "--crate-name", name])
            .arg(sources.join(source));
        rustc.args(["-Copt-level=z", "-Ccodegen-units=1", "-Cpanic=abort", "-Crelocation-model=static"]);
        rustc
    };
    run(rustc("lib.rs", "bootdisk").arg("--crate-type=rlib").arg("-o").arg(&library));
    let mut program = rustc("main.rs", "bootdisk_program");
    program.args(["-Clto=fat", "-Cstrip=symbols", "-Clinker=ld", "-Clinker-flavor=ld"]);
    let script = format!("-T{}", sources.join("link.ld").display());
    for flag in ["-static", "--build-id=none", "--gc-sections", "-znorelro", "-znoexecstack", &script] {
        program.arg(format!("-Clink-arg={flag}"));
    }
    let mut library_is = std::ffi::OsString::from("bootdisk=");
    library_is.push(&library);
    run(program.arg("--extern").arg(library_is).arg("-o").arg(out.join("bootdisk")));
}
