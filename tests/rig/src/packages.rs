//! What the rig needs from Debian: QEMU, virtiofsd and decompressors installed, the outer
//! kernel's package fetched without installing it. Called before anything is started; knows only
//! apt and dpkg.

use crate::options::Options;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// QEMU's program.
pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// The vhost-user file server, as Debian 12 ships it.
pub const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Programs and the packages that hold them.
const TOOLS: [(&str, &str); 4] = [
    (QEMU, "qemu-system-x86"),
    (VIRTIOFSD, "qemu-system-common"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/zstd", "zstd"),
];

const KERNEL_PREFIX: &str = "linux-image-6.12.";
const KERNEL_SUFFIX: &str = "+deb12-cloud-amd64";

/// Installs what is missing of the programs that the rig runs.
pub fn ensure_tools(options: &Options) -> Result<()> {
    let mut missing: Vec<_> = TOOLS
        .iter()
        .filter(|(program, _)| !Path::new(program).exists())
        .map(|&(_, package)| package)
        .collect();
    missing.dedup();
    // virtiofsd changes its root folder, so the rig needs root even when all is installed.
    ensure!(
        rustix::process::geteuid().is_root(),
        "the rig needs root here (this host's KVM runs no Linux guests, so a machine is emulated, \
         and its file server changes its root folder){}; run it by sudo",
        match missing.as_slice() {
            [] => String::new(),
            _ => format!("; to be installed: {}", missing.join(" ")),
        }
    );
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "the rig installs {} by apt-get, which this system has not; it is made for Debian 12",
        missing.join(" ")
    );
    options.say(format!("installing {} by apt-get", missing.join(" ")));
    let install = || {
        apt(Command::new("apt-get")
            .args(["install", "--yes", "--quiet", "--no-install-recommends"])
            .args(&missing))
    };
    install().or_else(|_| update(options).and_then(|()| install()))?;
    for (program, package) in TOOLS {
        ensure!(
            Path::new(program).exists(),
            "package {package} holds no {program} here; the rig is made for Debian 12"
        );
    }
    Ok(())
}

/// Fetches the newest kernel package into `folder`; its kernel's release and the file.
pub fn fetch_kernel(options: &Options, folder: &Path) -> Result<(String, PathBuf)> {
    let fetch = || -> Result<String> {
        let package = newest_kernel()?;
        options.say(format!("fetching {package}"));
        apt(Command::new("apt-get").args(["download", "--quiet", &package]).current_dir(folder))?;
        Ok(package)
    };
    let package = fetch().or_else(|_| update(options).and_then(|()| fetch()))?;
    let file = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "deb"))
        .context("apt-get download left no package")?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    Ok((release, file))
}

/// Unpacks `package` into `folder` without installing it.
pub fn unpack(package: &Path, folder: &Path) -> Result<()> {
    capture(Command::new("dpkg-deb").arg("-x").args([package, folder])).map(drop)
}

/// What `command` writes to its standard output; an error when it fails.
pub fn capture(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, text.trim_end());
    }
    Ok(output.stdout)
}

fn apt(command: &mut Command) -> Result<()> {
    capture(command.env("DEBIAN_FRONTEND", "noninteractive")).map(drop)
}

fn update(options: &Options) -> Result<()> {
    options.say("bringing apt's package lists up to date");
    apt(Command::new("apt-get").args(["update", "--quiet"]))
}

fn newest_kernel() -> Result<String> {
    let names = capture(Command::new("apt-cache").args(["pkgnames", KERNEL_PREFIX]))?;
    newest(&String::from_utf8_lossy(&names))
        .with_context(|| format!("apt knows no package {KERNEL_PREFIX}*{KERNEL_SUFFIX}"))
}

/// The cloud kernel with the highest version among package names, one a line.
fn newest(names: &str) -> Option<String> {
    let version = |name: &str| -> Option<u32> {
        let middle = name.strip_prefix(KERNEL_PREFIX)?.strip_suffix(KERNEL_SUFFIX)?;
        middle.parse().ok()
    };
    let (_, name) = names.lines().filter_map(|name| Some((version(name)?, name))).max()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn newest_kernel_is_by_number_and_of_the_right_kind() {
        let names = "linux-image-6.12.99+deb12-cloud-amd64\n\
                     linux-image-6.12.117+deb12-cloud-amd64\n\
                     linux-image-6.12.118+deb12-amd64\n\
                     linux-image-6.12.119+deb12-cloud-amd64-dbg\n";
        let newest = super::newest(names);
        assert_eq!(newest.as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(super::newest("linux-image-6.1.0\n"), None);
    }
}
