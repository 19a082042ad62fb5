//! The words on the command line.

use std::path::PathBuf;

pub const USAGE: &str = "\
usage: cargo bench --bench figures -- [tiny] [boot] [icount] [OPTION...]
  tiny            a guest of 5 instructions, on this host's /dev/kvm
  boot            Linux to its first line in user space, where KVM boots Linux (through the rig)
  icount          the same under the rig's repeatable clock, where 1 instruction takes 1 ns
                  (none of them named: all three)
  --samples N     starts of each monitor [20; boot 10; icount always 2]
  --markdown      tables for a document
  --vmm FILE      measure this vmm [the one built along]
  --qemu FILE     and this QEMU [qemu-system-x86_64]
  --guests DIR    tuned-vmlinux and tiny.cpio [target/guests, made if missing]
  --rig FILE      a built rig [cargo rig]";

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Tiny,
    Boot,
    Icount,
    /// The part of `boot` and `icount` that runs in the rig.
    Inside,
}

#[derive(Debug, Default)]
pub struct Options {
    pub modes: Vec<Mode>,
    pub samples: Option<usize>,
    pub markdown: bool,
    pub vmm: Option<PathBuf>,
    pub qemu: Option<PathBuf>,
    pub guests: Option<PathBuf>,
    pub rig: Option<PathBuf>,
    /// For `inside`: measure this monitor only, and no memory.
    pub only: Option<String>,
}

impl Options {
    /// None if help was asked for and given.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut options = Self::default();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                // Cargo says this to every benchmark.
                "--bench" => {}
                "tiny" => options.modes.push(Mode::Tiny),
                "boot" => options.modes.push(Mode::Boot),
                "icount" => options.modes.push(Mode::Icount),
                "inside" => options.modes.push(Mode::Inside),
                "--samples" => match value()?.parse() {
                    Ok(count @ 1..) => options.samples = Some(count),
                    _ => return Err("--samples needs a number from 1".to_owned()),
                },
                "--markdown" => options.markdown = true,
                "--vmm" => options.vmm = Some(value()?.into()),
                "--qemu" => options.qemu = Some(value()?.into()),
                "--guests" => options.guests = Some(value()?.into()),
                "--rig" => options.rig = Some(value()?.into()),
                "--only" => options.only = Some(value()?),
                "--help" | "-h" => {
                    println!("{USAGE}");
                    return Ok(None);
                }
                _ => return Err(format!("{word}?")),
            }
        }
        Ok(Some(options))
    }
}
