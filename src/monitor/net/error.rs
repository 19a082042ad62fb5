//! Why a network device has no end on the host.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::user;
use crate::config::host_path::quoted;
use crate::output;
use crate::vhost;

/// Why a link could not be opened. Nothing is left behind on the host then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no user network.
    #[error(transparent)]
    User(#[from] user::Error),
    /// The host makes no taps, or not for us.
    #[error("cannot open /dev/net/tun for tap {name}")]
    Tun {
        /// The tap.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no such tap, and we may not make one.
    #[error("there is no tap {name}, and making one takes root (CAP_NET_ADMIN)")]
    Missing {
        /// The tap.
        name: String,
    },
    /// It belongs to another user.
    #[error("tap {name} belongs to another user")]
    NotOurs {
        /// The tap.
        name: String,
    },
    /// Another process has it.
    #[error("{kind} {name} is in use by another process")]
    Busy {
        /// What it is: `tap` or `macvtap`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// There is an interface of that name, of another kind.
    #[error("{name} is a network interface, but no tap")]
    NotATap {
        /// The interface.
        name: String,
    },
    /// It was made for one queue.
    #[error("tap {name} has one queue, and {queues} are asked for")]
    OneQueue {
        /// The tap.
        name: String,
        /// Pairs of queues.
        queues: u16,
    },
    /// There is an interface of that name, of another kind.
    #[error("{name} is a network interface, but no macvtap")]
    NotAMacvtap {
        /// The interface.
        name: String,
    },
    /// There is no such interface.
    #[error("there is no network interface {name}")]
    NoMacvtap {
        /// Its name.
        name: String,
    },
    /// Its device file.
    #[error("cannot open {path} of macvtap {name}", path = path.display())]
    Macvtap {
        /// The macvtap.
        name: String,
        /// Its device file.
        path: PathBuf,
        /// The device's numbers, as mknod(1) takes them.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host refused something else.
    #[error("cannot {what} tap {name}")]
    Tap {
        /// The tap.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("cannot connect to network socket {path}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It is no descriptor that was given to us.
    #[error("descriptor {fd} was not passed to this process")]
    NotPassed {
        /// Its number.
        fd: u32,
    },
    /// It is something else.
    #[error("descriptor {fd} is neither a tap nor a connected unix socket")]
    NotALink {
        /// Its number.
        fd: u32,
    },
    /// A tap without IFF_NO_PI.
    #[error("descriptor {fd} is a tap whose frames have a header of its own (no IFF_NO_PI)")]
    PacketInfo {
        /// Its number.
        fd: u32,
    },
    /// The host's kernel does not serve the rings of a guest.
    #[error("cannot {what} /dev/vhost-net")]
    Vhost {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Another process does not serve the rings of a guest.
    #[error(transparent)]
    VhostUser(#[from] vhost::Error),
    /// There is no such segment, and none can be made.
    #[error("cannot join network segment {name} in {folder}", folder = folder.display())]
    Switch {
        /// The segment.
        name: String,
        /// Where its folder is.
        folder: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Its frames cannot be written to a file.
    #[error("cannot write network dump {path}", path = path.display())]
    Dump {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host is out of descriptors or memory.
    #[error("cannot set up a network link")]
    Host(#[source] io::Error),
}

/// Makes a tap for the user who is asked to type it.
fn make(name: &str, more: &str) -> String {
    format!("sudo ip tuntap add dev {name} mode tap{more} user $USER && sudo ip link set {name} up")
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> String {
        match self {
            Self::User(error) => error.hint(),
            Self::VhostUser(error) => error.hint(),
            Self::Tun { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "load the driver: sudo modprobe tun".to_owned()
            }
            Self::Tun { .. } => "see who may use it: ls -l /dev/net/tun".to_owned(),
            Self::Missing { name } => format!("make it once: {}", make(name, "")),
            Self::NotOurs { name } => {
                format!("make it yours: sudo ip link delete {name} && {}", make(name, ""))
            }
            Self::Busy { kind, .. } => {
                let files = if *kind == "tap" { "/dev/net/tun" } else { "/dev/tap*" };
                format!(
                    "use another {kind}, or stop that process: sudo fuser -v {files} lists those with one"
                )
            }
            Self::NotATap { name } => {
                format!("use a tap, in a bridge with {name}, say; these are there: ip -d link show type tun")
            }
            Self::NotAMacvtap { .. } => "these are there: ip -d link show type macvtap".to_owned(),
            Self::NoMacvtap { name } => format!(
                "make it once: sudo ip link add link eth0 name {name} type macvtap mode bridge && sudo ip link set {name} up"
            ),
            Self::Macvtap { path, source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                format!("make it yours: sudo chown $USER {}", quoted(path))
            }
            Self::Macvtap { path, device, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                let path = quoted(path);
                format!("no udev has made it: sudo mknod {path} c {device} && sudo chown $USER {path}")
            }
            Self::Macvtap { name, .. } => format!("see what it is: ip -d link show {name}"),
            Self::OneQueue { name, .. } => {
                format!(
                    "drop queues=, or make it anew: sudo ip link delete {name} && {}",
                    make(name, " multi_queue")
                )
            }
            Self::Tap { name, .. } => format!("see what it is: ip -d link show {name}"),
            Self::Connect { path, source } => match source.kind() {
                io::ErrorKind::ConnectionRefused if !is_socket(path) => {
                    format!("it is no socket: see what it is, ls -l {}", quoted(path))
                }
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    let path = quoted(path);
                    format!(
                        "start what listens there first: passt -s {path}, for example (apt-get install passt)"
                    )
                }
                io::ErrorKind::PermissionDenied => format!("see who may use it: ls -l {}", quoted(path)),
                _ => format!("see who listens there, and whether it answers: ss -xlp src {}", quoted(path)),
            },
            Self::NotPassed { fd } => {
                format!("pass it open and without FD_CLOEXEC, as a shell does with {fd}<>FILE")
            }
            Self::NotALink { .. } => "pass a tap, or a unix socket: stream, datagram or seqpacket".to_owned(),
            Self::PacketInfo { .. } => "open the tap with IFF_NO_PI".to_owned(),
            Self::Vhost { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => "load the driver: sudo modprobe vhost_net".to_owned(),
                io::ErrorKind::PermissionDenied => {
                    "drop vhost=on, or let this user have it: sudo setfacl -m u:$USER:rw /dev/vhost-net"
                        .to_owned()
                }
                _ => "drop vhost=on: vmm then serves the guest's rings itself".to_owned(),
            },
            Self::Switch { source, .. } if source.kind() == io::ErrorKind::InvalidInput => {
                "the path is too long for a socket: choose a shorter name, or a shorter XDG_RUNTIME_DIR"
                    .to_owned()
            }
            Self::Switch { .. } => {
                "use a directory of your own: export XDG_RUNTIME_DIR=$(mktemp -d)".to_owned()
            }
            Self::Dump { path, source } => output::hint(path, source, "frames.pcapng"),
            Self::Host(_) => "see what the limits are: ulimit -a".to_owned(),
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::User(error) => error.is_bad_argument(),
            Self::Host(_) | Self::VhostUser(vhost::Error::Host(_)) => false,
            _ => true,
        }
    }
}
