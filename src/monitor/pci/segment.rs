//! [`Segment`]: the functions by their device number, and where their memory is decoded; and its windows on the machine's buses.
//!
//! The windows never move, so the buses need not change while a guest moves BARs. A BAR that would lie outside the windows for
//! memory, or on another's, is not followed: the function stays where it was.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::Function;
use crate::bus::{Device, Effect, lock};
use crate::guest_warn;
use crate::state::{StateError, Stateful, Stateless};

/// Functions that a bus has room for: each is its device's number 0.
pub const DEVICES: u8 = 32;
/// Bytes of [`Ecam`] for one bus.
pub const ECAM_BUS: u64 = 0x10_0000;
/// Ports from CONFIG_ADDRESS to the end of CONFIG_DATA.
pub const PORTS: u64 = 8;

type SharedFunction = Arc<Mutex<dyn Function>>;

struct Entry {
    device: u8,
    function: SharedFunction,
    /// Where its memory is, or was last.
    at: Range<u64>,
    decoded: bool,
}

/// The functions of a segment with one bus.
pub struct Segment {
    memory: Vec<Range<u64>>,
    entries: Mutex<Vec<Entry>>,
}

impl Segment {
    /// An empty one, whose functions' memory is in one of the windows `memory`.
    pub fn new(memory: impl IntoIterator<Item = Range<u64>>) -> Self {
        Self { memory: memory.into_iter().collect(), entries: Mutex::default() }
    }

    /// Puts a function there as device number `device` (below [`DEVICES`], and free). Its memory will be at `at`, if the guest
    /// leaves it there: its doorbells are there already.
    ///
    /// # Errors
    /// They cannot be there.
    pub fn insert(&self, device: u8, function: SharedFunction, at: Range<u64>) -> std::io::Result<()> {
        if !at.is_empty() {
            lock(&function).move_to(at.start)?;
        }
        lock(&self.entries).push(Entry { device, function, at, decoded: false });
        Ok(())
    }

    /// Takes device number `device` off the bus: nothing leads to it any more, and its place is free. True if it was there.
    pub fn remove(&self, device: u8) -> bool {
        let mut entries = lock(&self.entries);
        let Some(index) = entries.iter().position(|entry| entry.device == device) else { return false };
        // Under the lock: nobody follows it to a new place meanwhile.
        lock(&entries.remove(index).function).remove();
        true
    }

    /// Where the memory of device number `device` is decoded now.
    pub fn place(&self, device: u8) -> Option<Range<u64>> {
        let entries = lock(&self.entries);
        let entry = entries.iter().find(|entry| entry.device == device && entry.decoded)?;
        Some(entry.at.clone())
    }

    fn function(&self, device: u8) -> Option<SharedFunction> {
        lock(&self.entries).iter().find(|entry| entry.device == device).map(|entry| entry.function.clone())
    }

    /// The function whose memory is at `address`, and the offset into it.
    fn at(&self, address: u64, len: usize) -> Option<(SharedFunction, u64)> {
        let last = address.checked_add(len as u64)? - 1;
        let entries = lock(&self.entries);
        let here = |entry: &&Entry| entry.decoded && entry.at.contains(&address) && entry.at.contains(&last);
        entries.iter().find(here).map(|entry| (entry.function.clone(), address - entry.at.start))
    }

    /// Reads configuration space; `data` stays as it is, all ones, where there is no function. An access that is not naturally
    /// aligned belongs to none.
    fn read_config(&self, Register { device, register }: Register, data: &mut [u8]) {
        let Some(function) = self.function(device) else { return };
        match u8::try_from(register) {
            Ok(register) => lock(&function).read_config(register, data),
            // No extended capabilities.
            Err(_) => data.fill(0),
        }
    }

    fn write_config(&self, Register { device, register }: Register, data: &[u8]) -> Effect {
        let (Some(function), Ok(register)) = (self.function(device), u8::try_from(register)) else {
            return Effect::None;
        };
        let effect = lock(&function).write_config(register, data);
        self.follow(device);
        effect
    }

    /// Decodes each function's memory where its configuration space, which came from elsewhere, has it.
    pub fn follow_all(&self) {
        let devices: Vec<_> = lock(&self.entries).iter().map(|entry| entry.device).collect();
        devices.into_iter().for_each(|device| self.follow(device));
    }

    /// Decodes the memory of `device` where it wants to have it now, if that can be.
    fn follow(&self, device: u8) {
        let mut entries = lock(&self.entries);
        let Some(index) = entries.iter().position(|entry| entry.device == device) else { return };
        let function = entries[index].function.clone();
        let wants = lock(&function).wants();
        let Some((base, size)) = wants else {
            entries[index].decoded = false;
            return;
        };
        let at = base..base.saturating_add(size);
        if entries[index].at == at {
            entries[index].decoded = true;
            return;
        }
        let overlaps = |entry: &&mut Entry| entry.at.start < at.end && at.start < entry.at.end;
        let others = entries.iter_mut().filter(|entry| entry.device != device);
        let (decoded, left): (Vec<_>, Vec<_>) = others.filter(overlaps).partition(|entry| entry.decoded);
        let inside = |window: &Range<u64>| at.start >= window.start && at.end <= window.end;
        if !self.memory.iter().any(inside) || !decoded.is_empty() {
            guest_warn!("PCI device {device}: its memory cannot be at {base:#x}");
            return;
        }
        for entry in left {
            lock(&entry.function).leave();
            entry.at = 0..0;
        }
        match lock(&function).move_to(base) {
            Ok(()) => (entries[index].at, entries[index].decoded) = (at, true),
            Err(error) => log::error!("PCI device {device}: its memory cannot be at {base:#x}: {error}"),
        }
    }
}

/// A register of a function's configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Register {
    device: u8,
    register: u16,
}

impl Register {
    /// By bus, device and function, and the register; `None` if there is no such bus or function.
    fn new(bus: u64, devfn: u64, register: u64) -> Option<Self> {
        (bus == 0 && devfn & 7 == 0)
            .then_some(Self { device: (devfn >> 3) as u8 & (DEVICES - 1), register: register as u16 & 0xfff })
    }
}

/// Configuration space by memory: each function's at a place of its own (PCI Express 5.0, 7.2.2).
pub struct Ecam(pub Arc<Segment>);

impl Ecam {
    /// The parts of an access, none larger than 4 bytes: which register, and which bytes of the data.
    fn parts(offset: u64, len: usize) -> impl Iterator<Item = (Option<Register>, Range<usize>)> {
        let step = len.clamp(1, 4);
        let aligned = offset.is_multiple_of(len.max(1) as u64) && len.is_power_of_two();
        (0..len).step_by(step).map(move |at| {
            let address = offset + at as u64;
            let register = Register::new(address >> 20, address >> 12 & 0xff, address & 0xfff);
            (register.filter(|_| aligned), at..at + step)
        })
    }
}

impl Device for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, bytes) in Self::parts(offset, data.len()) {
            if let (Some(register), Some(data)) = (register, data.get_mut(bytes)) {
                self.0.read_config(register, data);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for (register, bytes) in Self::parts(offset, data.len()) {
            if let (Some(register), Some(data)) = (register, data.get(bytes)) {
                let new = self.0.write_config(register, data);
                effect = if effect == Effect::None { new } else { effect };
            }
        }
        effect
    }
}

impl Stateless for Ecam {}

/// A window in which functions' memory is, from `base` on.
pub struct Memory {
    /// What is behind it.
    pub segment: Arc<Segment>,
    /// Guest address.
    pub base: u64,
}

impl Device for Memory {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.segment.at(self.base + offset, data.len()) {
            lock(&function).read(offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match self.segment.at(self.base + offset, data.len()) {
            Some((function, offset)) => lock(&function).write(offset, data),
            None => Effect::None,
        }
    }
}

impl Stateless for Memory {}

/// CONFIG_ADDRESS: the bit with which CONFIG_DATA leads to configuration space (PCI 3.0, 3.2.2.3.2).
const CONFIG_ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: bits that hold something.
const CONFIG_BITS: u32 = CONFIG_ENABLE | 0xff_fffc;
/// Offset of the byte that is the chipset's reset control register when it is accessed as a byte.
const RESET_CONTROL: u64 = 1;
/// Offset of CONFIG_DATA.
const CONFIG_DATA: u64 = 4;

/// Configuration space by two ports (PCI 3.0, 3.2.2.3.2), and the register between them that is no part of it.
pub struct ConfigPorts {
    segment: Arc<Segment>,
    address: u32,
    reset: Box<dyn Device>,
}

impl ConfigPorts {
    /// The ports of `segment`, with `reset` at the second byte.
    pub fn new(segment: Arc<Segment>, reset: Box<dyn Device>) -> Self {
        Self { segment, address: 0, reset }
    }

    /// The register that CONFIG_DATA is now, for an access at `offset` of it.
    fn register(&self, offset: u64, len: usize) -> Option<Register> {
        let address = u64::from(self.address);
        let fits = offset.is_multiple_of(len as u64) && offset + len as u64 <= 4;
        let register = Register::new(address >> 16 & 0xff, address >> 8 & 0xff, (address & 0xfc) + offset);
        register.filter(|_| fits && self.address & CONFIG_ENABLE != 0)
    }
}

impl Device for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, &mut *data) {
            (0, [_, _, _, _]) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET_CONTROL, [_]) => self.reset.read(0, data),
            (CONFIG_DATA.., data) => {
                if let Some(register) = self.register(offset - CONFIG_DATA, data.len()) {
                    self.segment.read_config(register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & CONFIG_BITS,
            (RESET_CONTROL, [_]) => return self.reset.write(0, data),
            (CONFIG_DATA.., data) => {
                if let Some(register) = self.register(offset - CONFIG_DATA, data.len()) {
                    return self.segment.write_config(register, data);
                }
            }
            _ => {}
        }
        Effect::None
    }
}

/// [`ConfigPorts`]' saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    address: u32,
    reset: Vec<u8>,
}

impl Stateful for ConfigPorts {
    type State = State;

    fn save(&self) -> State {
        State { address: self.address, reset: self.reset.save_bytes() }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.address & !CONFIG_BITS != 0 {
            return Err(StateError::Invalid(format!("CONFIG_ADDRESS {:#x}", state.address)));
        }
        self.reset.restore_bytes(&state.reset)?;
        self.address = state.address;
        Ok(())
    }
}
