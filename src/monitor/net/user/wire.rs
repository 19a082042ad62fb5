//! The network as a host's end of a network device.

use std::os::fd::BorrowedFd;

use super::Stack;
use crate::memory::{Buffers, Slices};
use crate::net::{HEADER, Head, MAX_FRAME, Offloads, START, Wire};

/// The guest may leave checksums to us, which nothing looks at, and TCP to be cut into segments, which goes into a stream whole.
const OFFLOADS: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

impl Wire for Stack {
    fn fd(&self) -> BorrowedFd<'_> {
        self.readable()
    }

    fn is_up(&self) -> bool {
        true
    }

    fn offloads(&self) -> Offloads {
        OFFLOADS
    }

    fn accept(&mut self, offloads: Offloads) {
        self.leave(offloads);
    }

    fn send(&mut self, _: &[u8; HEADER], frame: &Buffers) -> bool {
        let slices = Slices::of([frame], 0);
        if slices.is_whole() && slices.len() <= MAX_FRAME {
            // Once, and only here: what is checked is what is used.
            let mut bytes = vec![0; slices.len()];
            slices.copy_to(0, &mut bytes);
            self.input(&bytes);
        }
        true
    }

    fn flush(&mut self) -> bool {
        self.settle();
        true
    }

    fn take_lost(&mut self) -> u64 {
        self.context.frames.take_lost()
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        let frame = self.output()?;
        let (start, behind) = frame.bytes.split_at(frame.bytes.len().min(START));
        *head = Head { header: frame.header, ..Head::default() };
        head.start[..start.len()].copy_from_slice(start);
        rest.copy_from(behind);
        Some(frame.bytes.len())
    }
}
