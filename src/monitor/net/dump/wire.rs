//! [`Dumped`]: a wire whose frames are noted as they pass.

use std::os::fd::BorrowedFd;

use super::Queue;
use super::pcapng::Direction;
use crate::memory::{Buffers, Slices};
use crate::net::{HEADER, Head, MAX_FRAME, Offloads, START, Wire};

/// A wire, and where its frames are noted. A frame that the guest changes while it is sent may differ from what the host got.
pub struct Dumped {
    /// It.
    pub wire: Box<dyn Wire>,
    /// Where they go.
    pub queue: Queue,
    /// Its interface's number there.
    pub interface: u32,
}

impl Wire for Dumped {
    fn fd(&self) -> BorrowedFd<'_> {
        self.wire.fd()
    }

    fn is_up(&self) -> bool {
        self.wire.is_up()
    }

    fn offloads(&self) -> Offloads {
        self.wire.offloads()
    }

    fn accept(&mut self, offloads: Offloads) {
        self.wire.accept(offloads);
    }

    fn set_attached(&mut self, on: bool) {
        self.wire.set_attached(on);
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        let taken = self.wire.send(header, frame);
        if taken {
            let slices = Slices::of([frame], 0);
            let kept = slices.len().min(MAX_FRAME);
            let fill = |bytes: &mut [u8]| _ = slices.copy_to(0, bytes);
            self.queue.add(self.interface, Direction::Out, frame.len(), kept, fill);
        }
        taken
    }

    fn take_refused(&mut self) -> bool {
        self.wire.take_refused()
    }

    fn flush(&mut self) -> bool {
        self.wire.flush()
    }

    fn take_lost(&mut self) -> u64 {
        self.wire.take_lost()
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        let len = self.wire.receive(head, rest)?;
        // What the guest's buffers have no room for is not here either.
        let kept = len.min(START + rest.len()).min(MAX_FRAME);
        let fill = |bytes: &mut [u8]| {
            let own = bytes.len().min(START);
            bytes[..own].copy_from_slice(&head.start[..own]);
            rest.copy_to(0, &mut bytes[own..]);
        };
        self.queue.add(self.interface, Direction::In, len, kept, fill);
        Some(len)
    }
}
