//! The device by which kvm-unit-tests try Hyper-V's interrupt controller and connections: what QEMU calls hyperv-testdev. There
//! only when asked for, and for guests with `--cpu ...,+hyperv`.
//!
//! A write of 4 bytes to its port makes or ends a route to a synthetic interrupt, raises one, or makes or ends a connection
//! for messages or events; the guest's hypercalls then go through those. It writes into the pages that the guest gave its
//! interrupt controller (TLFS, Inter-Partition Communication). A message whose slot is full waits, and goes when the guest has emptied it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use crate::bus::{Busy, Device, Effect, lock};
use crate::event_loop::{Event, Handler, Interest, Sources, Worker};
use crate::guest_warn;
use crate::hyperv::{
    Hypercalls, INVALID_CONNECTION_ID, INVALID_HYPERCALL_CODE, POST_MESSAGE, SIGNAL_EVENT, Synic,
};
use crate::memory::GuestRam;
use crate::sandbox::Needs;
use crate::state::{StateError, Stateful};
use crate::threads::Role;
use crate::vm::Interrupt;
use crate::vm::testdev::TestVm;

/// Ports, from [`layout::HYPERV_TEST`](crate::memory::layout::HYPERV_TEST).
pub const SIZE: u64 = 4;

/// Hypercall statuses (TLFS, Hypercall Interface).
const SUCCESS: u64 = 0;
const INVALID_HYPERCALL_INPUT: u64 = 3;
const INVALID_ALIGNMENT: u64 = 4;
const INSUFFICIENT_BUFFERS: u64 = 0x13;

/// Synthetic interrupt sources of a vCPU.
const SINTS: u32 = 16;
/// Bytes of a message, and of its part behind the header (TLFS, SynIC Message Format); of one source's event flags.
const MESSAGE: usize = 256;
const PAYLOAD: usize = 240;
/// Where the header has the payload's size and the flag that another message waits.
const SIZE_AT: u64 = 4;
const FLAGS_AT: u64 = 5;
const PENDING: u8 = 1;

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Kind {
    Message,
    Event,
}

/// A connection's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Connection {
    vcpu: u32,
    sint: u32,
    /// A message that could not be delivered yet: type, size and payload as they will lie in its slot.
    waiting: Option<Vec<u8>>,
}

/// What the guest could tell apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    synics: BTreeMap<u32, Synic>,
    /// Asked for by themselves.
    routes: Vec<(u32, u32)>,
    /// By kind and number, of which there are 256 each.
    connections: BTreeMap<(Kind, u8), Connection>,
}

/// The device.
pub struct HypervTestDevice {
    vm: Weak<dyn TestVm>,
    ram: Arc<GuestRam>,
    cpus: u32,
    state: State,
    /// For each route of `state`, and each that a connection there needs.
    interrupts: BTreeMap<(u32, u32), Arc<dyn Interrupt>>,
    /// The guest has ended an interrupt, or read its messages.
    eoi: Event,
    worker: Option<Worker>,
    paused: bool,
}

impl HypervTestDevice {
    /// For a machine of so many vCPUs.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn new(vm: Weak<dyn TestVm>, ram: Arc<GuestRam>, cpus: u32) -> io::Result<Arc<Mutex<Self>>> {
        let (eoi, state, interrupts) = (Event::new()?, State::default(), BTreeMap::new());
        let watched = eoi.try_clone()?;
        let device = Self { vm, ram, cpus, state, interrupts, eoi, worker: None, paused: false };
        let device = Arc::new(Mutex::new(device));
        let handler = Deliver { eoi: watched, device: Arc::downgrade(&device) };
        lock(&device).worker =
            Some(Worker::spawn(Role::Device("hyperv-test".to_owned(), Needs::empty()), handler)?);
        Ok(device)
    }

    /// Has KVM's routes be those that are needed now.
    fn route(&mut self) -> io::Result<()> {
        let vm = self.vm.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        let ends = self.state.connections.values().map(|end| (end.vcpu, end.sint));
        let needed: Vec<_> = self.state.routes.iter().copied().chain(ends).collect();
        let gone: Vec<_> = self.interrupts.keys().copied().filter(|at| !needed.contains(at)).collect();
        for at in gone {
            self.interrupts.remove(&at);
            vm.remove_sint(at.0, at.1)?;
        }
        for at in needed {
            if !self.interrupts.contains_key(&at) {
                self.interrupts.insert(at, vm.sint(at.0, at.1, self.eoi.as_fd())?);
            }
        }
        Ok(())
    }

    /// The page of `register`, one of `vcpu`'s, at source `sint`'s part of it; none where the guest has it off.
    fn slot(&self, vcpu: u32, sint: u32, register: fn(&Synic) -> u64) -> Option<u64> {
        let synic = self.state.synics.get(&vcpu).filter(|synic| synic.control & 1 != 0)?;
        let page = register(synic);
        (page & 1 != 0).then_some((page & !0xfff) + u64::from(sint) * MESSAGE as u64)
    }

    /// Delivers the message that waits for connection `id`, if its slot is free; else the slot tells the guest of it.
    fn deliver(&mut self, id: u8) -> Option<()> {
        let end = self.state.connections.get(&(Kind::Message, id))?;
        let message = end.waiting.as_ref()?;
        let at = self.slot(end.vcpu, end.sint, |synic| synic.messages)?;
        let (slot, kind) = (GuestAddress(at), message.first_chunk()?);
        if self.ram.load::<u32>(slot, Ordering::Acquire).ok()? != 0 {
            self.ram.write_obj(PENDING, GuestAddress(at + FLAGS_AT)).ok()?;
            // The guest may have emptied it before it could see the flag, and then says nothing more.
            if self.ram.load::<u32>(slot, Ordering::SeqCst).ok()? != 0 {
                return None;
            }
        }
        self.ram.write_slice(message.get(4..)?, GuestAddress(at + SIZE_AT)).ok()?;
        self.ram.store(u32::from_le_bytes(*kind), slot, Ordering::Release).ok()?;
        self.interrupts.get(&(end.vcpu, end.sint))?.trigger();
        self.state.connections.get_mut(&(Kind::Message, id))?.waiting = None;
        Some(())
    }

    /// Delivers what waits and can be, unless the machine is to be at rest.
    fn deliver_all(&mut self) {
        let waiting = |((kind, id), end): (&(Kind, u8), &Connection)| {
            (*kind == Kind::Message && end.waiting.is_some()).then_some(*id)
        };
        if !self.paused {
            let ids: Vec<_> = self.state.connections.iter().filter_map(waiting).collect();
            ids.into_iter().for_each(|id| _ = self.deliver(id));
        }
    }

    /// HvCallPostMessage with its input at `address`: connection, reserved, type, size, payload.
    fn post(&mut self, address: u64) -> u64 {
        let mut input = [0; 16 + PAYLOAD];
        if !address.is_multiple_of(8) {
            return INVALID_ALIGNMENT;
        }
        if self.ram.read_slice(&mut input, GuestAddress(address)).is_err() {
            return INVALID_HYPERCALL_INPUT;
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| input[at + i]));
        let (connection, kind, size) = (word(0), word(8), word(12));
        if kind == 0 || size as usize > PAYLOAD {
            return INVALID_HYPERCALL_INPUT;
        }
        let Ok(id) = u8::try_from(connection) else { return INVALID_CONNECTION_ID };
        match self.state.connections.get_mut(&(Kind::Message, id)) {
            None => return INVALID_CONNECTION_ID,
            Some(end) if end.waiting.is_some() => return INSUFFICIENT_BUFFERS,
            Some(end) => {
                // Type, size, no flags, and the connection as where it came from.
                let header = [&kind.to_le_bytes()[..], &[size as u8, 0, 0, 0], &u64::from(id).to_le_bytes()];
                end.waiting = Some([&header.concat(), &input[16..]].concat());
            }
        }
        self.deliver(id);
        SUCCESS
    }

    /// HvCallSignalEvent, of the connection with this number.
    fn signal(&mut self, connection: u64) -> u64 {
        let Ok(id) = u8::try_from(connection) else { return INVALID_CONNECTION_ID };
        let Some(end) = self.state.connections.get(&(Kind::Event, id)) else {
            return INVALID_CONNECTION_ID;
        };
        let Some(flags) = self.slot(end.vcpu, end.sint, |synic| synic.events) else { return SUCCESS };
        let byte = self.ram.get_slice(GuestAddress(flags + u64::from(id / 8)), 1);
        // The guest clears flags at the same time.
        let before = byte.ok().and_then(|byte| {
            let byte = byte.get_atomic_ref::<AtomicU8>(0).ok()?;
            Some(byte.fetch_or(1 << (id % 8), Ordering::SeqCst))
        });
        if before.is_some_and(|before| before & 1 << (id % 8) == 0)
            && let Some(interrupt) = self.interrupts.get(&(end.vcpu, end.sint))
        {
            interrupt.trigger();
        }
        SUCCESS
    }

    /// What the port is asked for.
    fn control(&mut self, command: u8, vcpu: u32, sint: u32, id: u8) -> io::Result<()> {
        let at = (vcpu, sint);
        let is_there = vcpu < self.cpus && sint < SINTS;
        let connection = || Connection { vcpu, sint, waiting: None };
        match command {
            1 if is_there && !self.state.routes.contains(&at) => self.state.routes.push(at),
            2 => self.state.routes.retain(|route| *route != at),
            3 => {
                self.interrupts.get(&at).ok_or(io::ErrorKind::NotFound)?.trigger();
                return Ok(());
            }
            4 if is_there => _ = self.state.connections.insert((Kind::Message, id), connection()),
            5 => _ = self.state.connections.remove(&(Kind::Message, id)),
            6 if is_there => _ = self.state.connections.insert((Kind::Event, id), connection()),
            7 => _ = self.state.connections.remove(&(Kind::Event, id)),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.route()
    }
}

/// Wakes up when the guest has room for messages.
struct Deliver {
    eoi: Event,
    device: Weak<Mutex<HypervTestDevice>>,
}

impl Handler for Deliver {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        sources.add(&self.eoi, 0, Interest::INPUT)
    }

    fn ready(&mut self, _: u32, _: &mut Sources<'_, '_>) {
        self.eoi.clear();
        if let Some(device) = self.device.upgrade() {
            lock(&device).deliver_all();
        }
    }
}

impl Hypercalls for HypervTestDevice {
    fn set_synic(&mut self, vcpu: u32, synic: Synic) {
        if vcpu < self.cpus {
            self.state.synics.insert(vcpu, synic);
        }
    }

    fn call(&mut self, input: u64, parameters: [u64; 2]) -> u64 {
        const FAST: u64 = 1 << 16;
        match (input as u16, input & FAST != 0) {
            (POST_MESSAGE, false) => self.post(parameters[0]),
            (SIGNAL_EVENT, true) => self.signal(parameters[0]),
            (SIGNAL_EVENT, false) if !parameters[0].is_multiple_of(8) => INVALID_ALIGNMENT,
            (SIGNAL_EVENT, false) => match self.ram.read_obj(GuestAddress(parameters[0])) {
                Ok(connection) => self.signal(connection),
                Err(_) => INVALID_HYPERCALL_INPUT,
            },
            _ => INVALID_HYPERCALL_CODE,
        }
    }
}

impl Device for HypervTestDevice {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (0, &[sint, vcpu, command, id]) = (offset, data)
            && let Err(error) = self.control(command, vcpu.into(), sint.into(), id)
        {
            guest_warn!("Hyper-V's test device: command {command} for vCPU {vcpu}, SINT {sint}: {error}");
        }
        Effect::None
    }

    fn pause(&mut self, _deadline: Instant) -> Result<(), Busy> {
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) {
        self.paused = false;
        self.deliver_all();
    }
}

impl Stateful for HypervTestDevice {
    type State = State;

    fn save(&self) -> State {
        self.state.clone()
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let ends = state.connections.values().map(|end| (end.vcpu, end.sint));
        let mut all = state.routes.iter().copied().chain(ends);
        let fits = |end: &Connection| end.waiting.as_ref().is_none_or(|message| message.len() == MESSAGE);
        if !all.all(|(vcpu, sint)| vcpu < self.cpus && sint < SINTS)
            || !state.connections.values().all(fits)
            || state.synics.keys().any(|vcpu| *vcpu >= self.cpus)
        {
            return Err(StateError::Invalid("a route or connection that cannot be".to_owned()));
        }
        drop(all);
        self.state = state;
        self.route().map_err(|error| StateError::Invalid(format!("Hyper-V's routes: {error}")))
    }
}

#[cfg(test)]
mod tests;
