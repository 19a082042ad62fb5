//! [`Lines`]: which line of the source an address is from, by the line numbers (DWARF) that the assembler left in the guest.

use gimli::{Dwarf, EndianSlice, LittleEndian};
use object::{Object, ObjectSection};

/// Addresses and lines, in order of address.
#[derive(Debug, Default)]
pub struct Lines(Vec<(u64, Option<u64>)>);

impl Lines {
    /// Of an ELF file. Empty where it has no line numbers.
    pub fn of(image: &[u8]) -> Self {
        let mut rows = Vec::new();
        // Written by our own build: what cannot be read is not there.
        let _ = read(image, &mut rows);
        rows.sort_by_key(|(address, _)| *address);
        Self(rows)
    }

    /// The line that the code at `address` is from, counted from 1.
    pub fn line(&self, address: u64) -> Option<usize> {
        let at = self.0.partition_point(|(start, _)| *start <= address).checked_sub(1)?;
        self.0[at].1.and_then(|line| usize::try_from(line).ok())
    }
}

fn read(image: &[u8], rows: &mut Vec<(u64, Option<u64>)>) -> Result<(), gimli::Error> {
    let Ok(file) = object::File::parse(image) else { return Ok(()) };
    let section = |id: gimli::SectionId| {
        let data = file.section_by_name(id.name()).and_then(|section| section.data().ok());
        Ok::<_, gimli::Error>(EndianSlice::new(data.unwrap_or_default(), LittleEndian))
    };
    let dwarf = Dwarf::load(section)?;
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        let unit = dwarf.unit(header)?;
        let Some(program) = unit.line_program.clone() else { continue };
        let mut lines = program.rows();
        while let Some((_, row)) = lines.next_row()? {
            // An end of a sequence is the address behind it.
            let line = row.line().filter(|_| !row.end_sequence()).map(std::num::NonZero::get);
            rows.push((row.address(), line));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Lab;

    #[test]
    fn the_entry_is_the_line_behind_start() {
        let lab = Lab::find("pio").unwrap();
        let start = lab.source.lines().position(|line| line == "start:").unwrap() + 1;
        let lines = Lines::of(lab.image);
        assert_eq!(lines.line(16 << 20), Some(start + 1));
        assert_eq!((lines.line(0), lines.line(u64::MAX)), (None, None));
        // A macro's instructions are from where it is used.
        let doorbell = Lab::find("doorbell").unwrap();
        let lines = Lines::of(doorbell.image);
        let from = |line: &str| doorbell.source.lines().position(|known| known.trim() == line).unwrap() + 1;
        assert_eq!(lines.line((16 << 20) + 5), Some(from("driver 0, random")));
        assert_eq!(Lines::of(b"nonsense").line(0), None);
    }
}
