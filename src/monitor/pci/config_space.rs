//! [`ConfigSpace`]: the registers of a function with a type 0 header (PCI 3.0, 6.1 and 6.2), and which of their bits a guest can change.
//!
//! What a write means beside that is the function's to know.

use serde::{Deserialize, Serialize};

use crate::state::{StateError, Stateful};

/// Bytes of it.
pub const SIZE: usize = 256;

// Registers (6.1, figure 6-1).
const VENDOR_ID: u8 = 0x00;
const DEVICE_ID: u8 = 0x02;
const COMMAND: u8 = 0x04;
const STATUS: u8 = 0x06;
const REVISION_ID: u8 = 0x08;
const CLASS_CODE: u8 = 0x09;
const CACHE_LINE_SIZE: u8 = 0x0c;
const BAR0: u8 = 0x10;
const BAR1: u8 = 0x14;
const SUBSYSTEM_VENDOR_ID: u8 = 0x2c;
const SUBSYSTEM_ID: u8 = 0x2e;
const CAPABILITIES_POINTER: u8 = 0x34;
const INTERRUPT_LINE: u8 = 0x3c;
const INTERRUPT_PIN: u8 = 0x3d;
/// The first capability's place.
const CAPABILITIES: u8 = 0x40;

/// COMMAND: the function's memory is decoded.
const MEMORY_SPACE: u16 = 1 << 1;
/// COMMAND: it may write to memory.
const BUS_MASTER: u16 = 1 << 2;
/// COMMAND: it may not raise its INTx line.
const INTERRUPT_DISABLE: u16 = 1 << 10;
/// STATUS: its INTx line is, or would be, raised.
const INTERRUPT_STATUS: u16 = 1 << 3;
/// STATUS: there is a list of capabilities.
const CAPABILITIES_LIST: u16 = 1 << 4;
/// A memory BAR that takes two registers (6.2.5.1).
const BAR_64: u32 = 1 << 2;
/// The bits of a memory BAR that are no address.
const BAR_FLAGS: u32 = 0xf;
/// INTA#.
const PIN_A: u8 = 1;

/// What a function says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, subclass, programming interface (24 bits).
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A function's configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits that the guest can change.
    writable: [u8; SIZE],
    bar_size: u64,
    /// The address in the BAR, once all of it is written.
    base: u64,
    /// Where the next capability goes, and the pointer that leads to it.
    next: u8,
    link: u8,
}

impl ConfigSpace {
    /// One without memory, interrupts and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            base: 0,
            next: CAPABILITIES,
            link: CAPABILITIES_POINTER,
        };
        space.put(VENDOR_ID, &identity.vendor.to_le_bytes());
        space.put(DEVICE_ID, &identity.device.to_le_bytes());
        space.put(REVISION_ID, &[identity.revision]);
        space.put(CLASS_CODE, &identity.class.to_le_bytes()[..3]);
        space.put(SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space
    }

    /// Gives it a 64-bit memory BAR, not prefetchable: `size` bytes, a power of two of 16 and more, at `base` until the guest says
    /// otherwise.
    pub fn add_memory(&mut self, size: u64, base: u64) {
        debug_assert!(size.is_power_of_two() && size >= 16 && base.is_multiple_of(size));
        self.bar_size = size;
        self.base = base;
        self.put(BAR0, &((base as u32 & !BAR_FLAGS) | BAR_64).to_le_bytes());
        self.put(BAR1, &((base >> 32) as u32).to_le_bytes());
        let mask = !(size - 1);
        self.allow(BAR0, &mask.to_le_bytes());
        self.allow(COMMAND, &(MEMORY_SPACE | BUS_MASTER).to_le_bytes());
    }

    /// Gives it the pin INTA#, which is wired to interrupt `gsi`.
    pub fn add_interrupt(&mut self, gsi: u32) {
        self.put(INTERRUPT_PIN, &[PIN_A]);
        self.put(INTERRUPT_LINE, &[gsi as u8]);
        self.allow(INTERRUPT_LINE, &[0xff]);
        self.allow(COMMAND, &INTERRUPT_DISABLE.to_le_bytes());
    }

    /// Appends a capability (6.7): its ID, and what follows the pointer to the next one. Gives its register.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u8 {
        let (at, link) = (self.next, self.link);
        self.put(link, &[at]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.put(STATUS, &CAPABILITIES_LIST.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len() as u8).next_multiple_of(4);
        at
    }

    /// Sets what the guest reads at `register`.
    pub fn put(&mut self, register: u8, value: &[u8]) {
        let at = usize::from(register);
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Lets the guest change the bits of `mask` at `register`, too.
    pub fn allow(&mut self, register: u8, mask: &[u8]) {
        let writable = self.writable.iter_mut().skip(register.into());
        writable.zip(mask).for_each(|(writable, mask)| *writable |= mask);
    }

    /// What is at `register`. Behind the end there is nothing: `data` stays as it is.
    pub fn read(&self, register: u8, data: &mut [u8]) {
        let at = usize::from(register);
        if let Some(bytes) = self.bytes.get(at..at + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// The guest writes; bits that it cannot change stay.
    pub fn write(&mut self, register: u8, data: &[u8]) {
        let decoded = self.decodes_memory();
        let at = usize::from(register);
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at);
        places.zip(data).for_each(|((byte, mask), new)| *byte = *byte & !mask | new & mask);
        // An address of two registers counts once its second half is there; all of it when decoding is switched on.
        let end = at + data.len();
        let second_half = at < usize::from(BAR1) + 4 && end > usize::from(BAR1);
        if second_half || (!decoded && self.decodes_memory()) {
            self.base = self.bar();
        }
    }

    fn bar(&self) -> u64 {
        let mut bar = [0; 8];
        self.read(BAR0, &mut bar);
        u64::from_le_bytes(bar) & !u64::from(BAR_FLAGS)
    }

    fn command(&self) -> u16 {
        let mut command = [0; 2];
        self.read(COMMAND, &mut command);
        u16::from_le_bytes(command)
    }

    fn decodes_memory(&self) -> bool {
        self.command() & MEMORY_SPACE != 0
    }

    /// Where its memory is to be: first address and size. `None` while decoding is off.
    pub fn memory(&self) -> Option<(u64, u64)> {
        (self.bar_size != 0 && self.decodes_memory()).then_some((self.base, self.bar_size))
    }

    /// Whether it may raise its INTx line.
    pub fn may_raise_line(&self) -> bool {
        self.command() & INTERRUPT_DISABLE == 0
    }

    /// STATUS tells whether it has an interrupt for its INTx line.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let bit = INTERRUPT_STATUS as u8;
        let status = &mut self.bytes[usize::from(STATUS)];
        *status = if pending { *status | bit } else { *status & !bit };
    }
}

/// [`ConfigSpace`]'s saved state: what the guest can change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    bytes: Vec<u8>,
    base: u64,
}

impl Stateful for ConfigSpace {
    type State = State;

    fn save(&self) -> State {
        let bytes = self.bytes.iter().zip(&self.writable).map(|(byte, mask)| byte & mask).collect();
        State { bytes, base: self.base }
    }

    fn restore(&mut self, State { bytes, base }: State) -> Result<(), StateError> {
        let fits =
            bytes.len() == SIZE && bytes.iter().zip(&self.writable).all(|(byte, mask)| byte & !mask == 0);
        if !fits || (self.bar_size != 0 && !base.is_multiple_of(self.bar_size)) {
            return Err(StateError::Invalid(format!("configuration space, memory at {base:#x}")));
        }
        let places = self.bytes.iter_mut().zip(&self.writable).zip(bytes);
        places.for_each(|((byte, mask), saved)| *byte = *byte & !mask | saved);
        self.base = base;
        Ok(())
    }
}
