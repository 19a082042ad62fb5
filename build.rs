//! Builds the freestanding programs that are shipped inside this one: the labs' guests and the firmware, in assembly, and the
//! program that boots a disk, in Rust.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folder, its linker script, and the names of its sources: NAME.s becomes the file NAME in the output folder.
const SOURCES: [(&str, &str, &[&str]); 2] = [
    ("firmware", "firmware.ld", &["firmware"]),
    (
        "guest/labs",
        "lab.ld",
        &[
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
            "dirty-log",
        ],
    ),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // An input of the linker's that cargo does not know of.
    println!("cargo:rerun-if-changed=.cargo/start-order.txt");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for (folder, script, names) in SOURCES {
        println!("cargo:rerun-if-changed={folder}");
        let (folder, script) = (Path::new(folder), Path::new(folder).join(script));
        for name in names {
            let (source, object) = (folder.join(format!("{name}.s")), out.join(format!("{name}.o")));
            // With line numbers, which are found by where the guest was.
            let mut assemble = Command::new("as");
            assemble.args(["--64", "-g", "--nocompress-debug-sections", "-I"]).arg(folder);
            run(assemble.arg("-o").arg(&object).arg(&source));
            let mut link = Command::new("ld");
            link.args(["--omagic", "--build-id=none", "-z", "noexecstack", "-T"]).arg(&script);
            run(link.arg("-o").arg(out.join(name)).arg(&object));
        }
    }
    boot_disk(&out);
}

/// `firmware/disk` as the file `bootdisk`: its library, then the program around it, for the host's target but without
/// operating system or C library.
fn boot_disk(out: &Path) {
    let sources = Path::new("firmware/disk/src");
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

fn run(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{command:?}: {status}"),
        Err(error) => {
            panic!("{command:?}: {error}; binutils' as and ld are needed (Debian: apt-get install binutils)")
        }
    }
}
