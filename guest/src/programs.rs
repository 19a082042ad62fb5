//! The programs that go into guests: our own PID 1, built from `guest/init`, the agent, and busybox from Debian's static package.

use crate::cache::Cache;
use crate::debian;
use crate::initramfs;
use crate::run::{Tool, say};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// With this C library a static program is half as large.
const AGENT_TARGET: &str = "x86_64-unknown-linux-musl";

/// The most that the agent may have in bytes: it goes into every initramfs.
const MAX_AGENT: u64 = 1 << 20;

/// Which of `guest/init`'s programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// The whole PID 1.
    Full,
    /// Marker and power-off only.
    Tiny,
    /// No PID 1: starts another kernel from the running one.
    Kexec,
    /// No PID 1: says what happens in folders.
    Inotify,
    /// No PID 1: talks to the host over vsock.
    Vsock,
}

/// Builds PID 1: static, without libc, its own entry point. The path of the program.
pub fn init(which: Init) -> Result<PathBuf> {
    let name = match which {
        Init::Full => "guest-init",
        Init::Tiny => "guest-tiny",
        Init::Kexec => "guest-kexec",
        Init::Inotify => "guest-inotify",
        Init::Vsock => "guest-vsock",
    };
    let (tool, target) = cargo(TARGET, "s")?;
    tool.args(["--package", "guest-init", "--bin", name, "--features", "freestanding"])
        .args(["--", "-C", "relocation-model=static"])
        .args([
            "-C",
            "link-args=-nostartfiles -nostdlib -static -Wl,--build-id=none,-z,norelro,-z,noseparate-code",
        ])
        // What flags the caller set for their own programs (sanitizers, coverage) cannot work here.
        .env("RUSTFLAGS", "")
        .env("CARGO_ENCODED_RUSTFLAGS", "")
        .quiet()
        .with_context(|| format!("build {name}"))?;
    Ok(target.join(TARGET).join("release").join(name))
}

/// Builds the agent: one static program. The path of it.
///
/// # Errors
/// It does not build, or it is larger than it may be.
pub fn agent() -> Result<PathBuf> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let libraries = Tool::new(&rustc).args(["--print", "target-libdir", "--target", AGENT_TARGET]).output();
    let mut platform = AGENT_TARGET;
    if !libraries.is_ok_and(|path| Path::new(path.trim()).exists()) {
        say(format_args!("adding Rust's target {AGENT_TARGET}"));
        if let Err(error) = Tool::new("rustup").args(["target", "add", AGENT_TARGET]).quiet() {
            // A distribution's Rust, or no way to fetch it.
            say(format_args!("the agent gets glibc, and twice the size, for want of that target: {error:#}"));
            platform = TARGET;
        }
    }
    const FLAGS: &str = "-Crelocation-model=static\x1f-Ctarget-feature=+crt-static";
    let (tool, target) = cargo(platform, "z")?;
    tool.args(["--package", "guest-agent", "--bin", "vmm-agent", "--config", "profile.release.lto='fat'"])
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS)
        .quiet()
        .context("build the agent")?;
    let program = target.join(platform).join("release/vmm-agent");
    let size = fs::metadata(&program).context("the agent was not built")?.len();
    let most = if platform == AGENT_TARGET { MAX_AGENT } else { 2 * MAX_AGENT };
    ensure!(size <= most, "the agent has {size} bytes; {most} is what it may have");
    Ok(program)
}

/// Builds the agent, and writes it to `out`.
///
/// # Errors
/// As [`agent`], or `out` cannot be written.
pub fn write_agent(out: &Path) -> Result<()> {
    let program = fs::read(agent()?).context("read the agent")?;
    initramfs::write_whole(out, &program)?;
    fs::set_permissions(out, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {} a program", out.display()))
}

/// Cargo as it builds one small program for `platform`, and the folder that it does that in: one of its own, for other flags, and so
/// that nobody waits for whoever builds the monitor meanwhile.
fn cargo(platform: &str, optimize: &str) -> Result<(Tool, PathBuf)> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace's folder")?;
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace.join(folder),
        None => workspace.join("target"),
    }
    .join("guest-init");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let tool = Tool::new(&cargo)
        .args(["rustc", "--quiet", "--release", "--target", platform, "--target-dir"])
        .arg(&target)
        .args(["--config", "profile.release.panic='abort'", "--config"])
        .arg(format!("profile.release.opt-level='{optimize}'"))
        .args(["--config", "profile.release.debug=0", "--config", "profile.release.strip='symbols'"])
        .dir(workspace);
    Ok((tool, target))
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
