//! MSI-X (PCI 3.0, 6.8.2): a table of messages in the function's memory, each of which the driver can mask, and the bits that say which
//! of those were due meanwhile.
//!
//! A vector costs the host nothing until the driver opens it. What is raised while it is masked stays in its eventfd, and comes
//! when it is opened. A change of many messages is one change of the host's routes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use serde::{Deserialize, Serialize};

use crate::state::{StateError, Stateful};
use crate::vm::{Interrupt, Msi, Vector, Vm};

/// The capability's ID.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of an entry of the table.
pub const ENTRY: u64 = 16;
/// Message Control (6.8.2.3): MSI-X Enable.
pub const ENABLE: u16 = 1 << 15;
/// Message Control: Function Mask.
pub const FUNCTION_MASK: u16 = 1 << 14;
/// Vector Control (6.8.2.9): the mask bit.
const MASKED: u32 = 1;

/// The interrupts as those who raise them see them: any thread, under no lock.
#[derive(Debug, Default)]
pub struct Lines {
    vectors: OnceLock<Vec<Vector>>,
    enabled: AtomicBool,
}

impl Lines {
    /// Whether interrupts are messages now.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Vector `index`, once the driver has switched to messages.
    pub fn get(&self, index: u16) -> Option<&Vector> {
        self.vectors.get()?.get(usize::from(index))
    }

    /// Raises vector `index`, if there is such.
    pub fn raise(&self, index: u16) {
        self.get(index).into_iter().for_each(Interrupt::trigger);
    }
}

/// An entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    message: Msi,
    masked: bool,
    /// The message that the host sends for it.
    routed: Option<Msi>,
    /// Its interrupts are delivered.
    open: bool,
}

impl Entry {
    /// As after a reset.
    const NEW: Self = Self { message: Msi { address: 0, data: 0 }, masked: true, routed: None, open: false };

    fn bytes(&self) -> [u8; ENTRY as usize] {
        let mut bytes = [0; ENTRY as usize];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&u32::from(self.masked).to_le_bytes());
        bytes
    }

    fn write(&mut self, word: u64, value: u32) {
        let address = &mut self.message.address;
        match word {
            // The lowest two bits are 0, always (6.8.2.7).
            0 => *address = *address & !0xffff_ffff | u64::from(value & !3),
            1 => *address = *address & 0xffff_ffff | u64::from(value) << 32,
            2 => self.message.data = value,
            _ => self.masked = value & MASKED != 0,
        }
    }
}

/// A function's MSI-X.
pub struct Msix {
    vm: Weak<dyn Vm>,
    table: Vec<Entry>,
    control: u16,
    lines: Arc<Lines>,
}

impl Msix {
    /// `count` vectors (2048 at most), all masked.
    pub fn new(vm: Weak<dyn Vm>, count: u16) -> Self {
        Self { vm, table: vec![Entry::NEW; count.into()], control: 0, lines: Arc::default() }
    }

    /// How many vectors it has.
    pub fn count(&self) -> u16 {
        self.table.len() as u16
    }

    /// For those who raise its interrupts.
    pub fn lines(&self) -> Arc<Lines> {
        self.lines.clone()
    }

    /// Body of the capability, for a table and pending bits at these offsets of BAR `bar` (multiples of 8).
    pub fn capability(&self, bar: u32, table: u32, pending: u32) -> Vec<u8> {
        let size = self.count() - 1;
        [&size.to_le_bytes()[..], &(table | bar).to_le_bytes(), &(pending | bar).to_le_bytes()].concat()
    }

    /// The driver has written Message Control.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLE | FUNCTION_MASK);
        let enable = self.control & ENABLE != 0;
        if enable && self.lines.vectors.get().is_none() && !self.make_vectors() {
            return;
        }
        let was = self.lines.enabled.swap(enable, Ordering::SeqCst);
        self.settle();
        if was && !enable {
            // Nobody will hear of these.
            self.lines.vectors.get().into_iter().flatten().for_each(Vector::clear);
        }
    }

    fn make_vectors(&self) -> bool {
        let Some(vm) = self.vm.upgrade() else { return false };
        match vm.vectors(self.table.len()) {
            Ok(vectors) => self.lines.vectors.set(vectors).is_ok(),
            Err(error) => {
                log::error!("{} message-signalled interrupts: {error}", self.table.len());
                false
            }
        }
    }

    /// Delivers what is to be delivered now, and nothing else.
    fn settle(&mut self) {
        let (Some(vectors), Some(vm)) = (self.lines.vectors.get(), self.vm.upgrade()) else { return };
        let all = self.lines.enabled() && self.control & FUNCTION_MASK == 0;
        for (entry, vector) in self.table.iter_mut().zip(vectors) {
            if entry.open && (entry.masked || !all) {
                vm.close(vector);
                entry.open = false;
            }
        }
        let moved: Vec<_> = self
            .table
            .iter()
            .zip(vectors)
            .filter(|(entry, _)| all && !entry.masked && entry.routed != Some(entry.message))
            .map(|(entry, vector)| (vector, entry.message))
            .collect();
        if !moved.is_empty()
            && let Err(error) = vm.route(&moved)
        {
            log::error!("routes of message-signalled interrupts: {error}");
            return;
        }
        for (entry, vector) in self.table.iter_mut().zip(vectors).filter(|(entry, _)| all && !entry.masked) {
            entry.routed = Some(entry.message);
            if !entry.open {
                match vm.open(vector) {
                    Ok(()) => entry.open = true,
                    Err(error) => log::error!("message-signalled interrupt: {error}"),
                }
            }
        }
    }

    /// The function is gone: nothing of it interrupts any more, and the host's numbers are free.
    pub fn remove(&mut self) {
        self.set_control(0);
        self.table.clear();
        if let (Some(vectors), Some(vm)) = (self.lines.vectors.get(), self.vm.upgrade()) {
            vm.release(vectors);
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let entry = self.table.get((at / ENTRY) as usize);
            *byte = entry.map_or(0, |entry| entry.bytes()[(at % ENTRY) as usize]);
        }
    }

    /// The guest writes to the table: 4 or 8 bytes, aligned (6.8.2); anything else is undefined, and ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if !(len == 4 || len == 8) || !offset.is_multiple_of(len) {
            return;
        }
        let Some(entry) = self.table.get_mut((offset / ENTRY) as usize) else { return };
        for (word, value) in (offset % ENTRY / 4..).zip(data.chunks_exact(4)) {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(value);
            entry.write(word, u32::from_le_bytes(bytes));
        }
        self.settle();
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let vectors = self.lines.vectors.get().map_or(&[][..], Vec::as_slice);
        for (byte, at) in data.iter_mut().zip(offset..) {
            let eight = self.table.iter().zip(vectors).skip(at as usize * 8).take(8);
            let pending = eight.map(|(entry, vector)| u8::from(!entry.open && vector.is_pending()));
            *byte = pending.zip(0..).fold(0, |byte, (bit, at)| byte | bit << at);
        }
    }
}

/// [`Msix`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    control: u16,
    /// Address, data, masked, pending.
    entries: Vec<(u64, u32, bool, bool)>,
}

impl Stateful for Msix {
    type State = State;

    fn save(&self) -> State {
        let pending = |index| self.lines.get(index).is_some_and(Vector::is_pending);
        let entry = |(entry, index): (&Entry, u16)| {
            (entry.message.address, entry.message.data, entry.masked, !entry.open && pending(index))
        };
        State { control: self.control, entries: self.table.iter().zip(0..).map(entry).collect() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let aligned = state.entries.iter().all(|(address, ..)| address & 3 == 0);
        if state.entries.len() != self.table.len()
            || state.control & !(ENABLE | FUNCTION_MASK) != 0
            || !aligned
        {
            return Err(StateError::Invalid(format!("MSI-X {state:x?}")));
        }
        for (entry, (address, data, masked, _)) in self.table.iter_mut().zip(&state.entries) {
            *entry = Entry { message: Msi { address: *address, data: *data }, masked: *masked, ..*entry };
        }
        self.set_control(state.control);
        // Those that are open once more: an interrupt that KVM was about to deliver is in nobody's state.
        for (index, (entry, (.., pending))) in (0..).zip(self.table.iter().zip(&state.entries)) {
            if entry.open || *pending {
                self.lines.raise(index);
            }
        }
        Ok(())
    }
}
