//! Installs into a disk image, by debugfs (e2fsprogs), which needs neither root nor a mount. What is there before and after is read
//! by ourselves: debugfs tells of no failure by its exit code.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow};
use bootdisk::bytes::{u16_at, u32_at};
use bootdisk::partition::{self, Partition};
use bootdisk::volume::{Kind, Volume};
use rustix::fs::OFlags;

use super::{Content, Entry, Init, bad, files};
use vmm_command::{Code, Failure, Scratch};
use vmm_monitor::config::Disk as Config;
use vmm_monitor::config::host_path::quoted;
use vmm_monitor::disk::{self, Raw};

/// What users who are not root may not have in their PATH.
const DEBUGFS: [&str; 3] = ["debugfs", "/usr/sbin/debugfs", "/sbin/debugfs"];

/// Bytes for folders, the unit and the file system's own blocks, beside the program.
const OVERHEAD: u64 = 256 << 10;

/// Installs `program`, and what has the init of the guest start it, which is returned.
pub fn install(path: &Path, program: &[u8]) -> Result<Init, Failure> {
    // For as long as this lives no virtual machine can have the image.
    let _lock = Raw::open(&config(path)).map_err(|error| unusable(path, error))?;
    let image = Image::open(path).map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("open disk image {}", path.display()));
        Failure::new(Code::BadArgument, error).hint(Some("if it is mounted, unmount it first"))
    })?;
    let named = |text: &str| format!("disk image {}: {text}", path.display());
    let volume = root(&image).map_err(|text| {
        let hint =
            "a guest that runs is installed into from inside (docs/agent.md), a mounted root by --root DIR";
        bad(named(&text)).hint(Some(hint))
    })?;
    let init = Init::find(|path| volume.find(path.as_bytes()).is_ok())?;
    ready(&image, volume.partition, program).map_err(|(text, hint)| bad(named(&text)).hint(Some(hint)))?;

    let entries = files(program, init);
    let made = missing_folders(&volume, &entries);
    let failed = |error: anyhow::Error| {
        Failure::new(Code::Host, error.context(format!("install the agent into {}", path.display())))
    };
    let scratch = Scratch::new("install").context("make a temporary folder").map_err(failed)?;
    let debugfs = Debugfs { image: &image, scratch: scratch.path(), offset: volume.partition.start };
    for (number, entry) in entries.iter().enumerate() {
        if let Content::File { bytes, .. } = entry.content {
            fs::write(scratch.path().join(number.to_string()), bytes)
                .context("copy a file")
                .map_err(failed)?;
        }
    }
    let said = debugfs.run(&script(&volume, &entries, &made))?;
    match entries.iter().find(|entry| !holds(&volume, entry)) {
        None => image.file.sync_all().context("write it to the disk").map_err(failed).map(|()| init),
        Some(entry) => {
            let files = entries.iter().rev().map(|entry| format!("rm {}", entry.path));
            let undo: Vec<String> =
                files.chain(made.iter().rev().map(|folder| format!("rmdir {folder}"))).collect();
            debugfs.run(&undo)?;
            let error = anyhow!("debugfs did not write {}: {said}", entry.path);
            Err(failed(error).hint(Some(format!("check the file system: e2fsck -f {}", quoted(path)))))
        }
    }
}

fn config(path: &Path) -> Config {
    Config::at(path.to_owned())
}

fn unusable(path: &Path, error: disk::Error) -> Failure {
    let hint = match &error {
        disk::Error::Locked { .. } => Some(
            "stop the virtual machine that has it (vmm list), or install from inside (docs/agent.md)"
                .to_owned(),
        ),
        disk::Error::Foreign { format, .. } => Some(format.advice(path)),
        // What the error itself would have one try makes a disk of it, and no guest's.
        disk::Error::Size { .. } | disk::Error::NotAnImage { .. } => {
            Some("name the raw disk image of a guest (docs/agent.md)".to_owned())
        }
        disk::Error::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Some("check the path".to_owned())
        }
        _ => error.hint(),
    };
    Failure::new(Code::BadArgument, error).hint(hint)
}

/// The image as it is read.
struct Image {
    file: File,
    size: u64,
}

impl Image {
    fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if fs::metadata(path)?.file_type().is_block_device() {
            // Of a block device it means: unless it is mounted.
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let mut file = options.open(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl bootdisk::Disk for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> bootdisk::Result<()> {
        self.file.read_exact_at(into, offset).map_err(|_| bootdisk::Error::Read)
    }
}

/// The file system that is the guest's root.
fn root(image: &Image) -> Result<Volume<'_>, String> {
    let partitions = partition::find(image).map_err(|error| error.to_string())?;
    let volumes = partitions.all().iter().filter_map(|partition| Volume::open(image, *partition).ok());
    let mut roots = volumes.filter(|volume| {
        volume.kind().starts_with("ext") && volume.find(b"/etc").is_ok_and(|node| node.kind == Kind::Folder)
    });
    match (roots.next(), roots.next()) {
        (Some(root), None) => Ok(root),
        (Some(one), Some(other)) => Err(format!(
            "partitions {} and {} could both be the guest's root",
            one.partition.number, other.partition.number
        )),
        (None, _) => Err("no ext2, ext3 or ext4 file system with a guest's root".to_owned()),
    }
}

/// Whether the file system can be written to as it is: what is wrong, and what to try.
fn ready(image: &Image, partition: Partition, program: &[u8]) -> Result<(), (String, &'static str)> {
    // The superblock (the kernel's Documentation/filesystems/ext4/super.rst).
    const VALID: u16 = 1;
    const ERRORS: u16 = 2;
    const RECOVER: u32 = 4;
    let mut superblock = [0; 1024];
    let unread = |_| ("cannot read its superblock".to_owned(), "see what the host says: dmesg");
    bootdisk::Disk::read(image, partition.start.saturating_add(1024), &mut superblock).map_err(unread)?;
    let (state, features) = (u16_at(&superblock, 0x3a), u32_at(&superblock, 0x60));
    if features & RECOVER != 0 || state & (VALID | ERRORS) != VALID {
        let text = "its file system was not unmounted cleanly, or is in use";
        return Err((text.to_owned(), "boot the guest once, and shut it down: vmm stop NAME"));
    }
    let block = 1024u64.checked_shl(u32_at(&superblock, 0x18)).unwrap_or(0);
    let (low, high) = (u32_at(&superblock, 0xc), u32_at(&superblock, 0x158));
    // The upper half means something with the feature 64bit alone, but is zero without.
    let free = (u64::from(high) << 32 | u64::from(low)).saturating_mul(block);
    let wanted = (program.len() as u64).saturating_add(OVERHEAD);
    match free < wanted {
        true => Err((
            format!("{} KiB are free in its file system, and the agent needs {}", free >> 10, wanted >> 10),
            "make room in the guest, or grow its file system (resize2fs)",
        )),
        false => Ok(()),
    }
}

/// The folders that `entries` need and the guest lacks, each after what it is in.
fn missing_folders(volume: &Volume, entries: &[Entry<'_>]) -> Vec<String> {
    let mut missing: Vec<String> = Vec::new();
    for entry in entries {
        let folders: Vec<&Path> = Path::new(entry.path).ancestors().skip(1).collect();
        for folder in folders.into_iter().rev().map(|folder| folder.display().to_string()) {
            if volume.find(folder.as_bytes()).is_err() && !missing.contains(&folder) {
                missing.push(folder);
            }
        }
    }
    missing
}

/// What debugfs is to do. What starts the agent is the first to go, and the last to come.
fn script(volume: &Volume, entries: &[Entry<'_>], folders: &[String]) -> Vec<String> {
    let is_there = |path: &[u8]| volume.find(path).is_ok() || volume.link(path).is_ok();
    let old = entries.iter().rev().filter(|entry| is_there(entry.path.as_bytes()));
    let mut lines: Vec<String> = old.map(|entry| format!("rm {}", entry.path)).collect();
    for folder in folders {
        lines.push(format!("mkdir {folder}"));
        lines.extend(owned(folder, 0o040_755));
    }
    for (number, entry) in entries.iter().enumerate() {
        match entry.content {
            Content::File { mode, .. } => {
                lines.push(format!("write {number} {}", entry.path));
                lines.extend(owned(entry.path, 0o100_000 | u32::from(mode)));
            }
            Content::Link(to) => lines.push(format!("symlink {} {to}", entry.path)),
        }
    }
    lines
}

/// Gives `path` to root, with `mode`.
fn owned(path: &str, mode: u32) -> [String; 3] {
    [("mode", mode), ("uid", 0), ("gid", 0)]
        .map(|(field, value)| format!("set_inode_field {path} {field} 0{value:o}"))
}

/// Whether the guest has `entry`, byte for byte.
fn holds(volume: &Volume, entry: &Entry<'_>) -> bool {
    match entry.content {
        Content::Link(to) => {
            volume.link(entry.path.as_bytes()).is_ok_and(|found| found.bytes() == to.as_bytes())
        }
        Content::File { bytes, .. } => {
            let mut found = vec![0; bytes.len()];
            volume.read_file(entry.path.as_bytes(), &mut found).is_ok_and(|found| found == bytes)
        }
    }
}

/// The program that writes into the file system at `offset` of the image.
struct Debugfs<'a> {
    image: &'a Image,
    /// Has the files to be written, by their numbers.
    scratch: &'a Path,
    offset: u64,
}

impl Debugfs<'_> {
    /// Has it do what `script` says; what it complains of.
    fn run(&self, script: &[String]) -> Result<String, Failure> {
        let host = |error: anyhow::Error| Failure::new(Code::Host, error);
        fs::write(self.scratch.join("script"), script.join("\n")).context("write a script").map_err(host)?;
        for program in DEBUGFS {
            let image = self.image.file.try_clone().context("open the image again").map_err(host)?;
            let mut command = Command::new(program);
            // The image by its descriptor: it is the one that was looked at, and its path may have a question mark.
            command.args(["-w", "-f", "script"]).arg(format!("/dev/fd/0?offset={}", self.offset));
            command.current_dir(self.scratch).stdin(image).stdout(Stdio::null()).stderr(Stdio::piped());
            match command.spawn() {
                Ok(child) => {
                    let output = child.wait_with_output().context("run debugfs").map_err(host)?;
                    let said = String::from_utf8_lossy(&output.stderr);
                    // Its first line is its version.
                    let lines: Vec<&str> =
                        said.lines().filter(|line| !line.starts_with("debugfs ")).collect();
                    return Ok(lines.join("; "));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(host(anyhow::Error::new(error).context("run debugfs"))),
            }
        }
        Err(host(anyhow!("there is no debugfs on this host, which writes into the image"))
            .hint(Some("install it: apt-get install e2fsprogs")))
    }
}
