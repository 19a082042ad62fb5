//! The text forms of limits, and what the kernel's files take for them (Documentation/admin-guide/cgroup-v2.rst).

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{major, minor};

use super::Error;
use crate::config::{ParseError, Size, items};

/// A share of CPU time. Cgroups of one parent get it in the proportion of their weights; without one they weigh 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuWeight(u32);

impl FromStr for CpuWeight {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let weight = text.parse().ok().filter(|weight| (1..=10_000).contains(weight));
        let wrong =
            || ParseError::hinted(format!("{text:?} is not a weight"), "give 1 to 10000; others weigh 100");
        weight.map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for CpuWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// CPU time of all threads together: so many microseconds in each period of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMax {
    quota: u64,
    period: u64,
}

impl CpuMax {
    /// The kernel's own default.
    const PERIOD: u64 = 100_000;
    /// What the kernel takes, in microseconds.
    const LEAST: u64 = 1_000;
    const LONGEST: u64 = 1_000_000;
    /// More CPUs than any host has.
    const MOST_CPUS: f64 = 100_000.0;
}

impl FromStr for CpuMax {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const FORMS: &str = "give a number of CPUs, from 0.01 on: 1.5; or microseconds of CPU time in a period of 1000 to \
                             1000000: 50000/100000";
        let max = match text.split_once('/') {
            Some((quota, period)) => quota.parse().ok().zip(period.parse().ok()),
            None => {
                let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
                let cpus = text.parse().ok().filter(|cpus: &f64| plain && *cpus <= Self::MOST_CPUS);
                cpus.map(|cpus| ((cpus * Self::PERIOD as f64).round() as u64, Self::PERIOD))
            }
        };
        let fits = |&(quota, period): &(u64, u64)| {
            quota >= Self::LEAST && (Self::LEAST..=Self::LONGEST).contains(&period)
        };
        let wrong = || ParseError::hinted(format!("{text:?} is not an amount of CPU time"), FORMS);
        max.filter(fits).map(|(quota, period)| Self { quota, period }).ok_or_else(wrong)
    }
}

/// As in cpu.max.
impl fmt::Display for CpuMax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.quota, self.period)
    }
}

/// What is limited of a disk: bytes and operations a second, each way.
const KINDS: [&str; 4] = ["rbps", "wbps", "riops", "wiops"];

/// A disk, by a path or its number, and its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoMax {
    device: PathBuf,
    most: Vec<(&'static str, u64)>,
}

impl TryFrom<&OsStr> for IoMax {
    type Error = ParseError;

    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        const FORMS: &str = "write FILE,rbps=10M, with any of rbps and wbps (bytes a second), riops and wiops (operations); a comma \
                             that belongs to FILE is written twice";
        let wrong = |what: &str| ParseError::hinted(format!("{text:?}: {what}"), FORMS);
        let items = items(text);
        let (device, rest) = items.split_first().ok_or_else(|| wrong("it is empty"))?;
        let limit = |item: &Vec<u8>| {
            let (key, value) = str::from_utf8(item).ok()?.split_once('=')?;
            let kind = KINDS.into_iter().find(|kind| *kind == key)?;
            let most =
                if kind.ends_with("iops") { value.parse().ok() } else { value.parse().ok().map(Size::bytes) };
            Some((kind, most.filter(|most| *most > 0)?))
        };
        let most = rest.iter().map(|item| {
            limit(item).ok_or_else(|| wrong(&format!("{:?} is no limit", String::from_utf8_lossy(item))))
        });
        let most = most.collect::<Result<Vec<_>, _>>()?;
        match device.is_empty() || most.is_empty() {
            true => Err(wrong("it names no disk, or no limit")),
            false => Ok(Self { device: OsStr::from_bytes(device).into(), most }),
        }
    }
}

impl IoMax {
    /// As in io.max.
    pub(super) fn line(&self) -> Result<String, Error> {
        let failed = |why: String| Error::Disk { device: self.device.clone(), why };
        let (major, minor) = match numbers(&self.device) {
            Some((major, minor)) => {
                let there = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
                match there.exists() && !there.join("partition").exists() {
                    true => (major, minor),
                    false => return Err(failed("there is no such disk; lsblk lists them".to_owned())),
                }
            }
            None => disk(&self.device).map_err(failed)?,
        };
        let most = self.most.iter().map(|(kind, most)| format!(" {kind}={most}"));
        Ok(format!("{major}:{minor}{}", most.collect::<String>()))
    }
}

/// As in `8:0`.
fn numbers(device: &Path) -> Option<(u32, u32)> {
    let (major, minor) = device.to_str()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The disk that is at `path`, or that the file there lies on. The kernel limits disks, not partitions.
fn disk(path: &Path) -> Result<(u32, u32), String> {
    let found = path.metadata().map_err(|error| error.to_string())?;
    let number = if found.file_type().is_block_device() { found.rdev() } else { found.dev() };
    let (major, minor) = (major(number), minor(number));
    if major == 0 {
        return Err(
            "its file system is on no disk of its own (tmpfs, overlayfs, btrfs, a network)".to_owned()
        );
    }
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if !device.join("partition").exists() {
        return Ok((major, minor));
    }
    let whole = fs::read_to_string(device.join("../dev")).ok();
    whole
        .and_then(|whole| numbers(Path::new(whole.trim())))
        .ok_or_else(|| "its partition has no disk".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_cpus_is_a_quota_of_the_kernels_period() {
        for (text, wanted) in [
            ("1.5", "150000 100000"),
            ("2", "200000 100000"),
            (".5", "50000 100000"),
            ("0.01", "1000 100000"),
            ("5000/20000", "5000 20000"),
        ] {
            assert_eq!(text.parse::<CpuMax>().unwrap().to_string(), wanted);
        }
        for text in
            ["", "0", "-1", "0.001", "inf", "1e3", "x", "1/2", "1000/", "5000/2000000", "max", "1000000"]
        {
            assert!(text.parse::<CpuMax>().unwrap_err().hint().is_some(), "{text}");
        }
    }

    #[test]
    fn a_weight_is_what_the_kernel_takes_for_one() {
        assert_eq!("10000".parse::<CpuWeight>().unwrap().to_string(), "10000");
        for text in ["0", "10001", "", "1.5", "-1"] {
            assert!(text.parse::<CpuWeight>().is_err(), "{text}");
        }
    }

    #[test]
    fn limits_of_a_disk_are_a_line_of_io_max() {
        let line = |text: &str| IoMax::try_from(OsStr::new(text)).unwrap().line();
        let disks = fs::read_dir("/sys/dev/block").unwrap().map(|disk| disk.unwrap().path());
        let disk = disks.into_iter().find(|disk| !disk.join("partition").exists()).unwrap();
        let disk = disk.file_name().unwrap().to_str().unwrap();
        let expected = format!("{disk} rbps=10485760 wiops=120");
        assert_eq!(line(&format!("{disk},rbps=10M,wiops=120")).unwrap(), expected);
        let error = line("4095:1,rbps=1M").unwrap_err();
        assert!(error.to_string().contains("no such disk"), "{error}");
        let error = line("/proc/self/status,rbps=1M").unwrap_err();
        assert!(error.to_string().contains("on no disk"), "{error}");
        let error = line("/no/such,,file,rbps=1M").unwrap_err();
        assert!(error.to_string().contains("/no/such,file"), "{error}");
        for text in
            ["", "8:0", "8:0,rbps", "8:0,rbps=", "8:0,rbps=0", "8:0,speed=1", "8:0,riops=1M", ",rbps=1M"]
        {
            assert!(IoMax::try_from(OsStr::new(text)).unwrap_err().hint().is_some(), "{text}");
        }
    }
}
