//! Debian's packages: what is installed, what is available, fetching and unpacking without installing. Called by all that
//! build. Everything comes from the machine's own apt sources, so signatures are checked as apt is set up to.

use crate::run::{Tool, say};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Package lists older than this are fetched again before something new is looked for.
const LISTS_FRESH: Duration = Duration::from_secs(3 * 24 * 3600);

/// Installs those of `packages` that are missing, and says so.
pub fn ensure_installed(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    say(format_args!("installing {} by apt-get", missing.join(" ")));
    refresh_lists(false)?;
    Tool::as_root("apt-get")
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .quiet()
        .with_context(|| format!("install {} (needs root; by hand: apt-get install {0})", missing.join(" ")))
}

fn is_installed(package: &str) -> bool {
    Tool::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}\n", package])
        .output()
        .is_ok_and(|status| status.lines().any(|line| line == "installed"))
}

/// Runs `apt-get update` if the lists are missing, older than some days, or `now` is asked for.
pub fn refresh_lists(now: bool) -> Result<()> {
    let newest = fs::read_dir("/var/lib/apt/lists")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
        .filter_map(|entry| entry.metadata().and_then(|data| data.modified()).ok())
        // A list keeps the server's time stamp; partial/ is touched at each update.
        .chain(fs::metadata("/var/lib/apt/lists/partial").and_then(|data| data.modified()).ok())
        .max();
    let has_lists = newest.is_some() && available("base-files").is_some();
    let fresh = has_lists && newest.is_some_and(|time| time.elapsed().is_ok_and(|age| age < LISTS_FRESH));
    if fresh && !now {
        return Ok(());
    }
    say("fetching package lists (apt-get update)");
    let updated = Tool::as_root("apt-get").args(["update", "-q"]).quiet();
    match updated {
        Err(error) if has_lists => {
            say(format_args!("going on with the old lists: {error:#}"));
            Ok(())
        }
        other => other.context("fetch package lists"),
    }
}

/// The version that apt would install.
pub fn available(package: &str) -> Option<String> {
    let policy = Tool::new("apt-cache").args(["policy", package]).output().ok()?;
    candidate(&policy)
}

/// The package that `package` depends on first, by its name's beginning and end.
pub fn dependency(package: &str, prefix: &str, suffix: &str) -> Result<String> {
    let text = Tool::new("apt-cache")
        .args(["depends", "--no-recommends", "--no-suggests", package])
        .output()
        .with_context(|| format!("look up what {package} depends on"))?;
    first_dependency(&text, prefix, suffix).with_context(|| {
        format!("{package} does not depend on any {prefix}*{suffix}; this is made for Debian 12 (bookworm)")
    })
}

/// The package with the highest number between `prefix` and `suffix` in its name.
pub fn newest(prefix: &str, suffix: &str) -> Result<String> {
    let names = Tool::new("apt-cache").args(["pkgnames", prefix]).output().context("look for packages")?;
    highest(&names, prefix, suffix)
        .with_context(|| format!("no package {prefix}*{suffix}; this is made for Debian 12 (bookworm)"))
}

/// Fetches a package into `folder` without installing it.
pub fn download(package: &str, folder: &Path) -> Result<PathBuf> {
    say(format_args!("fetching package {package}"));
    let fetch = || {
        // Without the sandbox user: it may not write into folders of ours, and apt would only warn and go on.
        Tool::new("apt-get")
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
            .dir(folder)
            .quiet()
    };
    if fetch().is_err() {
        // Lists that name a version which the mirror has replaced since.
        refresh_lists(true)?;
        fetch().with_context(|| format!("fetch package {package}"))?;
    }
    let prefix = format!("{package}_");
    fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
        .with_context(|| format!("apt-get left no {prefix}*.deb"))
}

/// Unpacks a package's files under `folder`.
pub fn unpack(package: &Path, folder: &Path) -> Result<()> {
    Tool::new("dpkg-deb").arg("-x").arg(package).arg(folder).quiet().context("unpack a package")
}

/// Fetches and unpacks in one go.
pub fn download_and_unpack(package: &str, folder: &Path) -> Result<()> {
    let at = tempfile::tempdir_in(folder.parent().context("a folder to unpack in")?)?;
    unpack(&download(package, at.path())?, folder)
}

/// Fails early, with a reason, where there is no apt.
pub fn check_host() -> Result<()> {
    if Tool::new("apt-get").arg("--version").quiet().is_err() {
        bail!("guests are built from Debian's packages, and this machine has no apt-get");
    }
    Ok(())
}

fn candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn first_dependency(text: &str, prefix: &str, suffix: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix) && name.ends_with(suffix))
        .map(str::to_owned)
}

fn highest(names: &str, prefix: &str, suffix: &str) -> Option<String> {
    let number = |name: &str| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse::<u32>().ok();
    let numbered = names.lines().filter_map(|name| Some((number(name)?, name)));
    numbered.max().map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_apt_cache_are_understood() {
        let policy = "linux-source-6.1:\n  Installed: (none)\n  Candidate: 6.1.192-2\n  Version table:\n";
        assert_eq!(candidate(policy).as_deref(), Some("6.1.192-2"));
        assert_eq!(candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
        let depends =
            "linux-image-cloud-amd64\n  Depends: other\n |Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(
            first_dependency(depends, "linux-image-", "-cloud-amd64").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(first_dependency(depends, "linux-image-6.12", ""), None);
        let names = "i-6.12.9+deb12-amd64\ni-6.12.117+deb12-amd64\ni-6.12.120+deb12-cloud-amd64\ni-6.12.118+deb12-amd64-dbg\n";
        assert_eq!(highest(names, "i-6.12.", "+deb12-amd64").as_deref(), Some("i-6.12.117+deb12-amd64"));
        assert_eq!(highest(names, "i-6.13.", "+deb12-amd64"), None);
    }

    #[test]
    fn a_package_that_cannot_exist_is_not_installed() {
        assert!(!is_installed("no-such-package-at-all"));
    }
}
