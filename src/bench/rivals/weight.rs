//! What processes and the kernel hold of the host's memory, by /proc/PID/smaps and /proc/meminfo. All in KiB.

use std::cmp::Ordering;
use std::fs;
use std::ops::Range;
use std::thread::sleep;
use std::time::Duration;

use super::RAM_MIB;

/// The sum over some processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weight {
    /// Each page's size shared among all processes that map it, guest RAM apart.
    pub pss: u64,
    /// Pages that are no file's, guest RAM apart: what they have written of their own.
    pub anonymous: u64,
    /// The most that was ever resident (VmHWM), less the guest RAM that is now.
    pub peak: u64,
    /// Resident guest RAM.
    pub guest: u64,
    /// The same, each page's size shared among all who map it.
    pub guest_pss: u64,
    /// Mappings that are guest RAM: those of exactly a guest's size.
    pub guests: usize,
    /// What nobody else has, guest RAM among it: pages that are no file's, and what it alone has written of shared memory.
    pub private: u64,
}

impl Weight {
    /// Of processes that sleep: the file is not read at one instant.
    ///
    /// # Errors
    /// One that is gone, or not ours to look at.
    pub fn of(processes: &[i32]) -> Result<Self, String> {
        let mut sum = Self::default();
        for pid in processes {
            let read = |name| {
                let path = format!("/proc/{pid}/{name}");
                fs::read_to_string(&path).map_err(|error| format!("read {path}: {error}"))
            };
            sum.add(&read("smaps")?);
            // One that has ended, and that nobody has waited for yet, has none, and no mappings.
            sum.peak += read("status")?.lines().find_map(|line| kib(line, "VmHWM:")).unwrap_or(0);
        }
        sum.peak = sum.peak.saturating_sub(sum.guest);
        Ok(sum)
    }

    fn add(&mut self, smaps: &str) {
        let mappings = Mapping::all(smaps);
        let ram = guest_ram(&mappings);
        self.guests += usize::from(!ram.is_empty());
        for (at, mapping) in mappings.iter().enumerate() {
            // Of a file that was just written, the pages that nobody else maps are Private_Dirty, too.
            let is_shared = mapping.about.split(' ').next().is_some_and(|rights| rights.ends_with('s'));
            self.private += if is_shared { mapping.private_dirty } else { mapping.anonymous };
            if ram.contains(&at) {
                self.guest += mapping.rss;
                self.guest_pss += mapping.pss;
            } else {
                self.pss += mapping.pss;
                self.anonymous += mapping.anonymous;
            }
        }
    }
}

/// What smaps tells of one mapping.
#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    end: u64,
    /// Permissions, offset, device, inode and name; no offset where there is no file.
    about: String,
    rss: u64,
    pss: u64,
    anonymous: u64,
    private_dirty: u64,
}

impl Mapping {
    fn all(smaps: &str) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for line in smaps.lines() {
            let head = line.split_once(' ').and_then(|(range, about)| {
                let (start, end) = range.split_once('-')?;
                let address = |text| u64::from_str_radix(text, 16).ok();
                Some(Self {
                    start: address(start)?,
                    end: address(end)?,
                    about: about.to_owned(),
                    ..Self::default()
                })
            });
            match (head, all.last_mut()) {
                (Some(mapping), _) => all.push(mapping),
                (None, None) => {}
                (None, Some(mapping)) => {
                    let fields = [
                        ("Rss:", &mut mapping.rss),
                        ("Pss:", &mut mapping.pss),
                        ("Anonymous:", &mut mapping.anonymous),
                        ("Private_Dirty:", &mut mapping.private_dirty),
                    ];
                    for (key, field) in fields {
                        *field += kib(line, key).unwrap_or(0);
                    }
                }
            }
        }
        all
    }
}

/// Which of a process's `mappings` are its guest's RAM: one of exactly that size, or several without gaps, which the kernel keeps apart
/// because not all may have huge pages. A thread's stack may adjoin them and be as large as one of them: a guest uses more of its RAM.
fn guest_ram(mappings: &[Mapping]) -> Range<usize> {
    let windows = (0..mappings.len()).map(|at| at..at + of_guest_size(&mappings[at..]));
    let resident =
        |window: &Range<usize>| mappings[window.clone()].iter().map(|mapping| mapping.rss).sum::<u64>();
    windows.filter(|window| !window.is_empty()).max_by_key(resident).unwrap_or_default()
}

/// How many of the first of `mappings` together have the size of a guest's RAM, or 0.
fn of_guest_size(mappings: &[Mapping]) -> usize {
    let Some(first) = mappings.first() else { return 0 };
    let mut end = first.start;
    for (index, mapping) in mappings.iter().enumerate() {
        if mapping.start != end || mapping.about != first.about {
            return 0;
        }
        end = mapping.end;
        match (end - first.start).cmp(&(RAM_MIB << 20)) {
            Ordering::Less => {}
            Ordering::Equal => return index + 1,
            Ordering::Greater => return 0,
        }
    }
    0
}

/// The host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// What programs could still have.
    pub available: u64,
    /// What the kernel has taken for itself on behalf of others.
    pub kernel: u64,
}

impl Kernel {
    /// # Errors
    /// /proc/meminfo cannot be read.
    pub fn now() -> Result<Self, String> {
        let text =
            fs::read_to_string("/proc/meminfo").map_err(|error| format!("read /proc/meminfo: {error}"))?;
        let field = |key: &str| text.lines().find_map(|line| kib(line, key));
        let available = field("MemAvailable:").ok_or("no MemAvailable in /proc/meminfo")?;
        let parts = ["Slab:", "PageTables:", "SecPageTables:", "KernelStack:", "Percpu:"];
        Ok(Self { available, kernel: parts.into_iter().filter_map(field).sum() })
    }

    /// Once the kernel has taken back what processes that ended left to it: when two looks in a row see no more than little
    /// change, or after a second.
    ///
    /// # Errors
    /// /proc/meminfo cannot be read.
    pub fn settled() -> Result<Self, String> {
        const LITTLE: u64 = 256;
        let mut last = Self::now()?;
        for _ in 0..10 {
            sleep(Duration::from_millis(100));
            let now = Self::now()?;
            if now.available.abs_diff(last.available) < LITTLE && now.kernel.abs_diff(last.kernel) < LITTLE {
                return Ok(now);
            }
            last = now;
        }
        Ok(last)
    }
}

/// The number on a line that begins with `key`.
fn kib(line: &str, key: &str) -> Option<u64> {
    line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_apart() {
        let smaps = "\
7f0000000000-7f0008000000 rw-s 00000000 00:01 42 /memfd:guest-ram (deleted)
Size:             131072 kB
Rss:                4000 kB
Pss:                4000 kB
Private_Dirty:      4000 kB
Anonymous:             0 kB
7f02-7f03 r-xp 00000000 08:01 7 /usr/bin/vmm
Size:               1000 kB
Rss:                 800 kB
Pss:                 400 kB
Pss_Dirty:           100 kB
Private_Clean:        50 kB
Private_Dirty:       300 kB
Anonymous:             8 kB
";
        let mut weight = Weight::default();
        weight.add(smaps);
        let expected = Weight {
            pss: 400,
            anonymous: 8,
            peak: 0,
            guest: 4000,
            guests: 1,
            guest_pss: 4000,
            private: 4008,
        };
        assert_eq!(weight, expected);
    }

    #[test]
    fn guest_ram_in_pieces_is_one() {
        // So many KiB are resident of each: 100, 101 ...
        let of = |ranges: &[(u64, u64)]| {
            let lines = (100..).zip(ranges).map(|(rss, (start, end))| {
                let (start, end) = (start << 20, end << 20);
                format!("{start:x}-{end:x} rw-p 00000000 00:00 0 \nRss: {rss} kB\nPss: {rss} kB\n")
            });
            let mut weight = Weight::default();
            weight.add(&lines.collect::<String>());
            (weight.guests, weight.guest, weight.pss)
        };
        assert_eq!(of(&[(10, 12), (12, 20), (20, 10 + RAM_MIB)]), (1, 303, 0));
        // What lies before and behind it is not.
        assert_eq!(of(&[(9, 10), (10, 12), (12, 10 + RAM_MIB), (10 + RAM_MIB, 900)]), (1, 203, 203));
        assert_eq!(of(&[(10, 12), (13, 10 + RAM_MIB)]), (0, 0, 201));
        // Neither is a stack as large as one of its pieces.
        assert_eq!(of(&[(8, 10), (10, 8 + RAM_MIB), (8 + RAM_MIB, 10 + RAM_MIB)]), (1, 203, 100));
    }

    /// The weight of a shell that holds so many bytes.
    fn shell(bytes: usize) -> Weight {
        use std::io::Read;
        use std::process::{Command, Stdio};
        let script = format!("x=$(yes | head -c {bytes}); echo $((${{#x}} > -1)); read y");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let ready = child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]);
        let weight = Weight::of(&[child.id() as i32]);
        child.kill().unwrap();
        child.wait().unwrap();
        ready.unwrap();
        weight.unwrap()
    }

    #[test]
    fn what_a_process_writes_is_seen() {
        let (small, large) = (shell(1), shell(8 << 20));
        assert!(large.anonymous > small.anonymous + (7 << 10), "{small:?} {large:?}");
        assert!(large.peak >= large.anonymous, "{large:?}");
        assert!(large.pss >= large.anonymous && small.pss < 16 << 10, "{small:?} {large:?}");
        assert!(Weight::of(&[i32::MAX]).is_err());
    }
}
