//! The header of each packet, `struct virtio_vsock_hdr` (virtio 1.3, 5.10.6).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::credit::Credit;
use crate::vsock::Kind;

/// Bytes of a header.
pub const HEADER: usize = size_of::<Header>();
/// The host's address (VMADDR_CID_HOST).
pub const HOST: u64 = 2;
/// What stands for any port, and so is none (VMADDR_PORT_ANY).
pub const ANY_PORT: u32 = u32::MAX;

/// What a packet is (5.10.6): VIRTIO_VSOCK_OP_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Rst,
        Self::Shutdown,
        Self::Rw,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

bitflags! {
    /// What the sender of a packet will do no more: VIRTIO_VSOCK_SHUTDOWN_* (5.10.6.6).
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Shut: u32 {
        /// Receive.
        const RECEIVE = 1;
        /// Send.
        const SEND = 2;
    }
}

/// The last packet of a message (VIRTIO_VSOCK_SEQ_EOM). A record's end (VIRTIO_VSOCK_SEQ_EOR) has no counterpart on unix sockets.
pub const END_OF_MESSAGE: u32 = 1;

/// VIRTIO_VSOCK_TYPE_*.
pub fn type_of(kind: Kind) -> u16 {
    match kind {
        Kind::Stream => 1,
        Kind::Seqpacket => 2,
    }
}

/// The two ports of a connection. The addresses are always the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub host: u32,
    pub guest: u32,
}

/// What is in front of each packet, either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    pub src_cid: le::U64,
    pub dst_cid: le::U64,
    pub src_port: le::U32,
    pub dst_port: le::U32,
    pub len: le::U32,
    pub kind: le::U16,
    pub op: le::U16,
    pub flags: le::U32,
    pub buf_alloc: le::U32,
    pub fwd_cnt: le::U32,
}

impl Header {
    /// A packet from the host to the guest at address `cid`.
    pub fn to_guest(cid: u64, key: Key, kind: Kind, op: Op) -> Self {
        Self {
            src_cid: HOST.into(),
            dst_cid: cid.into(),
            src_port: key.host.into(),
            dst_port: key.guest.into(),
            kind: type_of(kind).into(),
            op: (op as u16).into(),
            ..Self::default()
        }
    }

    /// The reset that a packet from the guest gets that belongs to nothing.
    pub fn refused(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: (Op::Rst as u16).into(),
            ..Self::default()
        }
    }

    /// The same with what the sender can take.
    pub fn with(mut self, credit: &mut Credit) -> Self {
        let (buf_alloc, fwd_cnt) = credit.tell();
        (self.buf_alloc, self.fwd_cnt) = (buf_alloc.into(), fwd_cnt.into());
        self
    }

    /// What the packet is. `None` if that is not defined.
    pub fn op(&self) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == self.op.get())
    }

    /// What goes over its connection. `None` if that is not defined.
    pub fn kind(&self) -> Option<Kind> {
        [Kind::Stream, Kind::Seqpacket].into_iter().find(|kind| type_of(*kind) == self.kind.get())
    }

    /// The connection of a packet from the guest.
    pub fn key(&self) -> Key {
        Key { host: self.dst_port.get(), guest: self.src_port.get() }
    }
}
