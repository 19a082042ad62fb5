//! The programs that go into guests: our own PID 1, built from `guest/init`, and busybox from Debian's static package.

use crate::cache::Cache;
use crate::debian;
use crate::run::{Tool, say};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Which of `guest/init`'s programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// The whole PID 1.
    Full,
    /// Marker and power-off only.
    Tiny,
    /// No PID 1: starts another kernel from the running one.
    Kexec,
    /// No PID 1: talks to the host over vsock.
    Vsock,
}

/// Builds PID 1: static, without libc, its own entry point. The path of the program.
pub fn init(which: Init) -> Result<PathBuf> {
    let name = match which {
        Init::Full => "guest-init",
        Init::Tiny => "guest-tiny",
        Init::Kexec => "guest-kexec",
        Init::Vsock => "guest-vsock",
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace's folder")?;
    // A target folder of its own: other flags, and no waiting for whoever builds the monitor meanwhile.
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace.join(folder),
        None => workspace.join("target"),
    }
    .join("guest-init");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    Tool::new(&cargo)
        .args(["rustc", "--quiet", "--release", "--package", "guest-init", "--bin", name])
        .args(["--features", "freestanding", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .args(["--config", "profile.release.panic='abort'", "--config", "profile.release.opt-level='s'"])
        .args(["--config", "profile.release.debug=0", "--config", "profile.release.strip='symbols'"])
        .args(["--", "-C", "relocation-model=static"])
        .args([
            "-C",
            "link-args=-nostartfiles -nostdlib -static -Wl,--build-id=none,-z,norelro,-z,noseparate-code",
        ])
        // What flags the caller set for their own programs (sanitizers, coverage) cannot work here.
        .env("RUSTFLAGS", "")
        .env("CARGO_ENCODED_RUSTFLAGS", "")
        .dir(workspace)
        .quiet()
        .with_context(|| format!("build {name}"))?;
    Ok(target.join(TARGET).join("release").join(name))
}

/// Debian's static busybox, unpacked into the cache.
pub fn busybox() -> Result<PathBuf> {
    let cache = Cache::open("busybox")?;
    if let Some(folder) = cache.current() {
        return Ok(folder.join("busybox"));
    }
    debian::check_host()?;
    debian::refresh_lists(false)?;
    let version = debian::available("busybox-static").context("no package busybox-static")?;
    let work = cache.workplace()?;
    let unpacked = work.path().join("unpacked");
    fs::create_dir(&unpacked)?;
    debian::download_and_unpack("busybox-static", &unpacked)?;
    let item = work.path().join("item");
    fs::create_dir(&item)?;
    let program = ["bin/busybox", "usr/bin/busybox"]
        .map(|path| unpacked.join(path))
        .into_iter()
        .find(|path| path.is_file());
    fs::rename(program.context("busybox-static has no busybox")?, item.join("busybox"))?;
    let folder = cache.publish(&item, &version.replace(['/', ':'], "_"))?;
    say(format_args!("busybox {version} is unpacked"));
    Ok(folder.join("busybox"))
}

/// Where the applets of a busybox belong, such as `bin/sh`.
pub fn busybox_applets(busybox: &Path) -> Result<Vec<String>> {
    let list = Tool::new(&busybox.to_string_lossy())
        .arg("--list-full")
        .output()
        .context("ask busybox for its applets")?;
    Ok(list.lines().map(str::to_owned).collect())
}
