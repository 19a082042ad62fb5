//! For build scripts: assembles freestanding programs with binutils' `as` and `ld`. Called by the monitor for its firmware and by
//! the trace library for its labs.

use std::path::Path;
use std::process::Command;

/// Assembles `folder/NAME.s` for each of `names` and links it by the script `folder/script` into the file `out/NAME`. Objects
/// have line numbers, by which a source line is found from an address.
///
/// # Panics
/// A program is missing or fails: a build script has no better way to say so.
pub fn assemble(folder: &Path, script: &str, names: &[&str], out: &Path) {
    println!("cargo:rerun-if-changed={}", folder.display());
    for name in names {
        let (source, object) = (folder.join(format!("{name}.s")), out.join(format!("{name}.o")));
        let mut assemble = Command::new("as");
        assemble.args(["--64", "-g", "--nocompress-debug-sections", "-I"]).arg(folder);
        run(assemble.arg("-o").arg(&object).arg(&source));
        let mut link = Command::new("ld");
        link.args(["--omagic", "--build-id=none", "-z", "noexecstack", "-T"]).arg(folder.join(script));
        run(link.arg("-o").arg(out.join(name)).arg(&object));
    }
}

/// Runs a step of a build.
///
/// # Panics
/// It is missing or fails.
pub fn run(command: &mut Command) {
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{command:?}: {status}"),
        Err(error) => {
            panic!("{command:?}: {error}; binutils' as and ld are needed (Debian: apt-get install binutils)")
        }
    }
}
