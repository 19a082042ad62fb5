//! The ACPI tables for firmware to place: two files, and the script by which it links them (QEMU's
//! include/hw/acpi/bios-linker-loader.h, its files etc/table-loader, etc/acpi/tables and etc/acpi/rsdp).
//!
//! Only firmware knows where there is room, so each address in the tables is an offset into the file until the script has been
//! followed; checksums come last.

use super::{Platform, acpi};

const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
const SCRIPT: &str = "etc/table-loader";

/// Bytes of a command of the script: its number, its fields, padding.
const COMMAND: usize = 128;
const NAME: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Where a file may go: anywhere in 32 bits, or where an RSDP is searched.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// Places of fields (ACPI 6.5, 5.2.5.3, 5.2.6 and 5.2.9).
const RSDP_SIZE: usize = 36;
const RSDP_XSDT: usize = 24;
const HEADER: usize = 36;
const CHECKSUM: usize = 9;
const FADT_X_DSDT: usize = 140;

/// Each file's name and bytes.
pub fn files(platform: &Platform) -> [(&'static str, Vec<u8>); 3] {
    // At address zero, addresses are offsets.
    let mut tables = acpi::tables(platform, 0);
    let mut rsdp = tables[..RSDP_SIZE].to_vec();
    tables[..RSDP_SIZE].fill(0);
    let mut script = Script::default();
    script.allocate(TABLES, 64, ZONE_HIGH);
    script.allocate(RSDP, 16, ZONE_FSEG);

    let number = |bytes: &[u8], at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte))
    };
    let xsdt = number(&rsdp, RSDP_XSDT, 8);
    let entries: Vec<_> = (xsdt + HEADER..xsdt + number(&tables, xsdt + 4, 4)).step_by(8).collect();
    for entry in entries {
        script.add_pointer(TABLES, entry);
        let table = number(&tables, entry, 8);
        if tables[table..].starts_with(b"FACP") {
            script.add_pointer(TABLES, table + FADT_X_DSDT);
            let size = number(&tables, table + 4, 4);
            script.add_checksum(TABLES, &mut tables, table + CHECKSUM, table, size);
        }
    }
    let size = number(&tables, xsdt + 4, 4);
    script.add_checksum(TABLES, &mut tables, xsdt + CHECKSUM, xsdt, size);
    script.add_pointer(RSDP, RSDP_XSDT);
    // Of the part that ACPI 1.0 knew, and of all of it.
    script.add_checksum(RSDP, &mut rsdp, 8, 0, 20);
    script.add_checksum(RSDP, &mut rsdp, 32, 0, RSDP_SIZE);
    [(TABLES, tables), (RSDP, rsdp), (SCRIPT, script.0)]
}

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, number: u32, parts: &[&[u8]]) {
        let end = self.0.len() + COMMAND;
        self.0.extend_from_slice(&number.to_le_bytes());
        parts.iter().for_each(|part| self.0.extend_from_slice(part));
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// The 8 bytes at `offset` of `file` are an offset into the tables: their address is to be added.
    fn add_pointer(&mut self, file: &str, offset: usize) {
        self.command(ADD_POINTER, &[&name(file), &name(TABLES), &(offset as u32).to_le_bytes(), &[8]]);
    }

    /// The byte at `offset` makes the sum of `len` bytes from `start` on zero; until then it is zero itself.
    fn add_checksum(&mut self, file: &str, bytes: &mut [u8], offset: usize, start: usize, len: usize) {
        bytes[offset] = 0;
        let [offset, start, len] = [offset, start, len].map(|value| (value as u32).to_le_bytes());
        self.command(ADD_CHECKSUM, &[&name(file), &offset, &start, &len]);
    }
}

fn name(file: &str) -> [u8; NAME] {
    let mut field = [0; NAME];
    field.iter_mut().zip(file.bytes()).for_each(|(to, from)| *to = from);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows the script as firmware does, with the tables at `base`: the RSDP, and the tables.
    fn link(base: u64, platform: &Platform) -> (Vec<u8>, Vec<u8>) {
        let [(_, mut tables), (_, mut rsdp), (_, script)] = files(platform);
        assert_eq!(script.len() % COMMAND, 0);
        for command in script.chunks(COMMAND) {
            let word = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap()) as usize;
            let file = if command[4..].starts_with(b"etc/acpi/rsdp\0") { &mut rsdp } else { &mut tables };
            match word(0) as u32 {
                ADD_POINTER => {
                    assert_eq!(command[120], 8);
                    let field = &mut file[word(116)..word(116) + 8];
                    let value = u64::from_le_bytes((&*field).try_into().unwrap()) + base;
                    field.copy_from_slice(&value.to_le_bytes());
                }
                ADD_CHECKSUM => {
                    let sum = file[word(64)..word(64) + word(68)]
                        .iter()
                        .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    file[word(60)] = file[word(60)].wrapping_sub(sum);
                }
                other => assert_eq!(other, ALLOCATE),
            }
        }
        (rsdp, tables)
    }

    #[test]
    fn linked_they_are_the_tables_that_direct_boot_writes() {
        let platform = Platform { cpus: 3, com1: true, ..Platform::default() };
        let base = 0x12_3440;
        let (rsdp, tables) = link(base, &platform);
        let expected = acpi::tables(&platform, base);
        assert_eq!(rsdp, expected[..RSDP_SIZE]);
        assert_eq!(tables[RSDP_SIZE..], expected[RSDP_SIZE..]);
    }
}
