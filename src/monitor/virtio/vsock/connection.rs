//! [`Connection`]: one connection between a port of the guest and a socket of the host.
//!
//! It decides what the guest is to be told; who serves the queues tells it, and asks again after each thing that happens.

use std::io;
use std::time::{Duration, Instant};

use bitflags::bitflags;

use super::credit::Credit;
use super::header::{Header, Key, Op, Shut};
use super::share::Share;
use crate::memory::Buffers;
use crate::vsock::{End, Kind};

/// How long the guest may take to answer a call, as in Linux.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take to let go of a connection that is at its end, as in Linux.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

bitflags! {
    /// Packets that the guest is yet to get, in the order of the bits.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Owed: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const CREDIT_UPDATE = 4;
        const CREDIT_REQUEST = 8;
        const SHUTDOWN = 16;
    }
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host calls, and the guest has not answered.
    Calling,
    /// Either side may send.
    Open,
    /// The host's program is gone, and all that it wrote has gone on. The guest is to let go, too.
    Closing,
    /// The guest has let go. What it sent before waits for the host's program.
    Draining,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Fate {
    /// It stays.
    Stays,
    /// It is over, and the guest knows or need not.
    Over,
    /// It is over, and the guest is to be told: by a reset.
    Reset,
    /// It is over for the guest, which is to be told so, and stays for the host's program.
    Drains,
}

/// A connection. It ends with its value.
#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    pub phase: Phase,
    pub credit: Credit,
    pub owed: Owed,
    /// The host's end; with it goes what is closed. A closing connection has none.
    pub end: Option<End>,
    pub kind: Kind,
    /// There may be something to read at the host's end.
    pub readable: bool,
    /// It waits for its turn to send to the guest.
    pub queued: bool,
    /// When it ends by itself.
    pub deadline: Option<Instant>,
    /// What it may keep of memory.
    pub share: Share,
    /// What the guest does no more.
    guest: Shut,
    /// What the host does no more, as the guest is told.
    host: Shut,
    /// The host's program is gone.
    hung_up: bool,
    /// The guest was asked for room for so many bytes, and has not got it.
    asked: Option<u32>,
    /// It is told when the host's program takes more messages.
    waits: bool,
    /// Something was sent to the host's program since there was last word of room.
    wrote: bool,
}

impl Connection {
    /// The host calls: `end` waits for the guest's answer.
    pub fn calling(key: Key, end: End, share: Share) -> Self {
        let deadline = Some(Instant::now() + CONNECT_TIMEOUT);
        Self { deadline, ..Self::new(key, end, share, Phase::Calling, Owed::REQUEST) }
    }

    /// The guest called, and `end` answers.
    pub fn answered(key: Key, end: End, share: Share) -> Self {
        Self::new(key, end, share, Phase::Open, Owed::RESPONSE)
    }

    fn new(key: Key, end: End, share: Share, phase: Phase, owed: Owed) -> Self {
        Self {
            key,
            phase,
            credit: Credit::new(share.bytes()),
            owed,
            kind: end.kind(),
            end: Some(end),
            readable: false,
            queued: false,
            deadline: None,
            share,
            guest: Shut::empty(),
            host: Shut::empty(),
            hung_up: false,
            asked: None,
            waits: false,
            wrote: false,
        }
    }

    /// Whether the guest has heard of it.
    pub fn is_known(&self) -> bool {
        self.phase != Phase::Draining && !self.owed.contains(Owed::REQUEST)
    }

    /// Whether it has something for the guest, or may have.
    pub fn wants_turn(&self) -> bool {
        !self.owed.is_empty() || (self.may_read() && self.asked.is_none())
    }

    /// Whether there may be something to read at the host's end, and it is for the guest.
    pub fn may_read(&self) -> bool {
        self.readable && self.phase == Phase::Open && !self.host.contains(Shut::SEND)
    }

    /// The next packet of those that carry no data.
    pub fn control(&mut self, cid: u64) -> Option<Header> {
        let next = self.owed.iter().next()?;
        self.owed.remove(next);
        let op = match next {
            Owed::REQUEST => Op::Request,
            Owed::RESPONSE => Op::Response,
            Owed::CREDIT_UPDATE => Op::CreditUpdate,
            Owed::CREDIT_REQUEST => Op::CreditRequest,
            _ => Op::Shutdown,
        };
        let flags = if op == Op::Shutdown { self.host.bits() } else { 0 };
        let header = Header::to_guest(cid, self.key, self.kind, op);
        Some(Header { flags: flags.into(), ..header.with(&mut self.credit) })
    }

    /// A packet of `len` bytes of data goes to the guest.
    pub fn data(&mut self, cid: u64, len: usize, flags: u32) -> Header {
        self.credit.send(len as u32);
        self.owed.remove(Owed::CREDIT_UPDATE);
        let header = Header::to_guest(cid, self.key, self.kind, Op::Rw);
        Header { flags: flags.into(), ..header.with(&mut self.credit) }
    }

    /// The guest has no room for the `len` bytes that there are to send: it is asked, once.
    pub fn ask_for_room(&mut self, len: u32) {
        if self.asked.replace(len).is_none() {
            self.owed |= Owed::CREDIT_REQUEST;
        }
    }

    /// Any packet from the guest says what it has room for.
    pub fn hear(&mut self, header: &Header) {
        self.credit.hear(header.buf_alloc.get(), header.fwd_cnt.get());
        // Room that there will never be is asked for no longer, either.
        self.asked = self.asked.filter(|len| *len > self.credit.free() && *len <= self.credit.peer_alloc());
    }

    /// The guest answers the host's call.
    pub fn answer(&mut self) -> Fate {
        if self.phase != Phase::Calling {
            return Fate::Reset;
        }
        (self.phase, self.deadline) = (Phase::Open, None);
        self.readable = true;
        match &self.end {
            Some(end) if end.greet(self.key.host).is_ok() => Fate::Stays,
            _ => Fate::Reset,
        }
    }

    /// Data comes from the guest; `ends` says that a message does, with it.
    pub fn receive(&mut self, data: Buffers, ends: bool) -> Fate {
        let is_due = matches!(self.phase, Phase::Open | Phase::Closing) && !self.guest.contains(Shut::SEND);
        if !is_due || !self.credit.receive(data.len() as u32) {
            return Fate::Reset;
        }
        let most = self.share.bytes() as usize;
        match &mut self.end {
            Some(end) if !self.host.contains(Shut::RECEIVE) => {
                let sent = end.send(data, ends, most);
                self.sent(sent)
            }
            _ => {
                self.credit.forward_all();
                self.update()
            }
        }
    }

    /// The host's program takes more of what waits for it, or nothing any more.
    pub fn flush(&mut self, hung_up: bool) -> Fate {
        // Room that nothing else explains.
        let is_odd = !std::mem::take(&mut self.wrote) && !hung_up;
        let is_open = self.phase == Phase::Open && !self.guest.contains(Shut::SEND);
        match &mut self.end {
            Some(end) if end.is_stalled() => {
                let sent = end.flush();
                self.sent(sent)
            }
            // Of one that is gone altogether is heard by other means.
            Some(end) if is_odd && is_open && !end.is_read() && !end.is_hung_up() => {
                self.sent(Err(io::ErrorKind::BrokenPipe.into()))
            }
            _ => Fate::Stays,
        }
    }

    fn sent(&mut self, result: io::Result<usize>) -> Fate {
        match result {
            Ok(n) => {
                self.wrote |= n > 0;
                self.credit.forward(n as u32);
            }
            // A message that is too long for a socket, or too many without content.
            Err(error) if self.kind == Kind::Seqpacket && !is_the_end(&error) => {
                log::debug!("socket: port {}: {error}", self.key.host);
                return Fate::Reset;
            }
            // Nobody reads any more: what comes is dropped, and the guest told to send none.
            Err(_) => {
                self.end.iter_mut().for_each(End::discard);
                self.credit.forward_all();
                if self.phase == Phase::Draining {
                    return Fate::Over;
                }
                self.shut(Shut::RECEIVE);
            }
        }
        let is_stalled = self.end.as_ref().is_some_and(End::is_stalled);
        if !is_stalled && self.guest.contains(Shut::SEND) {
            self.end.iter().for_each(End::end_output);
            if self.phase == Phase::Draining {
                return Fate::Over;
            }
        }
        self.update()
    }

    fn update(&mut self) -> Fate {
        if self.phase == Phase::Open && self.credit.is_update_due() {
            self.owed |= Owed::CREDIT_UPDATE;
        }
        Fate::Stays
    }

    /// The guest asks what there is room for.
    pub fn tell_room(&mut self) -> Fate {
        self.owed |= Owed::CREDIT_UPDATE;
        Fate::Stays
    }

    /// Whether the host is to tell when its program takes more, if that is to change.
    pub fn waits_for_room(&mut self) -> Option<(&End, bool)> {
        let end = self.end.as_ref()?;
        let waits = end.is_stalled() && self.kind == Kind::Seqpacket;
        (std::mem::replace(&mut self.waits, waits) != waits).then_some((end, waits))
    }

    /// The guest says what it will do no more.
    pub fn guest_shuts(&mut self, what: Shut) -> Fate {
        if self.phase == Phase::Calling {
            return Fate::Reset;
        }
        self.guest |= what;
        if self.guest.contains(Shut::RECEIVE) {
            // What its program writes from now on fails, and what it wrote before is of no use to anybody.
            self.end.iter().for_each(End::end_input);
        }
        if self.guest.contains(Shut::SEND) && !self.end.as_ref().is_some_and(End::is_stalled) {
            self.end.iter().for_each(End::end_output);
        }
        if !self.guest.is_all() {
            return Fate::Stays;
        }
        // It has let go, and hears so at once: what it sent waits here, and no longer with it.
        match &self.end {
            Some(end) if end.is_stalled() => {
                self.phase = Phase::Draining;
                (self.owed, self.deadline) = (Owed::empty(), None);
                Fate::Drains
            }
            _ => Fate::Reset,
        }
    }

    /// The guest knows nothing of it any more. Whether what it sent still waits for the host's program: nothing else is left of it
    /// then.
    pub fn cut_off(&mut self) -> bool {
        let Some(end) = self.end.as_ref().filter(|end| end.is_stalled()) else { return false };
        end.end_input();
        (self.phase, self.guest) = (Phase::Draining, Shut::all());
        (self.owed, self.deadline, self.queued) = (Owed::empty(), None, false);
        true
    }

    /// Something has happened at the host's end.
    pub fn host_is_ready(&mut self, input: bool, hung_up: bool) -> Fate {
        self.readable |= input;
        self.hung_up |= hung_up;
        if hung_up && self.phase == Phase::Calling {
            return Fate::Reset;
        }
        // It had ended its output before, and now it is gone for good.
        if hung_up && self.host.contains(Shut::SEND) {
            self.shut(Shut::all());
        }
        Fate::Stays
    }

    /// All that the host's program wrote has been read.
    pub fn host_ends(&mut self) {
        // It may have gone since what is known of it was heard.
        let is_gone = self.hung_up || self.end.as_ref().is_some_and(End::is_hung_up);
        self.shut(if is_gone { Shut::all() } else { Shut::SEND });
    }

    /// The host does this no more, and the guest is to know.
    fn shut(&mut self, what: Shut) {
        if self.phase != Phase::Open || self.host.contains(what) {
            return;
        }
        self.host |= what;
        self.owed |= Owed::SHUTDOWN;
        if self.host.is_all() {
            (self.phase, self.end, self.readable) = (Phase::Closing, None, false);
            self.credit.forward_all();
            self.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
        }
    }

    /// What the guest will not read is not read for it.
    pub fn is_deaf(&self) -> bool {
        self.guest.contains(Shut::RECEIVE)
    }
}

fn is_the_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected)
}
