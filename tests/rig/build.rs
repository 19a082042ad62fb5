//! Builds the machine's first process (`init/`), linked statically, for `src/boot_files.rs` to embed.
//! It has a target folder of its own: cargo holds the lock of the outer one.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    for path in ["build.rs", "init", "../../Cargo.lock"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let variable = |name: &str| env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
    let folder = PathBuf::from(variable("OUT_DIR")).join("init");
    let status = Command::new(variable("CARGO"))
        .args(["build", "--quiet", "--package", "rig-init", "--bin", "rig-init"])
        .args(["--release", "--target", TARGET])
        .arg("--target-dir")
        .arg(&folder)
        // The rig's cache knows this program by its bytes: keep out what differs from build to build.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // Set by `cargo clippy` and coverage tools for the outer build.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("cargo runs");
    assert!(
        status.success(),
        "the static build of rig-init failed; it needs the C library's static archive (Debian: libc6-dev)"
    );
    let program = folder.join(TARGET).join("release/rig-init");
    println!("cargo:rustc-env=RIG_INIT={}", program.display());
}
