//! Debian's stock kernels, fetched as a package and unpacked without installing it. Called by `Kernel::get`.

use crate::cache::Cache;
use crate::debian;
use crate::kernel::{Kernel, Kind};
use crate::run::{Tool, say};
use anyhow::{Context, Result};
use std::fs;

/// The package with the newest image. A package without a version always depends on that of 6.1; Debian has none for those that it
/// brings to an older release.
fn newest(kind: Kind) -> Result<String> {
    match kind {
        Kind::Generic61 => debian::dependency("linux-image-amd64", "linux-image-6.1.", "-amd64"),
        Kind::Cloud612 => debian::newest("linux-image-6.12.", "+deb12-cloud-amd64"),
        Kind::Generic612 => debian::newest("linux-image-6.12.", "+deb12-amd64"),
        Kind::Stock | Kind::Tuned => {
            debian::dependency("linux-image-cloud-amd64", "linux-image-6.1.", "-cloud-amd64")
        }
    }
}

/// The cached one, or else the newest. With `refresh` the newest.
pub fn get(kind: Kind, refresh: bool) -> Result<Kernel> {
    let cache = Cache::open(kind.name())?;
    if let Some(folder) = cache.current().filter(|_| !refresh) {
        return Kernel::open(&folder);
    }
    debian::check_host()?;
    debian::refresh_lists(refresh)?;
    let package = newest(kind)?;
    let version = debian::available(&package).with_context(|| format!("no package {package}"))?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let name = format!("{release}_{version}");
    if let Some(folder) = cache.get(&name) {
        cache.set_current(&name)?;
        return Kernel::open(&folder);
    }

    debian::ensure_installed(&["kmod"])?;
    let work = cache.workplace()?;
    let unpacked = work.path().join("unpacked");
    fs::create_dir(&unpacked)?;
    debian::download_and_unpack(&package, &unpacked)?;
    // modules.dep is not in the package: its installation scripts would make it.
    Tool::new("depmod")
        .arg("-b")
        .arg(&unpacked)
        .arg(&release)
        .quiet()
        .context("list what modules depend on")?;

    let item = work.path().join("item");
    fs::create_dir(&item)?;
    let take = |from: String, to: &str| {
        fs::rename(unpacked.join(&from), item.join(to)).with_context(|| format!("{package} has no {from}"))
    };
    take(format!("boot/vmlinuz-{release}"), "bzImage")?;
    take(format!("boot/config-{release}"), "config")?;
    take(format!("lib/modules/{release}"), "modules")?;
    fs::write(item.join("release"), &release)?;
    let image = fs::read(item.join("bzImage"))?;
    fs::write(item.join("vmlinux"), crate::bzimage::vmlinux(&image)?)?;
    let folder = cache.publish(&item, &name)?;
    say(format_args!("Debian's kernel {release} (package version {version}) is unpacked"));
    Kernel::open(&folder)
}
