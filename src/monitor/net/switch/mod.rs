//! A segment of Ethernet that machines of one user share, without root and without a process of its own.
//!
//! Each machine has a socket in the segment's folder (`segment`), and sends frames straight to the socket of the port that has the
//! address (`table`); to all, where that is not known. A message is the sender's number, the frame's header of virtio-net, and
//! the frame; one without a frame says that somebody is new. TCP goes uncut, up to 64 KiB in a frame, and is cut (`segments`) by the
//! port whose guest takes none such. The guest's address is the
//! monitor's to give (`lease`), and is found by the machine's name (`names`). A frame for one port that is full waits (`room`),
//! as long as that port fetches at all; whoever does not, loses frames, and holds nobody up.

mod checksum;
mod lease;
mod names;
mod room;
mod segment;
mod segments;
mod table;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use super::{Error, HEADER, Head, MAX_FRAME, Offloads, START, Wire};
use crate::memory::{Buffers, Slices};
use lease::Lease;
pub use names::Neighbours;
use room::Room;
pub use segment::segments;
use segment::{Id, Segment};
use segments::{Cutter, TCPV4, TCPV6};
use table::{Address, Table};

/// Others that one port knows: each costs a descriptor.
const MOST: usize = 64;
/// Messages without a frame that are read in one go.
const GREETINGS: usize = 16;
/// Bytes in front of a frame.
const FRONT: usize = size_of::<Id>() + HEADER;
/// What may be left to the other side.
const OFFLOADS: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

/// A port of a segment.
pub struct Switch {
    segment: Segment,
    /// Where the others' messages come.
    socket: OwnedFd,
    others: BTreeMap<Id, OwnedFd>,
    room: Room,
    table: Table,
    /// The guest does these itself.
    takes: Offloads,
    /// Where a frame is read to that is longer than the guest's buffers, to be cut. A byte if the guest takes all uncut: that tells a
    /// frame that was cut off from one that fits.
    over: Vec<u8>,
    cutter: Option<Cutter>,
    lease: Option<Lease>,
    refused: bool,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Yes,
    /// There is no room.
    Full,
    /// It is too long, or the host is out of memory.
    Lost,
    /// Nobody is there any more.
    Gone,
}

impl Switch {
    /// A port of the segment called `name`, in the folder `runtime` of this user's.
    ///
    /// # Errors
    /// [`Error::Switch`]: the folder cannot be used.
    pub fn join(runtime: &Path, name: &str) -> Result<Self, Error> {
        let failed = |source| Error::Switch { name: name.to_owned(), folder: runtime.to_owned(), source };
        let (segment, socket) = Segment::enter(runtime, name).map_err(failed)?;
        let (others, table) = Default::default();
        let room = Room::new(&socket).map_err(failed)?;
        let mut switch = Self {
            segment,
            socket,
            others,
            room,
            table,
            takes: Offloads::empty(),
            over: Vec::new(),
            cutter: None,
            lease: None,
            refused: false,
        };
        switch.accept(Offloads::empty());
        let hello = switch.segment.id.to_ne_bytes();
        for id in switch.segment.news() {
            if switch.meet(id)
                && let Some(other) = switch.others.get(&id)
            {
                // Who does not hear of us now does with our first frame.
                let _ = rustix::io::write(other, &hello);
            }
        }
        Ok(switch)
    }

    /// Has an address for the guest's device `mac`, by DHCP, on record as that of the machine called `name`.
    ///
    /// # Errors
    /// [`Error::Switch`]: there is none left, or the folder cannot be used.
    pub fn lease(&mut self, mac: [u8; 6], name: Option<&str>) -> Result<(), Error> {
        let Segment { folder, id, name: segment, .. } = &self.segment;
        let entered = names::enter(folder, *id, segment, mac, name)
            .and_then(|client| Ok((client, self.segment.reach(*id).ok_or(io::ErrorKind::NotFound)?)));
        let (client, port) = entered.map_err(|source| Error::Switch {
            name: segment.clone(),
            folder: folder.clone(),
            source,
        })?;
        self.lease = Some(Lease::new(mac, client, names::server(segment), port));
        Ok(())
    }

    /// Where the segment is.
    pub fn folder(&self) -> &Path {
        &self.segment.folder
    }

    /// True if port `id` is there, and known from now on.
    fn meet(&mut self, id: Id) -> bool {
        if id == self.segment.id || self.others.contains_key(&id) {
            return id != self.segment.id;
        }
        if self.others.len() >= MOST {
            log::warn!("switch: more than {MOST} others: one is left out");
            return false;
        }
        let Some(socket) = self.segment.reach(id) else { return false };
        self.others.insert(id, socket);
        true
    }

    fn lose(&mut self, id: Id) {
        self.others.remove(&id);
        self.room.forget(id);
        self.table.forget(id);
        self.segment.bury(id);
    }

    fn cut(&mut self, cutter: Option<Cutter>) {
        self.room.set_more(cutter.is_some());
        self.cutter = cutter;
    }

    /// The next part of a frame that is being cut.
    fn next_segment(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        let Some(frame) = self.cutter.as_mut()?.next() else {
            self.cut(None);
            return None;
        };
        let (start, behind) = frame.split_at(frame.len().min(START));
        *head = Head::default();
        head.start[..start.len()].copy_from_slice(start);
        rest.copy_from(behind);
        Some(frame.len())
    }

    /// A frame of `len` bytes as it was read: its start, what lies in the guest's buffers, and what found no room there.
    fn whole(&self, head: &Head, rest: &Slices, len: usize) -> Vec<u8> {
        let mut frame = vec![0; len.min(MAX_FRAME)];
        let start = frame.len().min(START);
        frame[..start].copy_from_slice(&head.start[..start]);
        let end = start + rest.copy_to(0, &mut frame[start..]);
        let over = frame[end..].len().min(self.over.len());
        frame[end..end + over].copy_from_slice(&self.over[..over]);
        frame
    }

    /// Sends to everybody, also to those who have come since and whose greeting is not read yet. True if all have it who are there.
    fn send_to_all(&mut self, front: &[u8], frame: &Slices) -> bool {
        for id in self.segment.news() {
            self.meet(id);
        }
        let sent = |(id, socket): (&Id, &OwnedFd)| (*id, sent(frame.write_to(socket, front)));
        let all: Vec<_> = self.others.iter().map(sent).collect();
        all.iter().filter(|(_, sent)| *sent == Sent::Gone).for_each(|(id, _)| self.lose(*id));
        all.iter().all(|(_, sent)| matches!(sent, Sent::Yes | Sent::Gone))
    }

    /// Sends to port `id`. `None` if the frame has to wait; else whether that port has it, or is not there.
    fn send_to(&mut self, id: Id, front: &[u8], frame: &Slices) -> Option<bool> {
        let Some(socket) = self.others.get(&id) else { return Some(true) };
        match sent(frame.write_to(socket, front)) {
            Sent::Yes => self.room.has_taken(id, socket),
            Sent::Full if self.room.wait_for(id, socket) => return None,
            Sent::Full | Sent::Lost => return Some(false),
            Sent::Gone => self.lose(id),
        }
        Some(true)
    }
}

fn sent(result: io::Result<usize>) -> Sent {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotConnected};
    match result {
        Ok(_) => Sent::Yes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Full,
        Err(error) if matches!(error.kind(), ConnectionRefused | ConnectionReset | NotConnected) => {
            Sent::Gone
        }
        Err(_) => Sent::Lost,
    }
}

impl Wire for Switch {
    fn fd(&self) -> BorrowedFd<'_> {
        self.room.fd()
    }

    fn is_up(&self) -> bool {
        true
    }

    fn offloads(&self) -> Offloads {
        OFFLOADS
    }

    fn accept(&mut self, offloads: Offloads) {
        self.takes = offloads;
        self.over = vec![0; if offloads.contains(OFFLOADS) { 1 } else { MAX_FRAME }];
        self.cut(None);
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        let slices = Slices::of([frame], 0);
        let mut to: Address = [0; 6];
        if !slices.is_whole() || slices.len() > MAX_FRAME || slices.copy_to(0, &mut to) < to.len() {
            self.refused = true;
            return true;
        }
        if to == [0xff; 6] && self.lease.as_ref().is_some_and(|lease| lease.take(self.segment.id, &slices)) {
            return true;
        }
        let mut front = [0; FRONT];
        front[..size_of::<Id>()].copy_from_slice(&self.segment.id.to_ne_bytes());
        front[size_of::<Id>()..].copy_from_slice(header);
        let known = if to[0] & 1 == 0 { self.table.find(&to) } else { None };
        let arrived = match known {
            Some(id) => self.send_to(id, &front, &slices),
            None => Some(self.send_to_all(&front, &slices)),
        };
        self.refused = arrived == Some(false);
        arrived.is_some()
    }

    fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        self.room.look();
        if let Some(len) = self.next_segment(head, rest) {
            return Some(len);
        }
        for _ in 0..GREETINGS {
            *head = Head::default();
            let Head { header, start } = head;
            let mut from = [0; size_of::<Id>()];
            let before = &mut [&mut from[..], header, start];
            let read = rest.read_from(&self.socket, before, usize::MAX, &mut self.over);
            // Errors are of the moment: it is our own socket, and not connected.
            let n = read.ok()?;
            let id = Id::from_ne_bytes(from);
            let is_own = id == self.segment.id && self.lease.is_some();
            if n < from.len() || !is_own && !self.meet(id) {
                continue;
            }
            let Some(len) = n.checked_sub(FRONT).filter(|len| *len >= 2 * size_of::<Address>()) else {
                continue;
            };
            let Some(fine) = checksum::checked(head.header, len) else { continue };
            if !is_own {
                self.table.learn(std::array::from_fn(|at| head.start[6 + at]), id);
            }
            head.header = fine;
            if !self.takes.contains(needed(&fine)) {
                self.cut(Cutter::new(&fine, self.whole(head, rest, len)));
                match self.next_segment(head, rest) {
                    Some(len) => return Some(len),
                    None => continue,
                }
            }
            if fine[0] & checksum::NEEDED != 0
                && !self.takes.contains(Offloads::CSUM)
                && len <= START + rest.len()
            {
                complete(head, rest, len);
            }
            return Some(len);
        }
        None
    }
}

/// What a guest must take for a frame with this header to go to it uncut.
fn needed(header: &[u8; HEADER]) -> Offloads {
    match header[1] {
        TCPV4 => Offloads::CSUM | Offloads::TSO4,
        TCPV6 => Offloads::CSUM | Offloads::TSO6,
        _ => Offloads::empty(),
    }
}

/// Completes the checksum of a frame that lies in the guest's buffers: the rare case in which it is copied.
fn complete(head: &mut Head, rest: &Slices, len: usize) {
    let mut frame = vec![0; len];
    let own = len.min(START);
    frame[..own].copy_from_slice(&head.start[..own]);
    rest.copy_to(0, &mut frame[own..]);
    checksum::complete(&head.header, &mut frame);
    head.start[..own].copy_from_slice(&frame[..own]);
    rest.copy_from(&frame[own..]);
    head.header = [0; HEADER];
}
