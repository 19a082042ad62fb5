//! The workloads of the classic comparisons: `vmm-bench work STEP...`, run natively, in a container, and as PID 1 of a guest.
//!
//! Each step says "begin NAME", does a fixed amount of work, and says "end NAME" with what came out of it, so that nobody can
//! optimize the work away. The time is taken by whoever reads those lines; nothing here looks at a clock.

mod block;
mod compute;
mod echo;
pub mod guest;
mod memory;
pub mod net;
mod tree;

use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::str::FromStr;

pub use tree::Act;

/// Some work, with its amount: `NAME=AMOUNT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `integer=N`: the lengths of the Collatz sequences of 1 to N.
    Integer(u64),
    /// `float=N`: iterations of the Mandelbrot set on a grid of N by N points.
    Float(u64),
    /// `triad=N`: N times over three arrays of `memory::ARRAY` bytes each.
    Triad(u64),
    /// `chase=N`: N dependent loads, all over `memory::CHASED` bytes.
    Chase(u64),
    /// `PATTERN-DIRECTION=N:PATH`: N requests of 4 KiB, one after the other, past the page cache; `-cached`: through it.
    Block {
        /// In order, or at random.
        random: bool,
        /// Writes, with an fsync at the end; else reads.
        write: bool,
        /// Through the page cache.
        cached: bool,
        /// How many.
        count: u64,
        /// A file or a disk.
        path: PathBuf,
    },
    /// `echo=N`: answers N lines.
    Echo(u64),
    /// `ACT=N:PATH`: N files in a folder that is made or there, or N pages of a file. A guest has forgotten what it knew of it.
    Tree(Act, u64, PathBuf),
    /// `net-KIND=ADDRESS:PORT`: what the host that listens there asks for, until it says that it is over.
    Net(net::Traffic, SocketAddrV4),
}

/// Bytes that one round of `triad` moves: it reads two arrays and writes one.
pub const TRIAD_BYTES: u64 = 3 * memory::ARRAY as u64;

impl Step {
    /// As in the lines that it prints.
    pub fn name(&self) -> String {
        match self {
            Self::Integer(_) => "integer".to_owned(),
            Self::Float(_) => "float".to_owned(),
            Self::Triad(_) => "triad".to_owned(),
            Self::Chase(_) => "chase".to_owned(),
            Self::Echo(_) => "echo".to_owned(),
            Self::Net(traffic, _) => traffic.name().to_owned(),
            Self::Tree(act, ..) => act.name().to_owned(),
            Self::Block { random, write, cached, .. } => {
                let pattern = if *random { "random" } else { "sequential" };
                let direction = if *write { "write" } else { "read" };
                format!("{pattern}-{direction}{}", if *cached { "-cached" } else { "" })
            }
        }
    }

    /// The line before the work.
    pub fn begin(&self) -> String {
        format!("begin {}\n", self.name())
    }

    /// The start of the line behind it.
    pub fn end(&self) -> String {
        format!("end {} ", self.name())
    }

    /// Does it.
    fn run(&self, output: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Integer(count) => self.between(output, || Ok(compute::collatz(*count))),
            Self::Float(side) => self.between(output, || Ok(compute::mandelbrot(*side))),
            Self::Triad(rounds) => {
                let mut arrays = memory::Arrays::new();
                self.between(output, || Ok(arrays.triad(*rounds)))
            }
            Self::Chase(steps) => {
                let ring = memory::Ring::new(memory::CHASED);
                self.between(output, || Ok(ring.chase(*steps)))
            }
            Self::Block { random, write, cached, count, path } => {
                let mut disk = block::Disk::open(path, *write, *cached)?;
                self.between(output, || disk.work(*random, *count))
            }
            Self::Echo(count) => {
                let mut ends = echo::Ends::new()?;
                self.between(output, || ends.answer(*count))
            }
            Self::Net(traffic, peer) => self.between(output, || traffic.run(*peer)),
            Self::Tree(act, count, path) => {
                guest::forget()?;
                self.between(output, || act.run(*count, path))
            }
        }
    }

    fn between(&self, output: &mut dyn Write, work: impl FnOnce() -> io::Result<u64>) -> io::Result<()> {
        output.write_all(self.begin().as_bytes())?;
        output.flush()?;
        let result = work()?;
        output.write_all(format!("{}{result:x}\n", self.end()).as_bytes())?;
        output.flush()
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no work: NAME=AMOUNT, for disks and folders NAME=AMOUNT:PATH, for networks NAME=ADDRESS:PORT"
            )
        };
        let (name, amount) = text.split_once('=').ok_or_else(wrong)?;
        if let Some((traffic, _)) = net::Traffic::ALL.into_iter().find(|(_, known)| *known == name) {
            return Ok(Self::Net(traffic, amount.parse().map_err(|_| wrong())?));
        }
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        let placed = || {
            let (count, path) = amount.split_once(':').ok_or_else(wrong)?;
            Ok::<_, String>((number(count)?, PathBuf::from(path)))
        };
        if let Some((act, _)) = Act::ALL.into_iter().find(|(_, known)| *known == name) {
            return placed().map(|(count, path)| Self::Tree(act, count, path));
        }
        let (plain, cached) = name.strip_suffix("-cached").map_or((name, false), |plain| (plain, true));
        let (random, write) = match plain {
            "integer" => return Ok(Self::Integer(number(amount)?)),
            "float" => return Ok(Self::Float(number(amount)?)),
            "triad" => return Ok(Self::Triad(number(amount)?)),
            "chase" => return Ok(Self::Chase(number(amount)?)),
            "echo" => return Ok(Self::Echo(number(amount)?)),
            "sequential-read" => (false, false),
            "sequential-write" => (false, true),
            "random-read" => (true, false),
            "random-write" => (true, true),
            _ => return Err(wrong()),
        };
        let (count, path) = placed()?;
        Ok(Self::Block { random, write, cached, count, path })
    }
}

/// As [`Step::from_str`] takes it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(n) | Self::Float(n) | Self::Triad(n) | Self::Chase(n) | Self::Echo(n) => {
                write!(f, "{}={n}", self.name())
            }
            Self::Net(_, peer) => write!(f, "{}={peer}", self.name()),
            Self::Block { count, path, .. } | Self::Tree(_, count, path) => {
                write!(f, "{}={count}:{}", self.name(), path.display())
            }
        }
    }
}

/// Does all `steps`, and tells `output` of each.
///
/// # Errors
/// What a step could not do, with its name.
pub fn run(steps: &[Step], output: &mut dyn Write) -> io::Result<()> {
    for step in steps {
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", step.name()));
        step.run(output).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(text: &str) -> String {
        let mut output = Vec::new();
        run(&[text.parse().unwrap()], &mut output).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn steps_read_as_they_are_written() {
        for text in [
            "integer=7",
            "float=8",
            "triad=1",
            "chase=5",
            "echo=3",
            "random-write=12:/dev/vda",
            "sequential-read-cached=1:/a:b",
            "net-send=10.0.2.2:7000",
            "net-request=127.0.0.1:1",
            "unpack=3:/a:b",
        ] {
            let step: Step = text.parse().unwrap();
            assert_eq!(step.to_string(), text);
            assert!(step.begin().starts_with("begin ") && step.end().contains(&step.name()));
        }
        for text in [
            "integer",
            "integer=x",
            "walk=1",
            "random-read=1",
            "echo-=2",
            "random-read=:/x",
            "net-send=7",
            "net-walk=1.2.3.4:5",
            "find=3",
        ] {
            assert!(text.parse::<Step>().unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn what_comes_out_is_always_the_same() {
        assert_eq!(output("integer=10"), format!("begin integer\nend integer {:x}\n", 67));
        for (text, result) in [("float=40", "bf6d"), ("chase=1000", "c5ae9"), ("triad=2", "1")] {
            let said = output(text);
            assert!(said.ends_with(&format!(" {result}\n")), "{text}: {said}");
        }
    }

    #[test]
    fn disks_are_read_and_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let path = path.display();
        for name in ["sequential-read-cached", "random-read-cached"] {
            assert_eq!(output(&format!("{name}=10:{path}")), format!("begin {name}\nend {name} {:x}\n", 70));
        }
        // Past the end it goes on at the start: the first byte of a block is its number's.
        output(&format!("sequential-write-cached=300:{path}"));
        let said = output(&format!("sequential-read-cached=10:{path}"));
        assert!(said.ends_with(&format!(" {:x}\n", 45)), "{said}");
        let missing: Step = "random-read=1:/no/such".parse().unwrap();
        let error = run(&[missing], &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("random-read") && error.contains("/no/such"), "{error}");
    }
}
