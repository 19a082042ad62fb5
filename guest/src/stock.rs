//! Debian's stock cloud kernel, fetched as a package and unpacked without installing it. Called by `Kernel::get`.

use crate::cache::Cache;
use crate::debian;
use crate::kernel::Kernel;
use crate::run::{Tool, say};
use anyhow::{Context, Result};
use std::fs;

/// The package that always depends on the newest image.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// The cached one, or else the newest. With `refresh` the newest.
pub fn get(refresh: bool) -> Result<Kernel> {
    let cache = Cache::open("stock")?;
    if let Some(folder) = cache.current().filter(|_| !refresh) {
        return Kernel::open(&folder);
    }
    debian::check_host()?;
    debian::refresh_lists(refresh)?;
    let package = debian::dependency(META_PACKAGE, "linux-image-6.1.", "-cloud-amd64")?;
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
