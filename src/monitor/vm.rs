//! What devices may ask of the hypervisor: interrupts and doorbells, and nothing else.
//!
//! `kvm::Vm` implements [`Vm`] for real; [`fake`] stands in for it in tests, so that every device runs
//! without `/dev/kvm`. Devices must not know more of KVM than this file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::event_loop::Event;

pub mod testdev;

/// An interrupt that a device can raise. Edge semantics: each call is one interrupt.
///
/// Callable from any thread; never blocks and takes no lock of a device.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt once.
    fn trigger(&self);
    /// An eventfd that does the same when it is signalled, for those who are no code of ours. `None` if there is none.
    fn as_eventfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A message-signalled interrupt: the write that a PCI function would make (PCI 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// A message-signalled interrupt of a device's own. What is raised while it is not [open](Vm::open) is kept, as one.
#[derive(Debug)]
pub struct Vector {
    gsi: u32,
    event: Event,
}

impl Vector {
    /// For implementors of [`Vm`]: it is known as global system interrupt `gsi`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(gsi: u32) -> io::Result<Self> {
        Ok(Self { gsi, event: Event::new()? })
    }

    /// The number under which the hypervisor knows it.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The eventfd that raises it.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Whether it was raised while it was not open.
    pub fn is_pending(&self) -> bool {
        let mut event = [PollFd::new(&self.event, PollFlags::IN)];
        poll(&mut event, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Forgets that.
    pub fn clear(&self) {
        self.event.clear();
    }
}

impl Interrupt for Vector {
    fn trigger(&self) {
        self.event.signal();
    }

    fn as_eventfd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event())
    }
}

/// A guest write that the kernel turns into an eventfd signal instead of an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoEventAddress {
    /// A 4-byte write of `value` to guest physical address `address`.
    Mmio {
        /// Guest physical address.
        address: u64,
        /// The value that must be written, or any if `None`.
        value: Option<u32>,
    },
}

/// The pins of an interrupt controller that is a device of ours: what they are told of by others than the guest's register accesses.
///
/// Caller: any thread, with the controller's mutex held and no other device's that it could be waited for under.
pub trait Pins: Send {
    /// The level of global system interrupt `gsi`.
    fn set_level(&mut self, gsi: u32, high: bool);
    /// A vCPU ended an interrupt of this vector that had come as a level.
    fn end_of_interrupt(&mut self, vector: u8);
}

/// What a device may ask of the virtual machine it is part of. Thread-safe; called while building the machine
/// and when a driver starts or stops a device, not on the data path.
pub trait Vm: Send + Sync {
    /// An edge-triggered interrupt on global system interrupt `gsi` (an I/O APIC pin).
    ///
    /// # Errors
    /// The hypervisor refused the line.
    fn irq_line(&self, gsi: u32) -> io::Result<Arc<dyn Interrupt>>;
    /// Sets the level of global system interrupt `gsi` (an I/O APIC pin).
    ///
    /// # Errors
    /// The hypervisor refused.
    fn set_irq_level(&self, gsi: u32, high: bool) -> io::Result<()>;
    /// Has the global system interrupts from 0 on come as these messages, or not at all: for [`Pins`].
    ///
    /// # Errors
    /// The hypervisor refused, or has pins of its own; all is as before.
    fn route_pins(&self, messages: &[Option<Msi>]) -> io::Result<()>;
    /// Sends a message now. False if no vCPU takes it.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn send(&self, message: Msi) -> io::Result<bool>;
    /// Interrupts of a device's own, `count` of them, which go nowhere yet.
    ///
    /// # Errors
    /// The host is out of descriptors, or the hypervisor of numbers.
    fn vectors(&self, count: usize) -> io::Result<Vec<Vector>>;
    /// Has each of these interrupts come as the message beside it. One call for many costs as much as for one.
    ///
    /// # Errors
    /// The hypervisor refused; all is as before.
    fn route(&self, routes: &[(&Vector, Msi)]) -> io::Result<()>;
    /// Delivers `vector` from now on, and at once if it was raised meanwhile.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn open(&self, vector: &Vector) -> io::Result<()>;
    /// Undoes [`Vm::open`].
    fn close(&self, vector: &Vector);
    /// Gives the numbers of `vectors` back, which are closed: others may get them. None of them may be routed or opened again.
    fn release(&self, vectors: &[Vector]);
    /// Makes writes to `at` signal `event`, an eventfd.
    ///
    /// # Errors
    /// The address is taken already, or the hypervisor is out of room for it.
    fn ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()>;
    /// Undoes [`Vm::ioeventfd`]; both arguments as given there.
    ///
    /// # Errors
    /// No such registration.
    fn remove_ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()>;
}

/// A [`Vm`] that only takes notes. For tests, inside and outside this crate.
pub mod fake {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// An interrupt that counts how often it was raised: by code, and by the eventfd.
    #[derive(Debug)]
    pub struct FakeInterrupt(AtomicUsize, OwnedFd);

    impl Default for FakeInterrupt {
        fn default() -> Self {
            let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            Self(AtomicUsize::default(), event.expect("a descriptor"))
        }
    }

    impl FakeInterrupt {
        /// How often it was raised.
        pub fn count(&self) -> usize {
            let mut signals = [0; 8];
            // Nothing to read: not signalled since.
            let signals = rustix::io::read(&self.1, &mut signals).map_or(0, |_| u64::from_ne_bytes(signals));
            self.0.fetch_add(signals as usize, Ordering::SeqCst) + signals as usize
        }
    }

    impl Interrupt for FakeInterrupt {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn as_eventfd(&self) -> Option<BorrowedFd<'_>> {
            Some(self.1.as_fd())
        }
    }

    /// A [`Vm`] that hands out [`FakeInterrupt`]s and remembers doorbells.
    #[derive(Debug, Default)]
    pub struct FakeVm {
        lines: Mutex<Vec<(u32, Arc<FakeInterrupt>)>>,
        doorbells: Mutex<Vec<(IoEventAddress, i32, OwnedFd)>>,
        levels: Mutex<Vec<(u32, bool)>>,
        vectors: Mutex<Vec<FakeVector>>,
        messages: AtomicUsize,
        pins: Mutex<Vec<Vec<Option<Msi>>>>,
        sent: Mutex<Vec<Msi>>,
    }

    /// A [`Vector`] that [`Vm::vectors`] gave out.
    #[derive(Debug)]
    struct FakeVector {
        event: OwnedFd,
        route: Option<Msi>,
        open: bool,
        released: bool,
    }

    impl FakeVm {
        /// The messages that were sent and not taken yet, each once: those of open vectors that were raised.
        pub fn take_messages(&self) -> Vec<Msi> {
            let vectors = self.vectors.lock().expect("not poisoned");
            let raised = vectors
                .iter()
                .filter(|vector| vector.open)
                .filter(|vector| rustix::io::read(&vector.event, &mut [0u8; 8]).is_ok());
            raised.filter_map(|vector| vector.route).collect()
        }

        /// How many messages were sent so far, each as often as it was. Takes them.
        pub fn messages(&self) -> usize {
            let vectors = self.vectors.lock().expect("not poisoned");
            for vector in vectors.iter().filter(|vector| vector.open) {
                let mut count = [0; 8];
                if rustix::io::read(&vector.event, &mut count).is_ok() {
                    self.messages.fetch_add(u64::from_ne_bytes(count) as usize, Ordering::SeqCst);
                }
            }
            self.messages.load(Ordering::SeqCst)
        }

        /// Every [`Vm::set_irq_level`], in order.
        pub fn levels(&self) -> Vec<(u32, bool)> {
            self.levels.lock().expect("not poisoned").clone()
        }

        /// Every [`Vm::route_pins`], in order.
        pub fn pins(&self) -> Vec<Vec<Option<Msi>>> {
            self.pins.lock().expect("not poisoned").clone()
        }

        /// The messages of [`Vm::send`] that were not taken yet.
        pub fn take_sent(&self) -> Vec<Msi> {
            std::mem::take(&mut self.sent.lock().expect("not poisoned"))
        }

        /// The interrupt that [`Vm::irq_line`] gave out for `gsi`.
        pub fn line(&self, gsi: u32) -> Option<Arc<FakeInterrupt>> {
            let lines = self.lines.lock().expect("not poisoned");
            lines.iter().find(|(g, _)| *g == gsi).map(|(_, i)| i.clone())
        }

        /// Does what the kernel does on a guest's write of `value` to `address`: signals the matching
        /// doorbell. False if there is none (the write would exit to the monitor).
        pub fn ring(&self, address: u64, value: u32) -> bool {
            let doorbells = self.doorbells.lock().expect("not poisoned");
            let hit = doorbells.iter().find(|(at, _, _)| {
                let IoEventAddress::Mmio { address: a, value: v } = at;
                *a == address && v.is_none_or(|v| v == value)
            });
            hit.is_some_and(|(_, _, event)| rustix::io::write(event, &1u64.to_ne_bytes()).is_ok())
        }

        /// How many vectors were given out and not released.
        pub fn vectors_in_use(&self) -> usize {
            let vectors = self.vectors.lock().expect("not poisoned");
            vectors.iter().filter(|vector| !vector.released).count()
        }

        /// How many doorbells are registered.
        pub fn doorbells(&self) -> usize {
            self.doorbells.lock().expect("not poisoned").len()
        }
    }

    impl Vm for FakeVm {
        fn irq_line(&self, gsi: u32) -> io::Result<Arc<dyn Interrupt>> {
            let line = Arc::new(FakeInterrupt::default());
            self.lines.lock().expect("not poisoned").push((gsi, line.clone()));
            Ok(line)
        }

        fn set_irq_level(&self, gsi: u32, high: bool) -> io::Result<()> {
            self.levels.lock().expect("not poisoned").push((gsi, high));
            Ok(())
        }

        fn route_pins(&self, messages: &[Option<Msi>]) -> io::Result<()> {
            self.pins.lock().expect("not poisoned").push(messages.to_vec());
            Ok(())
        }

        fn send(&self, message: Msi) -> io::Result<bool> {
            self.sent.lock().expect("not poisoned").push(message);
            Ok(true)
        }

        fn vectors(&self, count: usize) -> io::Result<Vec<Vector>> {
            let mut all = self.vectors.lock().expect("not poisoned");
            let new = (all.len() as u32..).take(count).map(Vector::new).collect::<io::Result<Vec<_>>>()?;
            for vector in &new {
                let event = vector.event.as_fd().try_clone_to_owned()?;
                all.push(FakeVector { event, route: None, open: false, released: false });
            }
            Ok(new)
        }

        fn route(&self, routes: &[(&Vector, Msi)]) -> io::Result<()> {
            let mut all = self.vectors.lock().expect("not poisoned");
            for (vector, message) in routes {
                all[vector.gsi as usize].route = Some(*message);
            }
            Ok(())
        }

        fn open(&self, vector: &Vector) -> io::Result<()> {
            self.vectors.lock().expect("not poisoned")[vector.gsi as usize].open = true;
            Ok(())
        }

        fn close(&self, vector: &Vector) {
            self.vectors.lock().expect("not poisoned")[vector.gsi as usize].open = false;
        }

        fn release(&self, vectors: &[Vector]) {
            let mut all = self.vectors.lock().expect("not poisoned");
            for vector in vectors {
                let vector = &mut all[vector.gsi as usize];
                assert!(!vector.open && !std::mem::replace(&mut vector.released, true));
            }
        }

        fn ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()> {
            let mut doorbells = self.doorbells.lock().expect("not poisoned");
            if doorbells.iter().any(|(taken, _, _)| *taken == at) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            doorbells.push((at, event.as_raw_fd(), event.try_clone_to_owned()?));
            Ok(())
        }

        fn remove_ioeventfd(&self, at: IoEventAddress, event: BorrowedFd<'_>) -> io::Result<()> {
            let mut doorbells = self.doorbells.lock().expect("not poisoned");
            let before = doorbells.len();
            doorbells.retain(|(a, fd, _)| (*a, *fd) != (at, event.as_raw_fd()));
            if doorbells.len() == before { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
        }
    }
}
