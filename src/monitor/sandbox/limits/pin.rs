//! [`Pin`]: the CPUs that a run's threads run on (sched_setaffinity(2)). Needs no cgroup and no privilege.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Error;
use crate::config::ParseError;

/// CPUs for all threads, and for vCPUs their own: `2-3`, `0:2,1:3`, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    text: String,
    /// Empty: wherever they may run already.
    all: BTreeSet<u32>,
    vcpus: BTreeMap<u32, BTreeSet<u32>>,
}

/// Those of vCPUs.
static VCPUS: OnceLock<BTreeMap<u32, CpuSet>> = OnceLock::new();

impl FromStr for Pin {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const FORMS: &str =
            "give CPUs, 2-3 or 0,4; or vCPUs with theirs, 0:2,1:3 (vCPU 0 on CPU 2, vCPU 1 on CPU 3)";
        let mut pin = Self { text: text.to_owned(), all: BTreeSet::new(), vcpus: BTreeMap::new() };
        for item in text.split(',') {
            let (vcpu, cpus) = item.split_once(':').map_or((None, item), |(vcpu, cpus)| (Some(vcpu), cpus));
            let wrong = || ParseError::hinted(format!("{item:?} is no CPU"), FORMS);
            let cpus = range(cpus).ok_or_else(wrong)?;
            match vcpu {
                None => pin.all.extend(cpus),
                Some(vcpu) => pin.vcpus.entry(vcpu.parse().map_err(|_| wrong())?).or_default().extend(cpus),
            }
        }
        Ok(pin)
    }
}

/// As it was given.
impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `2` or `2-3`.
fn range(text: &str) -> Option<std::ops::RangeInclusive<u32>> {
    let number = |text: &str| text.parse().ok().filter(|cpu| (*cpu as usize) < CpuSet::MAX_CPU);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = number(first)?..=number(last)?;
    (!range.is_empty()).then_some(range)
}

fn set(cpus: &BTreeSet<u32>) -> CpuSet {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu as usize));
    set
}

/// As it is written: `0-1,4`.
fn list(set: &CpuSet) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let run = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    runs.into_iter().map(run).collect::<Vec<_>>().join(",")
}

impl Pin {
    /// The last vCPU that has CPUs of its own.
    pub(super) fn last_vcpu(&self) -> Option<u32> {
        self.vcpus.last_key_value().map(|(vcpu, _)| *vcpu)
    }

    /// Has the calling thread, and all that it starts, run there; vCPUs when they [begin](pin_vcpu).
    pub(super) fn begin(&self) -> Result<(), Error> {
        let affine =
            |set: &CpuSet| sched_setaffinity(None, set).map_err(|error| Error::Affinity(error.into()));
        let current = || sched_getaffinity(None).map_err(|error| Error::Affinity(error.into()));
        let before = current()?;
        let wanted: BTreeSet<_> = self.vcpus.values().flatten().chain(&self.all).copied().collect();
        // The kernel drops those that are missing or not allowed, and complains only if none is left.
        let taken = affine(&set(&wanted)).and_then(|()| current());
        let missing = |taken: &CpuSet| wanted.iter().copied().find(|cpu| !taken.is_set(*cpu as usize));
        let missing = taken.as_ref().map_or_else(|_| wanted.first().copied(), missing);
        if let Some(cpu) = missing {
            let mut all = CpuSet::new();
            (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
            let allowed =
                affine(&all).and_then(|()| current()).map_or_else(|_| list(&before), |all| list(&all));
            return Err(Error::Cpu { pin: self.text.clone(), cpu, allowed });
        }
        affine(&if self.all.is_empty() { before } else { set(&self.all) })?;
        // There is one.
        let _ = VCPUS.set(self.vcpus.iter().map(|(vcpu, cpus)| (*vcpu, set(cpus))).collect());
        Ok(())
    }
}

/// The calling thread is that of `vcpu`, and runs where it is to.
pub fn pin_vcpu(vcpu: u32) {
    if let Some(set) = VCPUS.get().and_then(|vcpus| vcpus.get(&vcpu))
        && let Err(error) = sched_setaffinity(None, set)
    {
        // One that was there at the start has gone offline.
        log::warn!("vCPU {vcpu} is not pinned to {}: {error}", list(set));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_for_all_threads_or_for_a_vcpu() {
        let pin: Pin = "1,0:2,1:3-4,5-6".parse().unwrap();
        assert_eq!(pin.all, [1, 5, 6].into());
        assert_eq!(pin.vcpus, [(0, [2].into()), (1, [3, 4].into())].into());
        assert_eq!((pin.last_vcpu(), pin.to_string()), (Some(1), "1,0:2,1:3-4,5-6".to_owned()));
        for text in ["", "x", "1-", "3-2", "0:", ":1", "1,,2", "1024", "0:1:2", "-1", "0x1"] {
            assert!(text.parse::<Pin>().unwrap_err().hint().is_some(), "{text}");
        }
    }

    #[test]
    fn a_set_is_written_as_it_is_read() {
        for text in ["0", "0-1", "0,2-3,7"] {
            assert_eq!(list(&set(&text.parse::<Pin>().unwrap().all)), text);
        }
    }
}
