//! The way out: packets from the driver, each read once, and what they do.

use std::io::{ErrorKind, Read};

use zerocopy::{FromZeros, IntoBytes};

use super::Vsock;
use super::connection::{Connection, Fate};
use super::header::{ANY_PORT, END_OF_MESSAGE, HOST, Header, Op, Shut};
use crate::guest_warn;
use crate::memory::Buffers;
use crate::virtio::queue::Virtqueue;
use crate::vsock::{Host, Kind};

impl Vsock {
    /// Takes what the driver gives, until there is no more, or too many answers wait for its buffers.
    pub(super) fn transmit(&mut self, host: &mut Host, queue: &mut Virtqueue) {
        while !self.table.is_full() {
            let Some(chain) = queue.pop() else {
                self.held_back = false;
                return;
            };
            self.packet(host, chain.readable);
            queue.complete(chain.head, 0);
        }
        self.held_back = true;
    }

    fn packet(&mut self, host: &mut Host, mut data: Buffers) {
        let mut header = Header::new_zeroed();
        let is_whole = data.read_exact(header.as_mut_bytes()).is_ok();
        // The upper halves of the addresses are zero (5.10.6.2).
        if !is_whole || header.src_cid.get() != self.cid() || header.dst_cid.get() > u32::MAX.into() {
            guest_warn!("socket: a packet without a whole header, or from {}", header.src_cid);
            return;
        }
        let kind = header.kind().filter(|kind| self.carries(*kind));
        let id = self.table.id(&header.key()).filter(|_| header.dst_cid.get() == HOST);
        let Some(id) = id else {
            return match (header.op(), kind) {
                (Some(Op::Request), Some(kind)) => self.open(host, &header, kind),
                _ => self.refuse(&header),
            };
        };
        let cid = self.cid();
        self.table.update(id, cid, host, |connection| {
            let len = header.len.get() as usize;
            if kind != Some(connection.kind) || len > data.len() {
                return Fate::Reset;
            }
            connection.hear(&header);
            match header.op() {
                Some(Op::Response) => connection.answer(),
                Some(Op::Rw) => {
                    drop(data.split_off_back(data.len() - len));
                    connection.receive(data, header.flags.get() & END_OF_MESSAGE != 0)
                }
                Some(Op::Shutdown) => connection.guest_shuts(Shut::from_bits_truncate(header.flags.get())),
                Some(Op::CreditUpdate) => Fate::Stays,
                Some(Op::CreditRequest) => connection.tell_room(),
                Some(Op::Rst) => Fate::Over,
                // What is there cannot be asked for again.
                Some(Op::Request) | None => Fate::Reset,
            }
        });
    }

    /// Whether the driver has agreed on connections of this kind.
    pub(super) fn carries(&self, kind: Kind) -> bool {
        match kind {
            Kind::Stream => {
                self.features & super::F_STREAM != 0 || self.features & super::F_NO_IMPLIED_STREAM == 0
            }
            Kind::Seqpacket => self.features & super::F_SEQPACKET != 0,
        }
    }

    /// A packet that belongs to nothing is answered by a reset, and a reset by nothing.
    fn refuse(&mut self, header: &Header) {
        if header.op() != Some(Op::Rst) {
            self.table.refuse(header);
        }
    }

    /// The guest calls a port of the host.
    fn open(&mut self, host: &mut Host, header: &Header, kind: Kind) {
        let key = header.key();
        let is_for_host = header.dst_cid.get() == HOST && key.host != ANY_PORT && key.guest != ANY_PORT;
        let Some(share) = is_for_host.then(|| self.table.admit(host.limit())).flatten() else {
            return self.refuse(header);
        };
        match host.connect(key.host, kind) {
            Ok(end) => {
                let mut connection = Connection::answered(key, end, share);
                connection.hear(header);
                self.table.insert(connection);
            }
            Err(error) => {
                match error.kind() {
                    // Somebody listens there: why the guest does not get through is not to be guessed.
                    ErrorKind::PermissionDenied => {
                        guest_warn!("socket: port {} of the host: {error}", key.host)
                    }
                    _ => log::debug!("socket: port {} of the host: {error}", key.host),
                }
                self.table.give_back(share);
                self.refuse(header);
            }
        }
    }
}
