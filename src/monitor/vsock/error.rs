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
    /// The host's kernel does not carry the guest's connections.
    #[error("cannot {what} /dev/vhost-vsock")]
    Vhost {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The guest's address is another's.
    #[error("vsock address {0} is another guest's on this host")]
    CidTaken(u32),
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
            Self::Vhost { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "load the driver: sudo modprobe vhost_vsock".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "drop vhost=on, or let this user have it: sudo setfacl -m u:$USER:rw /dev/vhost-vsock"
                        .to_owned()
                }
                _ => "drop vhost=on: vmm then carries the guest's connections itself".to_owned(),
            },
            Self::CidTaken(cid) => {
                format!("give each guest its own: `vsock=vhost=on,cid={}`", cid.wrapping_add(1).max(4))
            }
            Self::Host(_) => "see what the limits are: ulimit -a".to_owned(),
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        !matches!(self, Self::Host(_))
    }
}
