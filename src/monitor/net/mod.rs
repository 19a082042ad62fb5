//! Links: where a guest's Ethernet frames leave for the host, and come from. They know no virtio.
//!
//! A [`Link`] is one queue of one of the host's ends: a user network ([`user`]), a tap, or a socket with a peer behind it. Frames go straight between guest
//! memory and its descriptor. Whoever drives it says what it waits for, and waits on the link's own descriptor.

mod dhcp;
mod dump;
mod error;
mod fd;
mod interfaces;
mod mac;
mod macvtap;
mod server;
mod socket;
pub mod switch;
mod tap;
pub mod traffic;
pub mod user;
mod vhost;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitflags::bitflags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;

use crate::config::{self, NetTarget, OutputFile};
use crate::memory::{Buffers, Slices};
use crate::runtime_dir;
use crate::sandbox::Needs;
use crate::vhost::{Error as BackEndError, FrontEnd};

use dump::{Dump, Dumped, Queue};
pub use error::Error;
pub use fd::from_descriptor;
pub use interfaces::Interfaces;
pub use server::Server;
use switch::Neighbours;
use traffic::{Network, Traffic};
pub use vhost::Vhost;

/// Bytes of `struct virtio_net_hdr_v1`, in which a guest and a tap say what a frame still needs.
pub const HEADER: usize = 12;
/// Bytes at the start of a frame that are read into memory of ours: addresses, type and a VLAN's tag.
pub const START: usize = 18;
/// The longest frame, with Ethernet's header and a tag: one that a host splits up (or has put together) has 64 KiB.
pub const MAX_FRAME: usize = (64 << 10) + START;

bitflags! {
    /// Work on frames that may be left to the other side. A link has the same both ways.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Checksums that are yet to be computed.
        const CSUM = 1;
        /// TCP over IPv4 that is yet to be cut into segments.
        const TSO4 = 2;
        /// TCP over IPv6.
        const TSO6 = 4;
        /// Such TCP with congestion marks.
        const ECN = 8;
        /// UDP over IPv4.
        const USO4 = 16;
        /// UDP over IPv6.
        const USO6 = 32;
    }
}

/// What came with a frame, in memory of ours.
#[derive(Debug, Default, Clone, Copy)]
pub struct Head {
    /// What the frame still needs; zeroes if nothing.
    pub header: [u8; HEADER],
    /// The frame's first bytes, as many as it has.
    pub start: [u8; START],
}

/// One of the host's ends.
///
/// Called with its mutex held, never blocks. It never holds more than one frame each way, and of those only what the host's side
/// has begun to take or to give; a stream socket also holds the short frames of a batch. The user network makes its frames itself,
/// and bounds them.
pub trait Wire: Send {
    /// The descriptor to wait on.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Whether anybody is at the other end. Once false it stays so; what is sent is dropped, and nothing is received.
    fn is_up(&self) -> bool;
    /// What frames may need, either way.
    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }
    /// Received frames may need these from now on.
    fn accept(&mut self, _offloads: Offloads) {}
    /// Takes part in the traffic, or no longer. Only of more than one queue.
    fn set_attached(&mut self, _on: bool) {}
    /// Sees whether anybody is there still, where no frame passes here that would tell.
    fn look(&mut self) {}
    /// Sends a frame whole. False if it has to wait, and is to be sent again then; true also for a frame that is dropped.
    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool;
    /// Whether the last frame that [`Wire::send`] took was dropped: nobody is there, or the host's side refused it. True once.
    fn take_refused(&mut self) -> bool {
        false
    }
    /// The batch is at its end: sends on what the frames left. True if nothing is left.
    fn flush(&mut self) -> bool {
        true
    }
    /// How many frames for the guest this end has dropped by itself since this was last asked.
    fn take_lost(&mut self) -> u64 {
        0
    }
    /// Receives a frame: its first bytes into `head`, what follows into `rest`. Returns its length; what does not fit is dropped.
    /// `None` if there is none, or no end of it, for now.
    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize>;
}

/// One queue of a host end. Clones are the same.
#[derive(Clone)]
pub struct Link {
    wire: Arc<Mutex<Box<dyn Wire>>>,
    /// The wire's descriptor once more: to be waited on without a lock.
    fd: Arc<OwnedFd>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl Link {
    /// A link over `wire`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(wire: impl Wire + 'static) -> io::Result<Self> {
        Self::boxed(Box::new(wire))
    }

    fn boxed(wire: Box<dyn Wire>) -> io::Result<Self> {
        let fd = Arc::new(wire.fd().try_clone_to_owned()?);
        Ok(Self { wire: Arc::new(Mutex::new(wire)), fd })
    }

    /// The host's end, for one turn.
    pub fn wire(&self) -> MutexGuard<'_, Box<dyn Wire>> {
        lock(&self.wire)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one network device of a configuration has on the host.
#[derive(Debug, Clone)]
pub struct Port {
    /// One for each pair of queues.
    pub links: Vec<Link>,
    /// What serves these pairs.
    pub server: Server,
    /// What carrying its frames needs of the host.
    pub needs: Needs,
    /// The guest's address.
    pub mac: [u8; 6],
    /// What its devices have carried, one after the other.
    pub traffic: Arc<Traffic>,
}

impl Port {
    /// A port of these links, for a guest that has the address `mac`.
    pub fn new(links: Vec<Link>, mac: [u8; 6]) -> Self {
        Self { links, server: Server::default(), needs: Needs::empty(), mac, traffic: Arc::default() }
    }
}

/// The ports of one configuration, opened once and kept over the guest's resets: peers and the host's side notice none.
#[derive(Debug, Default)]
pub struct Ports {
    ports: BTreeMap<usize, Port>,
    /// Those on the segments of these ports.
    neighbours: Neighbours,
    /// Where the frames of all of them are noted. Only if that is asked for.
    noted: Option<Queue>,
    dump: Option<Dump>,
}

impl Ports {
    /// The port of the `index`th network device of the machine called `name`, opened now if it is asked for the first time, or if the
    /// process that served it is gone: one that has come back is found by a reboot.
    ///
    /// # Errors
    /// [`Error`]: the host has not got what `config` names.
    pub fn get(&mut self, index: usize, config: &config::Net, name: Option<&str>) -> Result<Port, Error> {
        if let Some(port) = self.ports.get(&index) {
            if !port.server.is_gone() {
                return Ok(port.clone());
            }
            let port = port.clone();
            return Ok(self.open(index, config, name).unwrap_or(port));
        }
        self.open(index, config, name)
    }

    fn open(&mut self, index: usize, config: &config::Net, name: Option<&str>) -> Result<Port, Error> {
        let mut server = Server::default();
        let mut mac = config.mac.map_or_else(|| mac::generated(name, index), |mac| mac.0);
        let wires: Vec<Box<dyn Wire>> = match &config.to {
            NetTarget::User(network) => {
                let mtu = config.mtu().unwrap_or(config::UserNet::MTU);
                let stack = user::Stack::new(network, mac, mtu)?;
                vec![Box::new(stack.with_neighbours(self.neighbours.clone()))]
            }
            NetTarget::Tap(name) => {
                let taps = tap::open(name, config.queues(), config.mtu)?;
                taps.into_iter().map(|tap| Box::new(tap) as _).collect()
            }
            NetTarget::Macvtap(name) => {
                let opened = macvtap::open(name, config.queues())?;
                mac = opened.mac.0;
                opened.queues.into_iter().map(|tap| Box::new(tap) as _).collect()
            }
            NetTarget::Switch(segment) => {
                let mut switch = switch::Switch::join(&runtime_dir::of_user(), segment)?;
                if config.dhcp {
                    switch.lease(mac, name)?;
                }
                self.neighbours.add(switch.folder().to_owned());
                vec![Box::new(switch)]
            }
            NetTarget::Fd(fd) => vec![fd::inherited(*fd)?],
            NetTarget::Socket(path) => vec![Box::new(socket::Stream::connect(path)?)],
            NetTarget::VhostUser(path) => {
                let pairs = config.queues();
                let back_end = Arc::new(FrontEnd::connect(path, pairs)?);
                if pairs > 1 && back_end.features() & 1 << VIRTIO_NET_F_MQ == 0 {
                    return Err(BackEndError::Queues { path: path.clone(), most: 1, asked: pairs }.into());
                }
                server = Server::BackEnd(back_end.clone());
                let link = |pair| Box::new(server::Unseen { back_end: back_end.clone(), pair }) as _;
                (0..pairs.into()).map(link).collect()
            }
        };
        let links = wires.into_iter().map(|wire| match &self.noted {
            None => Link::boxed(wire),
            Some(queue) => Link::new(Dumped { wire, queue: queue.clone(), interface: index as u32 }),
        });
        let links = links.collect::<io::Result<Vec<_>>>().map_err(Error::Host)?;
        if config.vhost {
            let kernel = links.iter().map(|_| Vhost::open().map(Arc::new));
            let pairs = kernel.collect::<Result<_, _>>()?;
            let interfaces = Arc::new(Interfaces::watch().map_err(Error::Host)?);
            server = Server::Kernel { pairs, interfaces };
        }
        let port = Port { server, needs: Needs::of_net(config), ..Port::new(links, mac) };
        self.ports.insert(index, port.clone());
        Ok(port)
    }

    /// Closes the port of the `index`th network device.
    pub fn close(&mut self, index: usize) {
        self.ports.remove(&index);
    }

    /// Has the frames of the ports that are opened from now on noted for [`Ports::start_dump`].
    pub fn note_frames(&mut self) {
        self.noted.get_or_insert_default();
    }

    /// Writes the noted frames to `file` from now on, those of `networks` in the order of their numbers. Nothing happens if that is
    /// so already.
    ///
    /// # Errors
    /// [`Error::Dump`]
    pub fn start_dump(&mut self, file: &OutputFile, networks: &[Network]) -> Result<(), Error> {
        if let (Some(queue), None) = (&self.noted, &self.dump) {
            self.dump = Some(Dump::start(file, queue, networks)?);
        }
        Ok(())
    }
}
