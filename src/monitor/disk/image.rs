//! [`Image`]: the file of a raw disk, and the overlay over it if it has one. One request at a time, on the calling thread; long ones
//! in pieces. Knows no queue.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::files::{Facts, Files};
use super::overlay::{Base, Overlay};
use super::store::Store;
use super::{Error, Info, Io, copy};
use crate::config;

/// The unit of offsets and lengths.
const SECTOR: u64 = 512;
/// Bytes of a discard or write-zeroes that are done at once: first, at least, and at most. On a fragmented
/// image a MiB can take more than 100 ms.
const PIECE: u64 = 4 << 20;
const PIECE_MIN: u64 = 1 << 20;
const PIECE_MAX: u64 = 64 << 20;

/// An open image, locked.
#[derive(Debug)]
pub struct Image {
    store: Store,
    /// Where writes go, if not into the store, which then is only read.
    overlay: Option<Box<Overlay>>,
    pub info: Info,
    /// Requests under way, those of a disk that was dropped meanwhile among them.
    pub begun: AtomicUsize,
    /// fdatasync; a test counts its calls.
    pub sync: fn(&File) -> rustix::io::Result<()>,
}

/// How far a request has come.
pub enum Step {
    /// To its end, with so many bytes moved.
    Done(u32),
    /// This is left of it.
    Left(Io),
}

/// Does `part` of `range` (offset, length) piece by piece, and returns how many bytes are done: all, unless
/// `stop` said so between two.
fn in_pieces(
    range: (u64, u64),
    stop: &dyn Fn() -> bool,
    part: impl Fn(u64, u64) -> io::Result<()>,
) -> io::Result<u64> {
    let (offset, len) = range;
    let (mut done, mut piece) = (0, PIECE);
    while done < len && (done == 0 || !stop()) {
        let now = piece.min(len - done);
        let start = Instant::now();
        part(offset + done, now)?;
        done += now;
        piece = next_piece(piece, start.elapsed());
    }
    Ok(done)
}

/// Bytes of the piece after one of `piece` bytes that took `took`.
fn next_piece(piece: u64, took: Duration) -> u64 {
    match took.as_millis() {
        0..10 => (2 * piece).min(PIECE_MAX),
        10..100 => piece,
        _ => (piece / 2).max(PIECE_MIN),
    }
}

impl Image {
    /// The image that `config` names, whose `files` these are.
    ///
    /// # Errors
    /// An overlay does not belong to it.
    pub fn of(config: &config::Disk, files: Files) -> Result<Self, Error> {
        let Files { image: file, facts: Facts { info, is_device: device }, lower, overlay } = files;
        let base = || {
            let base = Base::of(&file, info.size);
            base.map_err(|source| Error::Open { path: config.path.clone(), source })
        };
        let overlay = match (lower, overlay) {
            (None, None) => None,
            (lower, overlay) => Overlay::of(config, &base()?, lower, overlay)?,
        };
        let store = Store { file, device, block_size: info.block_size };
        let (begun, sync) = (AtomicUsize::new(0), |file: &File| rustix::fs::fdatasync(file));
        Ok(Self { store, overlay, info, begun, sync })
    }

    /// The same with files that are opened now.
    ///
    /// # Errors
    /// As [`Files::open`].
    pub fn open(config: &config::Disk) -> Result<Self, Error> {
        Self::of(config, Files::open(config)?)
    }

    /// Does `io`, or a part of it if it is long and `stop` says so meanwhile.
    pub fn perform(&self, io: Io, stop: &dyn Fn() -> bool) -> io::Result<Step> {
        match io {
            Io::Read { offset, to } => {
                self.check(offset, to.len() as u64, false)?;
                match &self.overlay {
                    None => self.store.transfer(offset, &to, false),
                    Some(overlay) => overlay.read(&self.store, offset, to),
                }
                .map(Step::Done)
            }
            Io::Write { offset, from } => {
                self.check(offset, from.len() as u64, true)?;
                match &self.overlay {
                    None => self.store.transfer(offset, &from, true),
                    Some(overlay) => overlay.write(&self.store, offset, &from),
                }
                .map(Step::Done)
            }
            Io::Flush => self.flush().map(|()| Step::Done(0)),
            Io::Discard { offset, len } => {
                self.check(offset, len, true)?;
                let part = |offset, len| match &self.overlay {
                    None => self.store.discard(offset, len),
                    Some(overlay) => overlay.discard(offset, len),
                };
                let done = in_pieces((offset, len), stop, part)?;
                let left = Io::Discard { offset: offset + done, len: len - done };
                Ok(if done == len { Step::Done(0) } else { Step::Left(left) })
            }
            Io::WriteZeroes { offset, len, unmap } => {
                self.check(offset, len, true)?;
                let part = |offset, len| match &self.overlay {
                    None => self.store.write_zeroes(offset, len, unmap),
                    Some(overlay) => overlay.write_zeroes(&self.store, offset, len, unmap),
                };
                let done = in_pieces((offset, len), stop, part)?;
                let left = Io::WriteZeroes { offset: offset + done, len: len - done, unmap };
                Ok(if done == len { Step::Done(0) } else { Step::Left(left) })
            }
        }
    }

    /// What was written before is on stable storage afterwards.
    fn flush(&self) -> io::Result<()> {
        match &self.overlay {
            None => Ok((self.sync)(&self.store.file)?),
            Some(overlay) => overlay.flush(self.sync),
        }
    }

    /// Copies what the disk has now to `to`, an empty file: an overlay's, if there is one. Nothing is written to the disk meanwhile.
    pub fn save(&self, to: &File) -> io::Result<()> {
        match &self.overlay {
            Some(overlay) => overlay.save(to),
            None if self.store.device => {
                Err(io::Error::other("a block device is not copied: give it an overlay"))
            }
            None => copy::whole(&self.store.file, to),
        }
    }

    /// Whether the next run finds what was written only after a flush, and there is such.
    pub fn is_unsaved(&self) -> bool {
        self.overlay.as_ref().is_some_and(|overlay| overlay.is_unsaved())
    }

    fn check(&self, offset: u64, len: u64, write: bool) -> io::Result<()> {
        if write && self.info.readonly {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let end = offset.checked_add(len);
        let fits = end.is_some_and(|end| end <= self.info.size)
            && offset.is_multiple_of(SECTOR)
            && len.is_multiple_of(SECTOR);
        if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_request_stops_between_pieces_when_held_and_goes_on_where_it_was() {
        let parts = std::cell::RefCell::new(Vec::new());
        let part = |offset, len| {
            parts.borrow_mut().push((offset, len));
            Ok(())
        };
        // Held already: one piece, so that it comes on however often it is held.
        assert_eq!(in_pieces((512, 1 << 30), &|| true, part).unwrap(), PIECE);
        assert_eq!(parts.take(), [(512, PIECE)]);
        assert_eq!(in_pieces((512, 1 << 30), &|| parts.borrow().len() == 3, part).unwrap(), 7 * PIECE);
        assert_eq!(in_pieces((0, 0), &|| false, part).unwrap(), 0);
        parts.take();
        assert_eq!(in_pieces((512, 1 << 30), &|| false, part).unwrap(), 1 << 30);
        let mut at = 512;
        for (offset, len) in parts.take() {
            assert!(offset == at && len <= PIECE_MAX);
            at += len;
        }
        assert_eq!(at, 512 + (1 << 30));
        // Pieces fit how fast the host is.
        let after = |millis| next_piece(PIECE, Duration::from_millis(millis));
        assert_eq!((after(0), after(50), after(500)), (2 * PIECE, PIECE, PIECE / 2));
        assert_eq!(next_piece(PIECE_MAX, Duration::ZERO), PIECE_MAX);
        assert_eq!(next_piece(PIECE_MIN, Duration::MAX), PIECE_MIN);
    }
}
