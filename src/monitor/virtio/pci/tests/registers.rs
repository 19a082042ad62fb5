//! Every register with every class of value in every device status: what it may change, what it reads back, and that nothing else moves.

use std::ops::Range;

use super::*;

const STATUSES: [u64; 6] =
    [0, 1, ACKNOWLEDGE_AND_DRIVER, FEATURES_OK, DRIVER_OK, 0x80 | ACKNOWLEDGE_AND_DRIVER];
const VALUES: [u64; 7] =
    [0, 1, 2, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa, 0x8000_8000_8000_8080];
/// Entries of the MSI-X table.
const TABLE_SIZE: u64 = 2 * 16;

/// What the guest sees: the common structure, MSI-X table and pending bits, and configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    common: [u8; common::SIZE as usize],
    table: [u8; TABLE_SIZE as usize],
    pending: [u8; 8],
    config: [u8; 256],
}

impl Guest {
    /// With its driver as far as `status` says, messages open.
    fn in_status(status: u64) -> Self {
        let mut guest = Self::new();
        guest.msix(msix::ENABLE);
        guest.vector(0, message(0x30));
        if status == DRIVER_OK {
            guest.start(0, 1);
            return guest;
        }
        for step in [1, ACKNOWLEDGE_AND_DRIVER, FEATURES_OK, 0x80 | ACKNOWLEDGE_AND_DRIVER] {
            if step & !status == 0 {
                guest.write(0x14, 1, step);
            }
            if step == ACKNOWLEDGE_AND_DRIVER && status == FEATURES_OK {
                guest.write(0x08, 4, 1);
                guest.write(0x0c, 4, 1);
            }
        }
        assert_eq!(guest.read(0x14, 1), status);
        guest
    }

    /// Without a reading that changes anything, and also while decoding is off.
    fn image(&self) -> Image {
        let mut function = self.function.lock().unwrap();
        let mut image = Image { common: [0; 0x38], table: [0; 32], pending: [0; 8], config: [0; 256] };
        Device::read(&mut *function, COMMON, &mut image.common);
        Device::read(&mut *function, TABLE, &mut image.table);
        Device::read(&mut *function, PENDING, &mut image.pending);
        function.config.read(0, &mut image.config);
        image
    }

    /// By the PCI configuration access capability.
    fn write_by_window(&mut self, offset: u64, len: usize, value: u64) {
        let window = u64::from(self.function.lock().unwrap().window);
        self.set_config(window + 4, 1, 0);
        self.set_config(window + 8, 4, offset);
        self.set_config(window + 12, 4, len as u64);
        self.set_config(window + 16, len, value);
    }
}

fn places(end: u64) -> impl Iterator<Item = (u64, usize)> {
    [1, 2, 4, 8].into_iter().flat_map(move |len| (0..end).step_by(len).map(move |at| (at, len)))
}

/// Which bytes of the common structure a write may change in `status` (4.1.4.3, and 2.1 and 3.1.1 for the order of things).
fn may_change(offset: u64, len: usize, status: u64) -> Range<u64> {
    match (offset, len) {
        (0x00 | 0x08, 4) => offset..offset + 8,
        (0x0c, 4) if status & FEATURES_OK == ACKNOWLEDGE_AND_DRIVER => 0x0c..0x10,
        (0x10 | 0x1a, 2) => offset..offset + 2,
        // All that belongs to the queue is another's then.
        (0x16, 2) => 0x16..0x38,
        (0x18 | 0x1c, 2) | (0x20..0x38, 4 | 8) if status != DRIVER_OK => offset..offset + len as u64,
        // A reset changes everything in here, and is looked at elsewhere.
        (0x14, 1) => 0..0x38,
        _ => 0..0,
    }
}

#[test]
fn a_write_to_the_common_structure_changes_its_field_or_nothing_and_the_window_leads_to_the_same() {
    for status in STATUSES {
        for (offset, len) in places(common::SIZE + 8) {
            let (mut guest, mut other) = (Guest::in_status(status), Guest::in_status(status));
            for value in VALUES {
                let before = guest.image();
                guest.write(offset, len, value);
                let after = guest.image();
                let case = format!("status {status:#x}, {offset:#x} by {len} <- {value:#x}");
                let changes = may_change(offset, len, status);
                for (at, (old, new)) in (0u64..).zip(before.common.iter().zip(after.common)) {
                    assert!(*old == new || changes.contains(&at), "{case}: {at:#x}: {old:#x} to {new:#x}");
                }
                let read_only =
                    [0x12..0x14, 0x15..0x16].map(|range| (before.common[range.clone()].to_vec(), range));
                read_only.into_iter().for_each(|(old, range)| assert_eq!(after.common[range], old, "{case}"));
                assert_eq!((&after.table, &after.config), (&before.table, &before.config), "{case}");
                if len <= 4 {
                    other.write_by_window(offset, len, value);
                    let other = other.image();
                    assert_eq!(
                        (other.common, other.table),
                        (after.common, after.table),
                        "{case}: by the window"
                    );
                }
                if (offset, len) == (0x14, 1) {
                    break;
                }
            }
        }
    }
}

#[test]
fn the_message_table_reads_back_as_written_and_the_other_pages_keep_to_themselves() {
    for status in STATUSES {
        let mut guest = Guest::in_status(status);
        for (offset, len) in places(TABLE_SIZE + 16) {
            for value in VALUES {
                let before = guest.image();
                guest.write(TABLE + offset, len, value);
                let mut expected = before.clone();
                if len >= 4 && offset < TABLE_SIZE {
                    for (at, byte) in (offset..).zip(&value.to_le_bytes()[..len]) {
                        // PCI 3.0, 6.8.2.7 to 6.8.2.10.
                        let mask = [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0];
                        expected.table[at as usize] = byte & mask[at as usize % 16];
                    }
                }
                assert_eq!(guest.image(), expected, "status {status:#x}, {offset:#x} by {len} <- {value:#x}");
            }
        }
        // ISR status, configuration that is not there, the pending bits, and what is behind them.
        for (page, (offset, len)) in [ISR, DEVICE, PENDING, PENDING + PAGE, SIZE - PAGE]
            .into_iter()
            .flat_map(|page| places(24).map(move |at| (page, at)))
        {
            for value in VALUES {
                let before = guest.image();
                guest.write(page + offset, len, value);
                assert_eq!(
                    guest.image(),
                    before,
                    "status {status:#x}, {page:#x}+{offset:#x} by {len} <- {value:#x}"
                );
            }
        }
        // Doorbells, of queues that there are not as well: a kick says nothing by its value.
        let before = guest.image();
        for (offset, len) in places(24) {
            VALUES.into_iter().for_each(|value| guest.write(NOTIFY + offset, len, value));
        }
        let after = guest.image();
        assert_eq!((after.common, after.table, after.config), (before.common, before.table, before.config));
    }
}

#[test]
fn configuration_space_reads_back_what_is_the_guests_to_change() {
    for status in STATUSES {
        let mut guest = Guest::in_status(status);
        let (window, msix) = {
            let function = guest.function.lock().unwrap();
            (usize::from(function.window), usize::from(function.msix_capability))
        };
        let mut mask = [0u8; 256];
        for (at, bits) in [
            // Memory, bus master; INTx. Cache line size, BAR, interrupt line.
            (0x04, &[6, 4][..]),
            (0x0c, &[255]),
            (0x10, &[0, 0x80, 255, 255, 255, 255, 255, 255]),
            (0x3c, &[255]),
            // Message control: on, all masked. Of the window all but its data, which is what it leads to.
            (msix + 3, &[0xc0]),
            (window + 4, &[255]),
            (window + 8, &[255; 8]),
        ] {
            mask[at..at + bits.len()].copy_from_slice(bits);
        }
        for (register, len) in places(256).filter(|(_, len)| *len < 8) {
            if register as usize == window + 16 {
                continue;
            }
            for value in VALUES {
                let before = guest.image();
                guest.set_config(register, len, value);
                let after = guest.image();
                let mut expected = before.config;
                for (at, new) in (register as usize..).zip(&value.to_le_bytes()[..len]) {
                    expected[at] = expected[at] & !mask[at] | new & mask[at];
                }
                // What it last led to.
                expected[window + 16..].copy_from_slice(&after.config[window + 16..]);
                let case = format!("status {status:#x}, {register:#x} by {len} <- {value:#x}");
                assert_eq!(after.config, expected, "{case}");
                assert_eq!((after.common, after.table), (before.common, before.table), "{case}");
            }
        }
    }
}
