//! Assembles what is written in assembly and shipped inside the program: the labs' guests, the firmware.

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
