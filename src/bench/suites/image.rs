//! Disk: what instances on one image cost, by full copies and by everything that shares.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{merge, own_mounts};
use crate::bench::host::Host;
use crate::bench::measure::{self, Absent, Contender, INTERRUPTED, Plan, Quantity};
use crate::bench::result::{Better, Suite, Unit};
use crate::bench::rivals::Setting;
use crate::bench::rivals::command::{found, prepare, version};

/// Instances on the image.
const COUNTS: [usize; 3] = [1, 10, 50];
/// The image: so many files of 1 MiB, which nothing compresses, in a folder and one behind the other in one file.
const FILES: usize = 48;
const MIB: usize = 1 << 20;
/// The file that each instance writes anew, with the same content.
const WRITTEN: usize = 7;
/// All samples of one contender with one count of instances take no longer.
const BUDGET: Duration = Duration::from_secs(60);
/// Each sample makes all instances anew.
const SAMPLES: usize = 5;
/// Fewer say nothing of their spread.
const FEWEST: usize = 3;

const QUANTITIES: [Quantity; 2] = [
    Quantity { name: "on disk", unit: Unit::Kibibytes, better: Better::Lower },
    Quantity { name: "time to make", unit: Unit::Milliseconds, better: Better::Lower },
];

/// Runs the suite.
///
/// # Errors
/// The image cannot be made, or the clock counts instructions.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    if setting.repeatable_clock {
        return Err("an image's size is no matter of the clock, and takes long by this one".to_owned());
    }
    let host = Host::look(false);
    own_mounts();
    let image = Image::make(&setting.scratch.join("image"))?;
    let (mut ways, mut absent) = (Vec::new(), Vec::new());
    for way in Way::all(setting) {
        progress(0.0, way.name());
        let mut one = Instances { way: way.clone(), image: image.clone(), count: 1 };
        let start = Instant::now();
        match one.sample() {
            Ok(_) => ways.push((way, start.elapsed())),
            // What was interrupted did not fail.
            Err(_) if INTERRUPTED.load(Ordering::SeqCst) => break,
            Err(why) => absent.push(Absent { name: way.name().to_owned(), command: one.command(), why }),
        }
    }
    let (mut parts, mut left_out) = (Vec::new(), Vec::new());
    for (pass, count) in COUNTS.into_iter().enumerate() {
        let (mut samples, fewest) = (plan.samples.min(SAMPLES), plan.samples.min(FEWEST));
        let mut contenders: Vec<Box<dyn Contender>> = Vec::new();
        for (way, time) in &ways {
            let (time, room) = (*time * count as u32, way.room() * count as u64);
            if time * fewest as u32 > BUDGET {
                left_out.push(format!("{count} by {}: {:.0} s each", way.name(), time.as_secs_f64()));
            } else if room > image.room()? / 2 {
                left_out.push(format!("{count} by {}: {} MiB on disk", way.name(), room >> 20));
            } else {
                samples = samples.min((BUDGET.as_secs_f64() / time.as_secs_f64()) as usize).max(fewest);
                contenders.push(Box::new(Instances { way: way.clone(), image: image.clone(), count }));
            }
        }
        let mut part = |share: f64, whose: &str| {
            progress((pass as f64 + share) / COUNTS.len() as f64, &format!("{count} by {whose}"));
        };
        let plan = Plan { samples, warm_up: 0, seed: plan.seed.wrapping_add(count as u64) };
        let missing = if pass == 0 { &absent[..] } else { &[] };
        let (found, mut figures) = measure::series(&mut contenders, missing, &QUANTITIES, plan, &mut part);
        figures.iter_mut().for_each(|figure| figure.name = format!("{}, each of {count}", figure.name));
        figures.retain(|figure| !figure.series.is_empty());
        parts.push((found, figures));
        if INTERRUPTED.load(Ordering::SeqCst) {
            break;
        }
    }
    let (contenders, figures) = merge(parts);
    Ok(Suite {
        name: "image".to_owned(),
        title: "Disk: what an instance on a shared image costs".to_owned(),
        host,
        seed: plan.seed,
        method: method(&left_out),
        contenders,
        figures,
    })
}

fn method(left_out: &[String]) -> Vec<String> {
    let mut method = vec![
        format!("The image is {FILES} files of 1 MiB that nothing compresses, as a folder (overlayfs) and one behind the other in \
         one file (all others). Every figure is per instance."),
        "Time to make: until the instance could be started; what it makes dirty is not waited for to reach the disk.".to_owned(),
        "On disk: the blocks (st_blocks) of what the instance has for its own once it has written one of the files anew; for \
         reflinks, whose st_blocks counts shared blocks as its own, by how much the file system's free blocks fell. A disk that \
         all share read-only takes no such write: what its guest changes stays in that guest's memory."
            .to_owned(),
        format!("Each sample makes all instances anew and removes them: at most {SAMPLES} samples, as many as fit in {} s for the \
         slowest.", BUDGET.as_secs()),
    ];
    if !left_out.is_empty() {
        method.push(format!(
            "Left out, since {FEWEST} samples would have taken more than {} s, or half of the free space: {}.",
            BUDGET.as_secs(),
            left_out.join("; ")
        ));
    }
    method
}

/// The image and the folder for its instances.
#[derive(Debug, Clone)]
struct Image {
    /// One file.
    file: PathBuf,
    /// The same in files.
    folder: PathBuf,
    instances: PathBuf,
    /// What is written anew.
    data: Vec<u8>,
}

impl Image {
    fn make(at: &Path) -> Result<Self, String> {
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
    fn room(&self) -> Result<u64, String> {
        let space = statvfs(&self.instances)
            .map_err(|error| format!("statvfs {}: {error}", self.instances.display()))?;
        Ok(space.f_bavail * space.f_frsize)
    }
}

/// A way to an instance.
#[derive(Debug, Clone)]
enum Way {
    Copy,
    Reflink,
    Overlay,
    /// By this qemu-img, written to by this qemu-io; or why not.
    Qcow2(Result<(PathBuf, PathBuf), String>),
    Shared,
}

impl Way {
    fn all(setting: &Setting) -> [Self; 5] {
        let tools = || {
            let tool = |name| {
                let (path, there) = found(setting, name);
                there.map(|()| path)
            };
            Ok((tool("qemu-img")?, tool("qemu-io")?))
        };
        [Self::Copy, Self::Reflink, Self::Overlay, Self::Qcow2(tools()), Self::Shared]
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Copy => "full copy",
            Self::Reflink => "reflink",
            Self::Overlay => "overlayfs",
            Self::Qcow2(_) => "qcow2 overlay",
            Self::Shared => "vmm, one read-only disk",
        }
    }

    /// Bytes that an instance may need.
    fn room(&self) -> u64 {
        let files = if matches!(self, Self::Copy) { FILES } else { 2 };
        (files * MIB) as u64
    }

    /// Makes one in `at`, an empty folder.
    fn make(&self, image: &Image, at: &Path) -> Result<(), String> {
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
    fn write(&self, image: &Image, at: &Path) -> Result<(), String> {
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
    fn unmake(&self, at: &Path) {
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

/// So many instances by one way.
struct Instances {
    way: Way,
    image: Image,
    count: usize,
}

impl Instances {
    fn folders(&self) -> impl Iterator<Item = PathBuf> {
        let folder = self.image.instances.clone();
        (0..self.count).map(move |number| folder.join(number.to_string()))
    }

    fn measure(&self) -> Result<Vec<f64>, String> {
        for folder in self.folders() {
            fs::create_dir(&folder).map_err(|error| format!("make {}: {error}", folder.display()))?;
        }
        let free = self.image.room()?;
        let start = Instant::now();
        for folder in self.folders() {
            self.way.make(&self.image, &folder)?;
        }
        let time = start.elapsed();
        let mut bytes = 0;
        for folder in self.folders() {
            self.way.write(&self.image, &folder)?;
            bytes += blocks(&folder);
        }
        if matches!(self.way, Way::Reflink) {
            let folder = fs::File::open(&self.image.instances).map_err(|error| error.to_string())?;
            rustix::fs::syncfs(&folder).map_err(|error| format!("sync: {error}"))?;
            bytes = free.saturating_sub(self.image.room()?);
        }
        let each = self.count as f64;
        Ok(vec![bytes as f64 / 1024.0 / each, time.as_secs_f64() * 1e3 / each])
    }
}

impl Drop for Instances {
    fn drop(&mut self) {
        for folder in self.folders() {
            self.way.unmake(&folder);
            let _ = fs::remove_dir_all(&folder);
        }
    }
}

impl Contender for Instances {
    fn name(&self) -> &str {
        self.way.name()
    }

    fn command(&self) -> String {
        match &self.way {
            Way::Copy => "cp --reflink=never image.raw disk",
            Way::Reflink => "cp --reflink=always image.raw disk",
            Way::Overlay => "mount(2) overlay: lowerdir=image,upperdir=upper,workdir=work",
            Way::Qcow2(_) => "qemu-img create -f qcow2 -F raw -b image.raw disk",
            Way::Shared => {
                "nothing is made: vmm --disk image.raw,readonly opens it; written data stays in guest memory"
            }
        }
        .to_owned()
    }

    fn version(&self) -> Option<String> {
        match &self.way {
            Way::Qcow2(Ok((tool, _))) => version(tool, &["--version"]),
            _ => None,
        }
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let values = self.measure();
        for folder in self.folders() {
            self.way.unmake(&folder);
            let removed = fs::remove_dir_all(&folder);
            removed.or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(format!("remove {}: {error}", folder.display())),
            })?;
        }
        values
    }
}

/// Bytes of the files below `folder`, those of other file systems mounted there apart. The folders that every way has are left
/// out.
fn blocks(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() && entry.file_name() == "merged" => 0,
        Ok(data) if data.is_dir() => data.blocks() * 512 + blocks(&entry.path()),
        Ok(data) => data.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(way: Way) -> Result<Vec<f64>, String> {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::make(folder.path()).unwrap();
        let values = Instances { way, image: image.clone(), count: 2 }.sample();
        assert_eq!(fs::read_dir(&image.instances).unwrap().count(), 0, "something is left");
        values
    }

    #[test]
    fn copies_cost_what_the_image_has_and_a_shared_disk_nothing() {
        let copied = sample(Way::Copy).unwrap()[0];
        let whole = (FILES * MIB / 1024) as f64;
        assert!((whole..whole * 1.1).contains(&copied), "{copied} KiB for {whole}");
        assert_eq!(sample(Way::Shared).unwrap()[0], 0.0);
    }

    #[test]
    fn what_is_not_there_is_told_and_leaves_nothing() {
        let error = sample(Way::Qcow2(Err("not installed: qemu-img".to_owned()))).unwrap_err();
        assert!(error.contains("qemu-img"), "{error}");
    }
}
