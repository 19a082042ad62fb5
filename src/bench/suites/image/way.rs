//! The image, and the ways to an instance of it.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::statvfs;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::rivals::Setting;
use crate::rivals::command::{found, prepare, version};

/// The image: so many files of 1 MiB, which nothing compresses, in a folder and one behind the other in one file.
pub const FILES: usize = 48;
pub const MIB: usize = 1 << 20;
/// The file that each instance writes anew, with the same content.
pub const WRITTEN: usize = 7;
/// The image and the folder for its instances.
#[derive(Debug, Clone)]
pub struct Image {
    /// One file.
    pub file: PathBuf,
    /// The same in files.
    pub folder: PathBuf,
    pub instances: PathBuf,
    /// What is written anew.
    pub data: Vec<u8>,
}

impl Image {
    pub fn make(at: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("make an image in {}: {error}", at.display());
        let (file, folder, instances) = (at.join("image.raw"), at.join("image"), at.join("instances"));
        fs::create_dir_all(&folder).and_then(|()| fs::create_dir_all(&instances)).map_err(failed)?;
        let mut whole = fs::File::create(&file).map_err(failed)?;
        let mut written = Vec::new();
        for number in 0..FILES {
            let mut data = vec![0; MIB];
            let mut rest = &mut data[..];
            while !rest.is_empty() {
                let count = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())
                    .map_err(|error| failed(error.into()))?;
                rest = &mut rest[count..];
            }
            whole.write_all(&data).map_err(failed)?;
            fs::write(folder.join(number.to_string()), &data).map_err(failed)?;
            if number == WRITTEN {
                written = data;
            }
        }
        // What is copied from is on disk: no one pays for its way there.
        whole.sync_all().map_err(failed)?;
        Ok(Self { file, folder, instances, data: written })
    }

    /// Free bytes where the instances are.
    pub fn room(&self) -> Result<u64, String> {
        let space = statvfs(&self.instances)
            .map_err(|error| format!("statvfs {}: {error}", self.instances.display()))?;
        Ok(space.f_bavail * space.f_frsize)
    }
}

/// A way to an instance.
#[derive(Debug, Clone)]
pub enum Way {
    Copy,
    Reflink,
    Overlay,
    /// By this qemu-img, written to by this qemu-io; or why not.
    Qcow2(Result<(PathBuf, PathBuf), String>),
    Shared,
}

impl Way {
    pub fn all(setting: &Setting) -> [Self; 5] {
        let tools = || {
            let tool = |name| {
                let (path, there) = found(setting, name);
                there.map(|()| path)
            };
            Ok((tool("qemu-img")?, tool("qemu-io")?))
        };
        [Self::Copy, Self::Reflink, Self::Overlay, Self::Qcow2(tools()), Self::Shared]
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Copy => "full copy",
            Self::Reflink => "reflink",
            Self::Overlay => "overlayfs",
            Self::Qcow2(_) => "qcow2 overlay",
            Self::Shared => "vmm, one read-only disk",
        }
    }

    /// What is done to make one.
    pub fn command(&self) -> &'static str {
        match self {
            Self::Copy => "cp --reflink=never image.raw disk",
            Self::Reflink => "cp --reflink=always image.raw disk",
            Self::Overlay => "mount(2) overlay: lowerdir=image,upperdir=upper,workdir=work",
            Self::Qcow2(_) => "qemu-img create -f qcow2 -F raw -b image.raw disk",
            Self::Shared => {
                "nothing is made: vmm --disk image.raw,readonly opens it; written data stays in guest memory"
            }
        }
    }

    /// Of the program that does it, if it tells.
    pub fn version(&self) -> Option<String> {
        match self {
            Self::Qcow2(Ok((tool, _))) => version(tool, &["--version"]),
            _ => None,
        }
    }

    /// Bytes that an instance may need.
    pub fn room(&self) -> u64 {
        let files = if matches!(self, Self::Copy) { FILES } else { 2 };
        (files * MIB) as u64
    }

    /// Makes one in `at`, an empty folder.
    pub fn make(&self, image: &Image, at: &Path) -> Result<(), String> {
        match self {
            Self::Copy => copy(image, at, "never"),
            Self::Reflink => copy(image, at, "always"),
            Self::Overlay => {
                let failed = |error: std::io::Error| format!("mount an overlay on {}: {error}", at.display());
                for folder in ["upper", "work", "merged"] {
                    fs::create_dir(at.join(folder)).map_err(failed)?;
                }
                let options = format!(
                    "lowerdir={},upperdir={},workdir={}",
                    image.folder.display(),
                    at.join("upper").display(),
                    at.join("work").display()
                );
                let options = std::ffi::CString::new(options).map_err(|error| failed(error.into()))?;
                mount("overlay", at.join("merged"), "overlay", MountFlags::empty(), &*options)
                    .map_err(|error| failed(error.into()))
            }
            Self::Qcow2(tools) => {
                let mut command = Command::new(&tools.as_ref().map_err(Clone::clone)?.0);
                command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
                command.arg(&image.file).arg(at.join("disk"));
                prepare(command).map(drop)
            }
            Self::Shared => {
                let opened = fs::File::open(&image.file);
                opened.map(drop).map_err(|error| format!("open {}: {error}", image.file.display()))
            }
        }
    }

    /// Writes one of the image's files anew in the instance.
    pub fn write(&self, image: &Image, at: &Path) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("write in {}: {error}", at.display());
        match self {
            Self::Copy | Self::Reflink => {
                let mut disk = fs::OpenOptions::new().write(true).open(at.join("disk")).map_err(failed)?;
                disk.seek(SeekFrom::Start((WRITTEN * MIB) as u64)).map_err(failed)?;
                disk.write_all(&image.data).map_err(failed)
            }
            Self::Overlay => {
                fs::write(at.join("merged").join(WRITTEN.to_string()), &image.data).map_err(failed)
            }
            Self::Qcow2(tools) => {
                let mut command = Command::new(&tools.as_ref().map_err(Clone::clone)?.1);
                let order =
                    format!("write -q -s {} {WRITTEN}M 1M", image.folder.join(WRITTEN.to_string()).display());
                command.args(["-f", "qcow2", "-c", &order]).arg(at.join("disk"));
                prepare(command).map(drop)
            }
            Self::Shared => Ok(()),
        }
    }

    /// Takes down what is not a file.
    pub fn unmake(&self, at: &Path) {
        if matches!(self, Self::Overlay) {
            let _ = unmount(at.join("merged"), UnmountFlags::DETACH);
        }
    }
}

fn copy(image: &Image, at: &Path, reflink: &str) -> Result<(), String> {
    let mut command = Command::new("cp");
    command.arg(format!("--reflink={reflink}")).arg(&image.file).arg(at.join("disk"));
    prepare(command).map(drop)
}
