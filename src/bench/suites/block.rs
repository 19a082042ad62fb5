//! What virtualization costs a program that reads and writes a disk, one request at a time.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::host::Host;
use super::super::measure::{Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Place, Setting, Size};
use super::super::work::Step;
use super::places::{self, Measured, Worker};

/// Bytes of each disk: large enough that random requests are random, small enough to be made in a moment.
const DISK: usize = 64 << 20;
const SIZE: Size = Size { cpus: 1, mib: 256 };

const fn rate(name: &'static str) -> Quantity {
    Quantity { name, unit: Unit::PerSecond, better: Better::Higher }
}

/// What is done: random or in order, write or read.
const PATTERNS: [(bool, bool, Quantity); 4] = [
    (false, false, rate("sequential reads of 4 KiB")),
    (true, false, rate("random reads of 4 KiB")),
    (false, true, rate("sequential writes of 4 KiB, then fsync")),
    (true, true, rate("random writes of 4 KiB, then fsync")),
];

/// The suite.
///
/// # Errors
/// The scratch folder takes no disks, or knows no O_DIRECT.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let disk = |name: &str| make(setting.scratch.join(format!("{name}.disk")));
    let [native, cached, container, vm] = ["native", "cached", "container", "vm"].map(disk);
    let (native, cached, container, vm) = (native?, cached?, container?, vm?);
    let enough = |path: &Path, cached: bool| -> Result<Vec<u64>, String> {
        let count = |(random, write, _)| {
            let step = |count| Step::Block { random, write, cached, count, path: path.to_owned() };
            places::enough(setting, 100, &step)
        };
        PATTERNS.into_iter().map(count).collect()
    };
    // The page cache is so much faster that it needs more to do.
    let counts = [enough(&native, false)?, enough(&cached, true)?];
    let work = |path: &Path, cached: bool| -> Vec<Measured> {
        let counts = counts[usize::from(cached)].clone();
        let measured = |((random, write, quantity), count)| Measured {
            step: Step::Block { random, write, cached, count, path: path.to_owned() },
            quantity,
            value: per_second,
        };
        PATTERNS.into_iter().zip(counts).map(measured).collect()
    };
    let worker = |name, place, work| Worker { name, place, setting, size: SIZE, work, disk: None };
    let workers = vec![
        worker("native", Place::Native, work(&native, false)),
        worker("container", Place::Container, work(&container, false)),
        Worker { disk: Some(&vm), ..worker("vmm", Place::Vm, work(Path::new("/dev/vda"), false)) },
        worker("native, cached", Place::Native, work(&cached, true)),
    ];
    let quantities = PATTERNS.map(|(.., quantity)| quantity);
    let (contenders, figures) = places::measured(workers, &quantities, plan, progress);
    Ok(Suite {
        name: "block".to_owned(),
        title: "Disk: native, container, VM".to_owned(),
        host,
        seed: plan.seed,
        method: method(&counts),
        contenders,
        figures,
    })
}

fn method([counts, cached]: &[Vec<u64>; 2]) -> Vec<String> {
    vec![
        format!(
            "{counts:?} requests of 4 KiB (\"native, cached\": {cached:?}), one at a time, on a file of {} MiB; all patterns in one process (and VM) a sample. \
             O_DIRECT: past the page cache of the kernel that the program runs on; writes end with fdatasync, which counts.",
            DISK >> 20
        ),
        "The VM's own page cache is passed by too, but vmm opens the image through the host's page cache: its reads compare with \
         \"native, cached\", and its writes reach the disk with the fsync."
            .to_owned(),
        places::CLOCK.to_owned(),
    ]
}

fn per_second(step: &Step, seconds: f64) -> f64 {
    match step {
        Step::Block { count, .. } => *count as f64 / seconds,
        _ => f64::NAN,
    }
}

/// A disk without holes, that has reached the host's.
fn make(path: PathBuf) -> Result<PathBuf, String> {
    let made = fs::write(&path, vec![0x5a; DISK]).and_then(|()| fs::File::open(&path)?.sync_all());
    made.map(|()| path.clone()).map_err(|error| format!("make {}: {error}", path.display()))
}
