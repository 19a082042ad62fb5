//! Builds ext4 root images: from a folder, or a small Debian by debootstrap. mke2fs fills the image itself, so nothing is
//! mounted; only debootstrap needs root.

use crate::cache::Cache;
use crate::debian;
use crate::programs::{self, Init};
use crate::run::{Tool, say};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

const SUITE: &str = "bookworm";

/// Where the files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder of the host, as it is.
    Folder(PathBuf),
    /// Debian's minimal set and these packages, with our init as /sbin/init.
    Debian {
        /// Packages beyond debootstrap's minbase.
        include: Vec<String>,
    },
}

/// What to build.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The files.
    pub source: Source,
    /// The image's size, as mke2fs takes it: `512M`, `2G`.
    pub size: String,
    /// The file system's label.
    pub label: String,
}

impl Recipe {
    /// Writes the image to `out`, by way of a temporary file beside it. It is sparse.
    pub fn write(&self, out: &Path) -> Result<()> {
        debian::ensure_installed(&["e2fsprogs"])?;
        match &self.source {
            Source::Folder(folder) => self.make_image(folder, out),
            Source::Debian { include } => {
                let archive = debian_archive(include)?;
                let cache = Cache::open("unpacked")?;
                let work = cache.workplace()?;
                let root = work.path().join("root");
                fs::create_dir(&root)?;
                unarchive(&archive, &root)?;
                add_init(&root)?;
                self.make_image(&root, out)
            }
        }
    }

    fn make_image(&self, folder: &Path, out: &Path) -> Result<()> {
        if !folder.is_dir() {
            bail!("{} is no folder", folder.display());
        }
        let beside = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let image = tempfile::Builder::new().suffix(".ext4").tempfile_in(beside)?;
        Tool::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-L", &self.label, "-d"])
            .arg(folder)
            // Initialised here, where it costs nothing, and not by a thread in the running guest.
            .args(["-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"])
            .arg(image.path())
            .arg(&self.size)
            .quiet()
            .with_context(|| {
                format!("make an ext4 image of {} with {} (a larger --size?)", folder.display(), self.size)
            })?;
        fs::set_permissions(image.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        image.persist(out).with_context(|| format!("write {}", out.display()))?;
        Ok(())
    }
}

/// The cached tar file of a small Debian.
pub(crate) fn debian_archive(include: &[String]) -> Result<PathBuf> {
    let mut include = include.to_vec();
    include.sort();
    include.dedup();
    if let Some(bad) = include.iter().find(|name| !is_package_name(name)) {
        bail!("{bad:?} is no package name");
    }
    let cache = Cache::open("debian")?;
    let name = [&[SUITE.to_owned()], include.as_slice()].concat().join("_");
    if let Some(folder) = cache.get(&name) {
        return Ok(folder.join("root.tar"));
    }
    debian::check_host()?;
    debian::ensure_installed(&["debootstrap"])?;
    let work = cache.workplace()?;
    let (root, item) = (work.path().join("root"), work.path().join("item"));
    fs::create_dir(&item)?;
    say(format_args!(
        "building a small Debian by debootstrap ({SUITE}, minbase {}); a minute or two, once",
        include.join(" ")
    ));
    let mut tool = Tool::as_root("debootstrap").args(["--variant=minbase", "--merged-usr"]);
    if !include.is_empty() {
        tool = tool.arg(format!("--include={}", include.join(",")));
    }
    tool.arg(SUITE).arg(&root).quiet().context("debootstrap")?;
    // Downloaded packages and lists are a third of it, and can be had again.
    Tool::as_root("tar")
        .args([
            "--numeric-owner",
            "--sort=name",
            "--exclude=./var/cache/apt",
            "--exclude=./var/lib/apt/lists",
        ])
        .args(["--exclude=./dev/*", "-C"])
        .arg(&root)
        .arg("-cf")
        .arg(item.join("root.tar"))
        .arg(".")
        .quiet()?;
    Tool::as_root("rm").args(["-rf", "--one-file-system"]).arg(&root).quiet()?;
    Ok(cache.publish(&item, &name)?.join("root.tar"))
}

/// Unpacks with the owners as they are, which takes root.
pub(crate) fn unarchive(archive: &Path, root: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a Debian root belongs to root, and only root can unpack it so: run this by sudo");
    }
    Tool::new("tar")
        .args(["--numeric-owner", "-C"])
        .arg(root)
        .arg("-xpf")
        .arg(archive)
        .quiet()
        .context("unpack Debian")
}

/// Our init as /sbin/init, and the few files that make a shell pleasant.
pub(crate) fn add_init(root: &Path) -> Result<()> {
    let init = programs::init(Init::Full)?;
    fs::copy(&init, root.join("usr/sbin/guest-init")).context("copy init")?;
    let link = root.join("usr/sbin/init");
    if link.symlink_metadata().is_err() {
        std::os::unix::fs::symlink("guest-init", &link).context("link /sbin/init")?;
    }
    fs::write(root.join("etc/hostname"), "guest\n")?;
    fs::write(root.join("etc/fstab"), "# init mounts what is needed\n")?;
    for folder in ["dev", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    Ok(())
}

/// Debian policy 5.6.7.
fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte))
}
