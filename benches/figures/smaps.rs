//! What a monitor weighs beyond its guest's RAM, from /proc/PID/smaps.
//!
//! Guest RAM is the one mapping of exactly the guest's size. Everything else that is resident counts, program and shared
//! libraries included, whoever else may share them.

use std::fs;

use crate::guests::RAM_MIB;

/// KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weight {
    /// Resident, without guest RAM.
    pub resident: u64,
    /// The part of it that nobody shares.
    pub private: u64,
    /// The highest that the whole process has been (VmHWM), less the guest RAM resident now.
    pub peak: u64,
}

/// Weighs a process, which should be stopped: the file is not read at one instant.
pub fn weigh(pid: u32) -> Result<Weight, String> {
    let read = |name| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).map_err(|e| format!("read {path}: {e}"))
    };
    let (guest, others) = sum(&read("smaps")?)?;
    let status = read("status")?;
    let highest = status.lines().find_map(|line| kib(line, "VmHWM:")).ok_or("no VmHWM")?;
    Ok(Weight { peak: highest.saturating_sub(guest), ..others })
}

/// Resident guest RAM, and the rest (without a peak).
fn sum(smaps: &str) -> Result<(u64, Weight), String> {
    let (mut guest, mut found, mut size) = (0, 0, 0);
    let mut others = Weight { resident: 0, private: 0, peak: 0 };
    for line in smaps.lines() {
        if let Some(value) = kib(line, "Size:") {
            size = value;
            found += u32::from(size == RAM_MIB << 10);
        }
        let is_guest = size == RAM_MIB << 10;
        if let Some(value) = kib(line, "Rss:") {
            *(if is_guest { &mut guest } else { &mut others.resident }) += value;
        }
        if let Some(value) = kib(line, "Private_Clean:").or(kib(line, "Private_Dirty:")) {
            others.private += if is_guest { 0 } else { value };
        }
    }
    match found {
        1 => Ok((guest, others)),
        _ => Err(format!("{found} mappings have the size of guest RAM, so which it is cannot be told")),
    }
}

/// The number on a line that begins with `key`.
fn kib(line: &str, key: &str) -> Option<u64> {
    line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse().ok()
}
