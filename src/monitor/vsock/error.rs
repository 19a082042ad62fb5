//! Why a guest's sockets have no place on the host.

use std::io;
use std::path::PathBuf;

use crate::listener;

/// Why they could not be opened. Nothing is left behind on the host then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody said where.
    #[error("a socket device without a path, in a machine without a name")]
    NoPath,
    /// The sockets beside it would have no address.
    #[error("socket path {path} is too long: {most} bytes at most, for a port's number follows", path = path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Bytes.
        most: usize,
    },
    /// It cannot be listened on.
    #[error(transparent)]
    Listen(#[from] listener::Error),
    /// The host is out of descriptors.
    #[error("cannot set up the guest's sockets")]
    Host(#[from] io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> String {
        match self {
            Self::NoPath => "say where its sockets go: `vsock=/tmp/guest.vsock`".to_owned(),
            Self::TooLong { .. } => "use a shorter one: `vsock=/tmp/guest.vsock`".to_owned(),
            Self::Listen(error) => error.hint().to_owned(),
            Self::Host(_) => "see what the limits are: ulimit -a".to_owned(),
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        !matches!(self, Self::Host(_))
    }
}
