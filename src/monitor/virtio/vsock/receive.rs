//! The way in: packets for the driver. Data goes straight from a socket into the driver's buffers.

use super::Vsock;
use super::connection::{Connection, Fate};
use super::header::END_OF_MESSAGE;
use super::rooms::Rooms;
use crate::virtio::queue::Virtqueue;
use crate::vsock::{Host, Input, Kind};

/// Bytes that one connection sends before the others have their turn.
const TURN: usize = 64 << 10;
/// The longest message, whatever the guest has room for.
const MAX_MESSAGE: usize = 1 << 20;

/// A message that has been read, and does not fit into the buffers that the driver has given.
#[derive(Debug)]
pub struct Message {
    /// The connection.
    id: u64,
    bytes: Vec<u8>,
    /// Bytes that have gone on.
    done: usize,
}

/// What came of a connection's turn.
enum Turn {
    Fate(Fate),
    /// A message was read that goes on in pieces.
    Message(Vec<u8>),
}

const STAYS: Turn = Turn::Fate(Fate::Stays);

impl Vsock {
    /// Gives the driver what there is for it, as far as it has given buffers.
    pub(super) fn receive(&mut self, host: &Host, queue: &mut Virtqueue) {
        while self.message.is_some() || self.table.is_waiting() {
            if self.rooms.gather(queue, 0).is_none() {
                return;
            }
            if self.message.is_some() {
                self.go_on_with_message(queue);
            } else if let Some(reset) = self.table.next_reset() {
                self.rooms.put(queue, reset, &[]);
            } else if let Some(id) = self.table.next_turn() {
                self.turn(id, host, queue);
            }
        }
    }

    fn turn(&mut self, id: u64, host: &Host, queue: &mut Virtqueue) {
        let (cid, rooms) = (self.cid(), &mut self.rooms);
        let mut message = None;
        self.table.update(id, cid, host, |connection| match turn(connection, cid, rooms, queue) {
            Turn::Fate(fate) => fate,
            Turn::Message(bytes) => {
                message = Some(Message { id, bytes, done: 0 });
                Fate::Stays
            }
        });
        self.message = message;
    }

    /// The message goes on, piece by piece; nothing else of its connection's comes between.
    fn go_on_with_message(&mut self, queue: &mut Virtqueue) {
        let cid = self.cid();
        let Some(message) = &mut self.message else { return };
        // It may be over meanwhile.
        let Some(connection) = self.table.get(message.id) else {
            self.message = None;
            return;
        };
        let Some(room) = self.rooms.first() else { return };
        let rest = message.bytes.get(message.done..).unwrap_or_default();
        let piece = &rest[..rest.len().min(room)];
        let is_last = piece.len() == rest.len();
        let header = connection.data(cid, piece.len(), if is_last { END_OF_MESSAGE } else { 0 });
        message.done += self.rooms.put(queue, header, piece);
        if is_last {
            self.message = None;
        }
    }
}

/// Sends what connection has first: one packet without data, or all the data that is there and the guest has room for.
fn turn(connection: &mut Connection, cid: u64, rooms: &mut Rooms, queue: &mut Virtqueue) -> Turn {
    if let Some(header) = connection.control(cid) {
        rooms.put(queue, header, &[]);
        return STAYS;
    }
    if !connection.may_read() {
        return STAYS;
    }
    let Some(end) = &connection.end else { return STAYS };
    if connection.is_deaf() {
        connection.host_ends();
        return STAYS;
    }
    let free = connection.credit.free() as usize;
    let input = match (end.kind(), free) {
        (Kind::Stream, 1..) => {
            rooms.gather(queue, free.min(TURN));
            end.receive(&rooms.payload(), free.min(TURN))
        }
        // The end is heard, however little room the guest has.
        (Kind::Stream, 0) | (Kind::Seqpacket, _) => end.look(),
    };
    match (input, connection.kind) {
        (Ok(Input::Nothing), _) => connection.readable = false,
        (Ok(Input::End), _) => connection.host_ends(),
        (Ok(Input::Bytes(_)), Kind::Stream) if free == 0 => connection.ask_for_room(1),
        (Ok(Input::Bytes(len)), Kind::Stream) => {
            rooms.put_filled(queue, len, |len, _| connection.data(cid, len, 0));
        }
        (Ok(Input::Bytes(len)), Kind::Seqpacket) => return message(connection, len, cid, rooms, queue),
        (Err(error), _) => {
            log::debug!("socket: port {} of the guest: {error}", connection.key.guest);
            return Turn::Fate(Fate::Reset);
        }
    }
    STAYS
}

/// Sends a message of `len` bytes, once the guest has room for all of it.
fn message(
    connection: &mut Connection,
    len: usize,
    cid: u64,
    rooms: &mut Rooms,
    queue: &mut Virtqueue,
) -> Turn {
    if len > MAX_MESSAGE || len > connection.credit.peer_alloc() as usize {
        log::warn!("socket: port {} of the guest: a message of {len} bytes", connection.key.guest);
        return Turn::Fate(Fate::Reset);
    }
    if len > connection.credit.free() as usize {
        connection.ask_for_room(len as u32);
        return STAYS;
    }
    let Some(end) = &connection.end else { return STAYS };
    let room = rooms.gather(queue, len);
    let is_roomy = room.is_some_and(|room| room >= len) && rooms.payload().len() >= len;
    let taken = match is_roomy && len > 0 {
        true => end.receive(&rooms.payload(), len).map(|_| None),
        false => end.take_message(len).map(Some),
    };
    match taken {
        Ok(None) => {
            let flags = |is_last| if is_last { END_OF_MESSAGE } else { 0 };
            rooms.put_filled(queue, len, |len, is_last| connection.data(cid, len, flags(is_last)));
            STAYS
        }
        Ok(Some(bytes)) => Turn::Message(bytes),
        Err(error) => {
            log::debug!("socket: port {} of the guest: {error}", connection.key.guest);
            Turn::Fate(Fate::Reset)
        }
    }
}
