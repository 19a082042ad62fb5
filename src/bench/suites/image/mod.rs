//! Disk: what instances on one image cost, by full copies and by everything that shares.

mod way;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use way::{FILES, Image, Way};

use super::{merge, own_mounts};
use crate::host::Host;
use crate::measure::{self, Absent, Contender, INTERRUPTED, Plan, Quantity};
use crate::result::{Better, Suite, Unit};
use crate::rivals::Setting;

/// Instances on the image.
const COUNTS: [usize; 3] = [1, 10, 50];
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
        let plan = Plan { samples, warm_up: 0, seed: plan.seed.wrapping_add(count as u64), ..plan };
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
        self.way.command().to_owned()
    }

    fn version(&self) -> Option<String> {
        self.way.version()
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
        let whole = (FILES << 10) as f64;
        assert!((whole..whole * 1.1).contains(&copied), "{copied} KiB for {whole}");
        assert_eq!(sample(Way::Shared).unwrap()[0], 0.0);
    }

    #[test]
    fn what_is_not_there_is_told_and_leaves_nothing() {
        let error = sample(Way::Qcow2(Err("not installed: qemu-img".to_owned()))).unwrap_err();
        assert!(error.contains("qemu-img"), "{error}");
    }
}
