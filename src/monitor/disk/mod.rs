//! Disks as a front end sees them: submit, then collect completions. Knows no virtio.
//!
//! A back end ([`Raw`], later faster engines) implements [`Disk`]; virtio-blk is one front end. Where a disk's bytes are, in its
//! image or in an overlay over it, the back end's `Image` knows.

mod copy;
mod files;
mod foreign;
mod image;
mod overlay;
mod raw;
mod store;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::config::host_path::quoted;
use crate::memory::Buffers;
use crate::output;

pub use files::Files;
pub use foreign::Foreign;
pub use overlay::{Base, Unfit, unnamed};
pub use raw::{Images, Raw};

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused it.
    #[error("cannot open disk image {path}", path = path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("disk image {path} is in use by another process", path = path.display())]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// A request of the disk before the guest's reset is still under way.
    #[error("disk image {path} still has a request from before the reset under way", path = path.display())]
    Busy {
        /// The image.
        path: PathBuf,
    },
    /// Whoever asks for it has not opened it, or something else.
    #[error("disk image {path} was not passed, open, with what asks for it", path = path.display())]
    NotGiven {
        /// The image.
        path: PathBuf,
    },
    /// Neither a regular file nor a block device.
    #[error("disk image {path} is neither a file nor a block device", path = path.display())]
    NotAnImage {
        /// The image.
        path: PathBuf,
    },
    /// It is no raw image.
    #[error("disk image {path} is {name}, not a raw image", path = path.display(), name = format.name)]
    Foreign {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: Foreign,
    },
    /// Its size is not that of a disk.
    #[error("disk image {path} has {size} bytes, not a whole number of {block_size}-byte blocks", path = path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The block device cannot be written in blocks of this size.
    #[error("disk {path} has blocks of {native} bytes and cannot be used with {block_size}", path = path.display())]
    BlockSize {
        /// The block device.
        path: PathBuf,
        /// What was asked for.
        block_size: u32,
        /// The device's own.
        native: u32,
    },
    /// An overlay's map would be too large.
    #[error("disk image {path} has {size} bytes, and one with an overlay can have {most}", path = path.display())]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// The most.
        most: u64,
    },
    /// The host refused it.
    #[error("cannot open overlay {path}", path = path.display())]
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It does not belong to the image.
    #[error("overlay {path} cannot be used: {unfit}", path = path.display())]
    Unfit {
        /// The overlay.
        path: PathBuf,
        /// Why.
        unfit: Unfit,
    },
    /// There is no place for an overlay without a name.
    #[error("cannot make a temporary overlay in {folder}", folder = folder.display())]
    Temporary {
        /// Where.
        folder: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Open { path, source } => match source.kind() {
                io::ErrorKind::NotFound => {
                    format!("check the path; to make an empty disk: truncate -s 4G {}", quoted(path))
                }
                io::ErrorKind::PermissionDenied => {
                    format!("see who may use it: ls -l {}; to read only, add ,readonly", quoted(path))
                }
                io::ErrorKind::ReadOnlyFilesystem => "its file system is read-only: add ,readonly".to_owned(),
                _ if matches!(source.raw_os_error(), Some(libc::EISDIR | libc::ENXIO)) => {
                    "use a raw disk image or a block device".to_owned()
                }
                _ => format!("see what is there: ls -ld {}", quoted(path)),
            },
            Self::Locked { path } => {
                format!(
                    "stop that process (fuser -v {} names it), or open it with ,readonly in both",
                    quoted(path)
                )
            }
            Self::Busy { .. } => "what stores the image does not answer: start again when it does".to_owned(),
            Self::NotGiven { .. } => "use the vmm that the machine was started with".to_owned(),
            Self::NotAnImage { .. } => "use a raw disk image or a block device".to_owned(),
            Self::Foreign { path, format } => {
                let advice = format.advice(path);
                format!("{advice}; if it is a raw disk that only looks like that, add ,format=raw")
            }
            Self::Size { path, size, block_size } => {
                let round = size.next_multiple_of(u64::from(*block_size)).max(1 << 20);
                format!("if it is a raw image, grow it: truncate -s {round} {}", quoted(path))
            }
            Self::BlockSize { native, .. } => format!("use block-size={native} or a larger power of two"),
            Self::TooLarge { path, .. } => {
                format!("make a copy to write to: cp {0} {0}.copy", quoted(path))
            }
            Self::Overlay { path, source } => output::hint(path, source, "disk.overlay"),
            Self::Unfit { unfit, .. } => unfit.hint().to_owned(),
            Self::Temporary { folder, .. } => {
                format!(
                    "have TMPDIR name a folder where you may write and there is room: ls -ld {0}; df {0}",
                    quoted(folder)
                )
            }
        })
    }
}

/// What a disk is. Constant while a machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Capacity in bytes, a multiple of 512.
    pub size: u64,
    /// Writes fail with `ErrorKind::ReadOnlyFilesystem`.
    pub readonly: bool,
    /// Logical block size: what a guest does best to keep to. Offsets and lengths are multiples of 512,
    /// whatever it is.
    pub block_size: u32,
    /// Preferred (physical) block size, a power of two times `block_size`.
    pub physical_block_size: u32,
    /// Discard and write-zeroes work on this back end.
    pub discard: bool,
}

/// One request. Offsets and lengths are in bytes; the back end checks them against [`Info`].
#[derive(Debug)]
pub enum Io {
    /// Disk to guest memory.
    Read {
        /// Byte offset on the disk.
        offset: u64,
        /// Where to.
        to: Buffers,
    },
    /// Guest memory to disk.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// Where from.
        from: Buffers,
    },
    /// Everything that completed before this was submitted is on stable storage when it completes.
    Flush,
    /// The range may be forgotten; what it reads as afterwards is undefined.
    Discard {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Byte offset on the disk.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
}

/// A disk's back end.
///
/// One front end calls it, from one thread at a time. `submit` takes the buffers over; the front end hears of the
/// request again only from `done`. Tags are the front end's, unique among those in flight. Requests may complete in
/// any order; `ready` becomes readable when there is something to collect.
///
/// A disk comes to rest by [`Disk::hold`]: what is begun goes on to its end, or, if it is long, to the next
/// place where it can wait; the rest stays with the disk until [`Disk::go_on`] or [`Disk::forget`]. Each
/// request can be begun anew: the front end may submit what was held to another disk on the same image.
/// Dropping a disk waits a moment for what it has.
pub trait Disk: Send {
    /// What the disk is.
    fn info(&self) -> Info;
    /// Takes a request on. Errors come by [`Disk::done`] too.
    fn submit(&mut self, tag: u16, io: Io);
    /// The next finished request: its tag, and the bytes moved or why it failed.
    fn done(&mut self) -> Option<(u16, io::Result<u32>)>;
    /// Readable while [`Disk::done`] may have something to give, and when a held disk comes to rest.
    fn ready(&self) -> BorrowedFd<'_>;
    /// Begins nothing more.
    fn hold(&mut self);
    /// Whether it is held, nothing is being done, and all that is done is collected.
    fn is_at_rest(&self) -> bool;
    /// Undoes [`Disk::hold`].
    fn go_on(&mut self);
    /// Drops what is held. At rest.
    fn forget(&mut self);
}
