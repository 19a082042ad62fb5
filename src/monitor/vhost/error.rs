//! Why there is no back end.

use std::io;
use std::path::PathBuf;

use crate::config::host_path::quoted;

/// Why a vhost-user back end could not be taken into service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is something else of that name.
    #[error("vhost-user back end {path}: this is no socket", path = path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Nobody answers there.
    #[error("cannot connect to vhost-user back end {path}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It does not speak vhost-user, or not in time.
    #[error("cannot set up vhost-user back end {path}", path = path.display())]
    Talk {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It knows only virtio before 1.0.
    #[error("vhost-user back end {path} lacks VIRTIO_F_VERSION_1", path = path.display())]
    Legacy {
        /// The socket.
        path: PathBuf,
    },
    /// It serves fewer pairs of queues than it is asked for.
    #[error("vhost-user back end {path} serves {most} of {asked} pairs of queues", path = path.display())]
    Queues {
        /// The socket.
        path: PathBuf,
        /// What it serves.
        most: u64,
        /// What it is asked for.
        asked: u16,
    },
    /// The host is out of descriptors.
    #[error("cannot make an eventfd for a vhost-user back end")]
    Host(#[source] io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> String {
        match self {
            Self::NotASocket { path } => format!("see what it is: ls -l {}", quoted(path)),
            Self::Connect { path, source } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    format!("start the back end first, so that it listens at {}", quoted(path))
                }
                io::ErrorKind::PermissionDenied => format!("see who may use it: ls -l {}", quoted(path)),
                _ => format!("see who listens there, and whether it answers: ss -xlp src {}", quoted(path)),
            },
            Self::Talk { path, .. } => format!(
                "see who listens there: ss -xlp src {}; many back ends serve one front end at a time",
                quoted(path)
            ),
            Self::Legacy { .. } => "use a back end of virtio 1.0 or later".to_owned(),
            Self::Queues { most, .. } => {
                format!("use queues={}, or start the back end with more", (*most).max(1))
            }
            Self::Host(_) => "see what the limits are: ulimit -a".to_owned(),
        }
    }
}
