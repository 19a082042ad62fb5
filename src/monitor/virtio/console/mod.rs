//! virtio-console (virtio 1.3, 5.3): hvc0, and named ports beside it.
//!
//! F_MULTIPORT is offered only when there are named ports: without it Linux has hvc0 as soon as it finds
//! the device, with it only after half a dozen messages. The device holds at most a piece of each stream, so a stalled
//! host end stalls the guest's writer. (Linux spins in that writer: a host end that nobody reads for long, with
//! somebody connected, shows in the guest as a lockup report.)

mod control;
mod port;
mod settle;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::device::{Traits, VirtioDevice};
use super::queue::Virtqueue;
use crate::bus::Busy;
use crate::chardev::{Endpoint, WindowSize};
use crate::config;
use crate::guest_warn;
use crate::state::{StateError, Stateful};
use control::{HEADER, Pending};
use port::{Port, PortState};
use settle::Settle;

// Feature bits (5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Linux fills each receive queue with pages of its own as soon as it finds the port: so they are short.
const QUEUE_SIZE: u16 = 16;

/// Queue of messages to the driver; the one from it comes next (5.3.2).
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// `emerg_wr` in the configuration space (5.3.4): cols, rows, max_nr_ports, emerg_wr.
const EMERG_WR: usize = 8;
const CONFIG_SIZE: usize = 12;
/// Emergency output that waits for a stalled host end at most; what comes then is lost.
const EMERGENCY_LIMIT: usize = 4096;

/// A console: port 0 and the named ones.
pub struct Console {
    ports: Vec<Port>,
    multiport: bool,
    /// The driver is ready: what happens at the host's ends is its business.
    running: bool,
    settle: Settle,
    config: [u8; CONFIG_SIZE],
    size: Option<WindowSize>,
    /// The terminal's size is to be looked at in the next callback.
    measure_due: bool,
    emergency: Vec<u8>,
    emergency_lost: u64,
}

/// [`Console`]'s saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    multiport: bool,
    running: bool,
    columns: u16,
    rows: u16,
    emergency: Vec<u8>,
    ports: Vec<PortState>,
}

impl Console {
    /// A console at `main`, with further ports by name: the configuration allows at most
    /// [`config::Port::MAX`], and those behind are left out.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(main: Endpoint, named: Vec<(String, Endpoint)>) -> io::Result<Self> {
        let mut ports = vec![Port::new("hvc0", main)];
        ports.extend(
            named.into_iter().take(config::Port::MAX).map(|(name, endpoint)| Port::new(&name, endpoint)),
        );
        let mut config = [0; CONFIG_SIZE];
        config[4..EMERG_WR].copy_from_slice(&(ports.len() as u32).to_le_bytes());
        Ok(Self {
            ports,
            multiport: false,
            running: false,
            settle: Settle::new()?,
            config,
            size: None,
            measure_due: false,
            emergency: Vec::new(),
            emergency_lost: 0,
        })
    }

    /// Takes the terminal's size over, and tells the driver if it is new: by the configuration space, or by a message.
    ///
    /// The size is 0 until the driver runs: Linux looks at it only when it is told of a change.
    fn measure(&mut self) {
        self.measure_due = false;
        let size = self.ports[0].endpoint.size();
        if size.is_some() && size != self.size {
            self.set_size(size);
            if self.ports[0].ready {
                self.ports[0].pending |= Pending::RESIZE;
            }
        }
    }

    fn set_size(&mut self, size: Option<WindowSize>) {
        self.size = size;
        let (columns, rows) = size.map_or((0, 0), |size| (size.columns, size.rows));
        self.config[..2].copy_from_slice(&columns.to_le_bytes());
        self.config[2..4].copy_from_slice(&rows.to_le_bytes());
    }

    /// The queue that port `id` receives from; the one it transmits to comes next (5.3.2).
    fn receive_queue(id: usize) -> usize {
        if id == 0 { 0 } else { 2 * id + 2 }
    }

    /// The port that queue `index` belongs to, if it is not a control queue.
    fn port_of(index: usize) -> Option<usize> {
        match index {
            0 | 1 => Some(0),
            CONTROL_RECEIVE | CONTROL_TRANSMIT => None,
            _ => Some(index / 2 - 1),
        }
    }

    fn flush_emergency(&mut self) {
        while !self.emergency.is_empty() {
            let taken = self.ports[0].endpoint.write(&self.emergency);
            if taken == 0 {
                return;
            }
            self.emergency.drain(..taken);
        }
    }

    /// A turn for port `id`.
    fn serve(&mut self, id: usize, queues: &mut [Virtqueue], receive: bool, transmit: bool) {
        if id > 0 && !self.multiport {
            return;
        }
        let queue = Self::receive_queue(id);
        if id == 0 {
            self.flush_emergency();
            if self.measure_due && self.running {
                self.measure();
            }
        }
        let port = &mut self.ports[id];
        if transmit {
            port.send(&mut queues[queue + 1]);
        }
        if receive {
            port.receive(&mut queues[queue]);
        }
        port.wait(id == 0 && !self.emergency.is_empty());
    }

    /// Hears what the driver has to say, and acts on it.
    fn hear(&mut self, queues: &mut [Virtqueue]) {
        while let Some(mut chain) = queues[CONTROL_TRANSMIT].pop() {
            let mut header = [0; HEADER];
            let whole = chain.readable.read_exact(&mut header).is_ok();
            queues[CONTROL_TRANSMIT].complete(chain.head, 0);
            if !whole || !control::heard(&mut self.ports, header) {
                guest_warn!("console: invalid control message: {header:02x?}");
            }
        }
        // A port that was opened takes input from now on.
        for id in 0..self.ports.len() {
            self.serve(id, queues, true, false);
        }
    }

    /// Tells the driver what waits to be told.
    fn tell(&mut self, queues: &mut [Virtqueue]) {
        if !self.multiport {
            return;
        }
        for (id, port) in self.ports.iter_mut().enumerate() {
            if id > 0 && port.ready && port.told_open != port.endpoint.connected() {
                port.pending |= Pending::OPEN;
            }
            if self.size.is_none() {
                port.pending -= Pending::RESIZE;
            }
            while !port.pending.is_empty() {
                // Having seen that there is none, the queue asks for a kick when there is one.
                let Some(mut chain) = queues[CONTROL_RECEIVE].pop() else { return };
                let message = control::next(id, port, self.size.unwrap_or_default());
                let mut written = 0;
                if chain.writable.len() < message.len() {
                    guest_warn!("console: no room for a control message of {} bytes", message.len());
                } else {
                    written = chain.writable.write(&message).unwrap_or(0);
                }
                queues[CONTROL_RECEIVE].complete(chain.head, written as u32);
            }
        }
    }
}

impl VirtioDevice for Console {
    fn traits(&self) -> Traits {
        let named = self.ports.len() - 1;
        let (multiport, queues) = if named == 0 { (0, 2) } else { (F_MULTIPORT, 4 + 2 * named) };
        Traits {
            kind: VIRTIO_ID_CONSOLE,
            features: F_SIZE | F_EMERG_WRITE | multiport,
            queues: vec![QUEUE_SIZE; queues],
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// Output for when nothing else works: a byte to `emerg_wr`, before or after the driver is ready.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Some(byte) = EMERG_WR.checked_sub(offset).and_then(|at| data.get(at)) else { return };
        if self.emergency.len() < EMERGENCY_LIMIT {
            self.emergency.push(*byte);
        } else {
            self.emergency_lost += 1;
            guest_warn!("console: {} bytes of emergency output lost", self.emergency_lost);
        }
        self.flush_emergency();
    }

    fn accept(&mut self, features: u64) {
        self.multiport = features & F_MULTIPORT != 0;
    }

    fn start(&mut self) {
        self.running = true;
        self.measure_due = true;
        self.ports[0].endpoint.opened();
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        match Self::port_of(index) {
            Some(id) => {
                // Without control messages there is only port 0, and nothing that opens it.
                if !self.multiport && !self.ports[0].guest_open {
                    self.settle.touch();
                }
                self.serve(id, queues, index & 1 == 0, index & 1 == 1);
            }
            None if !self.multiport => {}
            None => {
                if index == CONTROL_TRANSMIT {
                    self.hear(queues);
                }
                self.tell(queues);
            }
        }
    }

    /// Output: Linux's hvc spins until it is taken.
    fn served_by_vcpu(&self, index: usize) -> bool {
        index & 1 == 1 && index != CONTROL_TRANSMIT
    }

    fn event_sources(&self) -> Vec<BorrowedFd<'_>> {
        self.ports.iter().map(|port| port.endpoint.as_fd()).chain([self.settle.as_fd()]).collect()
    }

    fn on_event(&mut self, source: usize, queues: &mut [Virtqueue]) {
        let Some(port) = self.ports.get(source) else {
            self.settle.stop();
            self.ports[0].guest_open |= !self.multiport;
            return self.serve(0, queues, true, false);
        };
        port.endpoint.service();
        self.measure_due |= source == 0;
        self.serve(source, queues, true, true);
        self.tell(queues);
    }

    fn drain(&mut self, queues: &mut [Virtqueue], _deadline: Instant) -> Result<(), Busy> {
        self.flush_emergency();
        for (id, port) in self.ports.iter_mut().enumerate() {
            if let Some(queue) = queues.get_mut(Self::receive_queue(id) + 1) {
                port.drain(queue);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.ports.iter_mut().for_each(Port::reset);
        self.ports[0].endpoint.set_up_anew();
        self.settle.stop();
        self.multiport = false;
        self.running = false;
        self.measure_due = false;
        self.set_size(None);
    }
}

impl Stateful for Console {
    type State = State;

    fn save(&self) -> State {
        let (columns, rows) = self.size.map_or((0, 0), |size| (size.columns, size.rows));
        let ports = self.ports.iter().map(Port::save).collect();
        let (multiport, running) = (self.multiport, self.running);
        State { multiport, running, columns, rows, emergency: self.emergency.clone(), ports }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let State { multiport, running, columns, rows, emergency, ports } = state;
        let invalid = |what: String| Err(StateError::Invalid(format!("console: {what}")));
        if ports.len() != self.ports.len() {
            return invalid(format!("{} ports, but there are {}", ports.len(), self.ports.len()));
        }
        if (multiport && ports.len() == 1) || emergency.len() > EMERGENCY_LIMIT {
            return invalid(format!("multiport {multiport}, {} bytes of emergency output", emergency.len()));
        }
        for (port, state) in self.ports.iter_mut().zip(ports) {
            port.restore(state)?;
        }
        (self.multiport, self.running, self.emergency) = (multiport, running, emergency);
        // The guest knows the old size. The terminal here may have another.
        self.set_size((columns > 0 && rows > 0).then_some(WindowSize { columns, rows }));
        self.measure_due = true;
        Ok(())
    }
}
