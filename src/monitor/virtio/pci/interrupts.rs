//! [`Interrupts`]: how the driver hears of things: by the messages that it has chosen for each queue and for the configuration, or
//! by the INTx line and the ISR status (virtio 1.3, 4.1.4.5 and 4.1.5.1).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};

use crate::event_loop::Event;
use crate::pci::{Line, Lines};
use crate::state::StateError;
use crate::virtio::queue::Notifier;

/// No message (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status (4.1.4.5): used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration or the device status changed.
const ISR_CONFIG: u8 = 2;

/// Shared by the function's registers and those who serve its queues.
pub struct Interrupts {
    lines: Arc<Lines>,
    config: AtomicU16,
    queues: Box<[AtomicU16]>,
    isr: AtomicU8,
    /// The function's number, by which it holds its INTx line up.
    number: u8,
    line: Arc<Line>,
    line_allowed: AtomicBool,
    /// Signalled in place of a message for a queue that has none.
    nobody: Event,
}

impl Interrupts {
    /// For a function with `queues` queues.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(lines: Arc<Lines>, queues: u16, number: u8, line: Arc<Line>) -> io::Result<Self> {
        Ok(Self {
            lines,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            number,
            line,
            line_allowed: AtomicBool::new(true),
            nobody: Event::new()?,
        })
    }

    /// The message for the configuration.
    pub fn config_vector(&self) -> u16 {
        self.config.load(Ordering::SeqCst)
    }

    /// The message for queue `index`.
    pub fn queue_vector(&self, index: usize) -> Option<u16> {
        self.queues.get(index).map(|vector| vector.load(Ordering::SeqCst))
    }

    /// The driver chooses a message of `count`; one that there is not reads back as none (4.1.5.1.2.1).
    pub fn set_config_vector(&self, vector: u16, count: u16) {
        self.config.store(if vector < count { vector } else { NO_VECTOR }, Ordering::SeqCst);
    }

    /// Likewise for queue `index`, if there is such.
    pub fn set_queue_vector(&self, index: usize, vector: u16, count: u16) {
        if let Some(queue) = self.queues.get(index) {
            queue.store(if vector < count { vector } else { NO_VECTOR }, Ordering::SeqCst);
        }
    }

    /// The driver reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        self.set_line();
        isr
    }

    /// Whether there is an interrupt for the INTx line.
    pub fn holds_line(&self) -> bool {
        !self.lines.enabled() && self.isr.load(Ordering::SeqCst) != 0
    }

    /// Whether the driver lets the function use its INTx line.
    pub fn allow_line(&self, allowed: bool) {
        if self.line_allowed.swap(allowed, Ordering::SeqCst) != allowed {
            self.set_line();
        }
    }

    /// The driver has switched to messages, or back.
    pub fn messages_changed(&self) {
        self.set_line();
    }

    /// Back to as built (2.4).
    pub fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::SeqCst);
        self.queues.iter().for_each(|queue| queue.store(NO_VECTOR, Ordering::SeqCst));
        self.take_isr();
    }

    fn set_line(&self) {
        self.line.set(self.number, || self.holds_line() && self.line_allowed.load(Ordering::SeqCst));
    }

    fn tell(&self, vector: &AtomicU16, isr: u8) {
        if self.lines.enabled() {
            // 4.1.4.5.1: the configuration's bit is set in either case.
            self.isr.fetch_or(isr & ISR_CONFIG, Ordering::SeqCst);
            self.lines.raise(vector.load(Ordering::SeqCst));
        } else {
            self.isr.fetch_or(isr, Ordering::SeqCst);
            self.set_line();
        }
    }
}

impl Notifier for Interrupts {
    fn used(&self, queue: usize) {
        if let Some(vector) = self.queues.get(queue) {
            self.tell(vector, ISR_QUEUE);
        }
    }

    fn config_changed(&self) {
        self.tell(&self.config, ISR_CONFIG);
    }

    fn direct(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        if !self.lines.enabled() {
            return None;
        }
        let vector = self.queue_vector(queue).and_then(|vector| self.lines.get(vector));
        Some(vector.map_or_else(|| self.nobody.as_fd(), |vector| vector.event()))
    }
}

/// [`Interrupts`]' saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    config: u16,
    queues: Vec<u16>,
    isr: u8,
}

impl Interrupts {
    /// What the driver could tell.
    pub fn save(&self) -> State {
        State {
            config: self.config_vector(),
            queues: self.queues.iter().map(|vector| vector.load(Ordering::SeqCst)).collect(),
            isr: self.isr.load(Ordering::SeqCst),
        }
    }

    /// Takes it back; there are `count` messages.
    ///
    /// # Errors
    /// It cannot be.
    pub fn restore(&self, state: State, count: u16) -> Result<(), StateError> {
        let fits = |vector: &u16| *vector < count || *vector == NO_VECTOR;
        let fine = state.queues.len() == self.queues.len()
            && state.queues.iter().chain([&state.config]).all(fits)
            && state.isr & !(ISR_QUEUE | ISR_CONFIG) == 0;
        if !fine {
            return Err(StateError::Invalid(format!("interrupts {state:x?}")));
        }
        self.config.store(state.config, Ordering::SeqCst);
        self.queues.iter().zip(state.queues).for_each(|(own, saved)| own.store(saved, Ordering::SeqCst));
        self.isr.store(state.isr, Ordering::SeqCst);
        self.set_line();
        Ok(())
    }
}
