//! [`FrontEnd`]: the monitor's side of vhost-user (QEMU's docs/interop/vhost-user.rst).
//!
//! The back end is trusted with guest memory and with nothing else: it gets descriptors of that and eventfds, but no address of
//! the monitor's, and each answer is checked and waited for [`PATIENCE`] at most. One that fails in any way is given up: it is cut
//! off, and serves no more. The device stays.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv, shutdown,
    socket_with,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use zerocopy::IntoBytes;

use super::message::{self, Addresses, MOST_DESCRIPTORS, Region, Request, State};
use super::{Error, Ring};
use crate::event_loop::Event;
use crate::memory::{self, GuestRam};
use crate::planted;

/// How long one conversation may take: the first, a start or a stop. A vCPU may be waiting for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// VHOST_USER_F_PROTOCOL_FEATURES, among the features of virtio.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_MQ: it can be asked how many pairs of queues it serves.
const MQ: u64 = 1;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK: requests without an answer of their own have one, too.
const REPLY_ACK: u64 = 1 << 3;

/// A ring that the back end has: its index, and the guest address of its used ring.
#[derive(Debug)]
struct Served {
    index: u32,
    used: u64,
}

/// A connection with a back end.
#[derive(Debug)]
pub struct FrontEnd {
    socket: OwnedFd,
    path: PathBuf,
    /// Of virtio, as the back end offers them.
    features: u64,
    /// Agreed on, of the protocol.
    protocol: u64,
    up: AtomicBool,
    served: Mutex<Option<(GuestRam, Vec<Served>)>>,
    /// Pairs of rings that are to be served, a bit each; of those that are not, the back end has the rings alone.
    enabled: AtomicU64,
    /// One for each pair: the back end signals it when it finds a ring that breaks the rules.
    broken: Vec<Event>,
}

impl FrontEnd {
    /// Connects to who listens at `path`, and agrees with it on the protocol, and on `pairs` pairs of queues (64 at most).
    ///
    /// # Errors
    /// [`Error`]
    pub fn connect(path: &Path, pairs: u16) -> Result<Self, Error> {
        let refused = |source| Error::Connect { path: path.to_owned(), source };
        planted::check(path).map_err(refused)?;
        let kind = std::fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_socket() {
            return Err(Error::NotASocket { path: path.to_owned() });
        }
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // A listener that does not come round to us is an error, too, and not waited for.
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            io::Result::Ok(socket)
        };
        let mut front_end = Self {
            socket: open().map_err(refused)?,
            path: path.to_owned(),
            features: 0,
            protocol: 0,
            up: AtomicBool::new(true),
            served: Mutex::default(),
            enabled: AtomicU64::new(1),
            broken: (0..pairs).map(|_| Event::new()).collect::<Result<_, _>>().map_err(Error::Host)?,
        };
        let most = front_end.agree().map_err(|source| Error::Talk { path: path.to_owned(), source })?;
        if front_end.features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Legacy { path: path.to_owned() });
        }
        if u64::from(pairs) > most {
            return Err(Error::Queues { path: path.to_owned(), most, asked: pairs });
        }
        Ok(front_end)
    }

    /// How many pairs of queues it serves.
    fn agree(&mut self) -> io::Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        let mut most = 1;
        self.features = self.ask(Request::GetFeatures, &[], deadline)?;
        if self.features & PROTOCOL_FEATURES != 0 {
            let theirs: u64 = self.ask(Request::GetProtocolFeatures, &[], deadline)?;
            let several = self.broken.len() > 1;
            let agreed = theirs & (REPLY_ACK | if several { MQ } else { 0 });
            self.set(Request::SetProtocolFeatures, agreed.as_bytes(), &[], deadline)?;
            self.protocol = agreed;
            if agreed & MQ != 0 {
                most = self.ask(Request::GetQueueNum, &[], deadline)?;
            }
        }
        self.set(Request::SetOwner, &[], &[], deadline)?;
        Ok(most)
    }

    /// The feature bits of virtio, of the device and of its rings, that the back end knows.
    pub fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// Whether the back end is there. Once false it stays so.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    /// Readable when the back end is gone, or has become so.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Of each pair, what is readable when one of its rings has been found broken.
    pub fn broken(&self) -> &[Event] {
        &self.broken
    }

    /// Has the rings of `pair` served from now on, or no more.
    pub fn set_enabled(&self, pair: usize, on: bool) {
        let bit = 1u64.checked_shl(pair as u32).unwrap_or(0);
        let before = match on {
            true => self.enabled.fetch_or(bit, Ordering::SeqCst),
            false => self.enabled.fetch_and(!bit, Ordering::SeqCst),
        };
        if on == (before & bit != 0) || self.features & PROTOCOL_FEATURES == 0 {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        let served = self.served();
        let rings = served.iter().flat_map(|(_, rings)| rings).filter(|ring| pair_of(ring.index) == pair);
        for Served { index, .. } in rings.filter(|_| self.is_up()) {
            if let Err(error) = self.enable(*index, on, deadline) {
                self.give_up(&error.to_string());
            }
        }
    }

    fn enable(&self, index: u32, on: bool, deadline: Instant) -> io::Result<()> {
        self.set(Request::SetVringEnable, State { index, num: on.into() }.as_bytes(), &[], deadline)
    }

    /// Looks what has come on [`FrontEnd::fd`]: a back end says nothing unasked, so that this can only be its end.
    pub fn look(&self) {
        match recv(&self.socket, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok((_, 0)) => self.give_up("it has hung up"),
            Ok(_) => self.give_up("it speaks unasked"),
            Err(error) => self.give_up(&error.to_string()),
        }
    }

    /// Has the back end serve `rings`, each with its index, as agreed by `features`. Without effect if it is gone, or goes.
    ///
    /// # Errors
    /// A ring lies outside of guest memory, or guest memory is nothing that can be shared. The back end has heard nothing then.
    pub fn start(&self, ram: &GuestRam, features: u64, rings: &[(u32, Ring<'_>)]) -> io::Result<()> {
        let inside = |(at, len)| memory::host_address(ram, at, len).is_some();
        if !rings.iter().flat_map(|(_, ring)| ring.parts()).all(inside) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a ring outside of guest memory"));
        }
        let (regions, descriptors) = table(ram)?;
        if !self.is_up() {
            return Ok(());
        }
        let served = rings.iter().map(|(index, ring)| Served { index: *index, used: ring.used }).collect();
        *self.served() = Some((ram.clone(), served));
        if let Err(error) = self.try_start(&regions, &descriptors, features, rings) {
            self.give_up(&error.to_string());
        }
        Ok(())
    }

    fn try_start(
        &self,
        regions: &[Region],
        descriptors: &[BorrowedFd<'_>],
        features: u64,
        rings: &[(u32, Ring<'_>)],
    ) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let set = |request, payload: &[u8], descriptors: &[BorrowedFd<'_>]| {
            self.set(request, payload, descriptors, deadline)
        };
        let features = features & self.features | self.features & PROTOCOL_FEATURES;
        set(Request::SetFeatures, features.as_bytes(), &[])?;
        let table = [&(regions.len() as u64).to_ne_bytes()[..], regions.as_bytes()].concat();
        set(Request::SetMemTable, &table, descriptors)?;
        for (index, ring) in rings {
            let index = *index;
            let state = |num: u16| State { index, num: num.into() };
            let addresses = Addresses {
                index,
                flags: 0,
                descriptors: ring.descriptors,
                used: ring.used,
                available: ring.available,
                log: 0,
            };
            set(Request::SetVringNum, state(ring.size).as_bytes(), &[])?;
            set(Request::SetVringBase, state(ring.next).as_bytes(), &[])?;
            set(Request::SetVringAddr, addresses.as_bytes(), &[])?;
            let number = u64::from(index);
            if let Some(broken) = self.broken.get(pair_of(index)) {
                set(Request::SetVringErr, number.as_bytes(), &[broken.as_fd()])?;
            }
            set(Request::SetVringCall, number.as_bytes(), &[ring.call])?;
            set(Request::SetVringKick, number.as_bytes(), &[ring.kick])?;
        }
        // Without the protocol's features a ring is enabled from its first kick on.
        if self.features & PROTOCOL_FEATURES != 0 {
            let enabled = self.enabled.load(Ordering::SeqCst);
            for (index, _) in rings.iter().filter(|(index, _)| enabled >> pair_of(*index) & 1 != 0) {
                self.enable(*index, true, deadline)?;
            }
        }
        Ok(())
    }

    /// Takes the rings back. Of each, the index of the next available entry; where a back end that is gone does not tell it, that of
    /// the next used one, for it may not have finished more than that.
    ///
    /// A back end that does not answer is cut off, and may still hold guest memory.
    pub fn stop(&self) -> Vec<(u32, u16)> {
        let Some((ram, rings)) = self.served().take() else { return Vec::new() };
        let deadline = Instant::now() + PATIENCE;
        let next = |ring: &Served| {
            let index = ring.index;
            if self.is_up() {
                match self.ask::<State>(Request::GetVringBase, State { index, num: 0 }.as_bytes(), deadline) {
                    Ok(State { index: of, num }) if of == index && num <= u16::MAX.into() => {
                        return (index, num as u16);
                    }
                    Ok(state) => self.give_up(&format!("ring {index} is answered by {state:?}")),
                    Err(error) => self.give_up(&error.to_string()),
                }
            }
            let used = ram.read_obj::<[u8; 2]>(GuestAddress(ring.used.saturating_add(2)));
            (index, used.map_or(0, u16::from_le_bytes))
        };
        rings.iter().map(next).collect()
    }

    fn served(&self) -> MutexGuard<'_, Option<(GuestRam, Vec<Served>)>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The back end is gone, or cannot be relied on.
    fn give_up(&self, why: &str) {
        if self.up.swap(false, Ordering::SeqCst) {
            log::warn!("vhost-user back end {}: {why}: it serves no more", self.path.display());
            // Whoever waits on the descriptor hears of it.
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
    }

    /// A request that has an answer.
    fn ask<T: IntoBytes + zerocopy::FromBytes + Default>(
        &self,
        request: Request,
        payload: &[u8],
        deadline: Instant,
    ) -> io::Result<T> {
        message::send(&self.socket, request, payload, &[], false, deadline)?;
        message::answer(&self.socket, request, deadline)
    }

    /// A request without one, but for that it was done.
    fn set(
        &self,
        request: Request,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        let acknowledged = self.protocol & REPLY_ACK != 0;
        message::send(&self.socket, request, payload, descriptors, acknowledged, deadline)?;
        match acknowledged.then(|| message::answer(&self.socket, request, deadline)).transpose()? {
            None | Some(0u64) => Ok(()),
            Some(_) => Err(io::Error::other(format!("{request:?} is refused"))),
        }
    }
}

/// The pair that a ring is of.
fn pair_of(index: u32) -> usize {
    index as usize / 2
}

/// Guest memory as the back end maps it. Its addresses are the guest's own: those of this process are none of its business.
fn table(ram: &GuestRam) -> io::Result<(Vec<Region>, Vec<BorrowedFd<'_>>)> {
    let (mut regions, mut descriptors) = (Vec::new(), Vec::new());
    for region in ram.iter() {
        let Some(file) = memory::shared_object(region) else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "guest memory is not shared"));
        };
        let guest_address = region.start_addr().0;
        regions.push(Region {
            guest_address,
            size: region.len(),
            user_address: guest_address,
            mmap_offset: file.start(),
        });
        descriptors.push(file.file().as_fd());
    }
    if regions.len() > MOST_DESCRIPTORS {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "guest memory has too many regions"));
    }
    Ok((regions, descriptors))
}
