//! A tap: a network interface of the host's whose other end is ours. One [`Tap`] per queue.
//!
//! It takes and gives frames with the header of virtio-net in front, so what a guest leaves to the other side (checksums, cutting
//! into segments) goes on to the host's network, and as often as not to the hardware.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{Error, HEADER, Head, MAX_FRAME, Offloads, Wire};
use crate::memory::{Buffers, Slices};

/// `struct ifreq`: an interface's name, and what a request says of it.
#[repr(C, align(8))]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: [u8; 24],
}

impl Request {
    fn new(name: &str, data: &[u8]) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], data: [0; 24] };
        // The configuration allows 15 bytes.
        let len = name.len().min(libc::IFNAMSIZ - 1);
        request.name[..len].copy_from_slice(&name.as_bytes()[..len]);
        request.data[..data.len()].copy_from_slice(data);
        request
    }

    fn flags(&self) -> libc::c_int {
        u16::from_ne_bytes([self.data[0], self.data[1]]).into()
    }

    fn issue(&mut self, fd: impl AsFd, request: libc::Ioctl) -> io::Result<()> {
        // SAFETY: the requests that this file makes with it take a struct ifreq, whose size and alignment it has.
        checked(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, std::ptr::from_mut(self)) })
    }
}

/// An ioctl whose argument is a number.
fn set(fd: &OwnedFd, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument as a number.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The flags that the tap behind `fd` was made with; `None` if it is no tap.
pub fn flags(fd: &OwnedFd) -> Option<libc::c_int> {
    let mut request = Request::new("", &[]);
    request.issue(fd, libc::TUNGETIFF).ok()?;
    let name = request.name.split(|byte| *byte == 0).next().and_then(|name| str::from_utf8(name).ok());
    // TUNGETIFF puts IFF_NOFILTER, of the same value, over IFF_NO_PI. A macvtap has its flags from there alone.
    let flags = name.and_then(flags_of).unwrap_or(request.flags());
    (flags & libc::IFF_TAP != 0).then_some(flags)
}

/// The flags of interface `name`, if it is a tap or tun of this network namespace.
fn flags_of(name: &str) -> Option<libc::c_int> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/tun_flags")).ok()?;
    libc::c_int::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// Opens `queues` queues of the tap called `name`. One that is not there is made, where that is allowed, with `mtu`, and brought up;
/// it goes with the last of its queues.
pub fn open(name: &str, queues: u16, mtu: Option<u16>) -> Result<Vec<Tap>, Error> {
    let failed = |what| move |source| Error::Tap { name: name.to_owned(), what, source };
    let there = fs::symlink_metadata(format!("/sys/class/net/{name}")).is_ok();
    let mut multi_queue = queues > 1;
    if there {
        // As `ip tuntap add` made it: flags that differ are refused without a word of why.
        let Some(flags) = flags_of(name).filter(|flags| flags & libc::IFF_TAP != 0) else {
            return Err(Error::NotATap { name: name.to_owned() });
        };
        if multi_queue && flags & libc::IFF_MULTI_QUEUE == 0 {
            return Err(Error::OneQueue { name: name.to_owned(), queues });
        }
        multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
    }
    let multi = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi) as u16;
    let mut taps = Vec::new();
    for _ in 0..queues {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.map_err(|source| Error::Tun { name: name.to_owned(), source })?;
        let mut request = Request::new(name, &flags.to_ne_bytes());
        request.issue(&file, libc::TUNSETIFF).map_err(|source| {
            let name = name.to_owned();
            match source.raw_os_error() {
                Some(libc::EPERM) if there => Error::NotOurs { name },
                Some(libc::EPERM) => Error::Missing { name },
                Some(libc::EBUSY) => Error::Busy { kind: "tap", name },
                _ => Error::Tap { name, what: "open", source },
            }
        })?;
        taps.push(Tap::new(file.into(), true).map_err(failed("set up"))?);
    }
    if !there {
        let control = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        let control = control.map_err(|error| failed("bring up")(error.into()))?;
        if let Some(mtu) = mtu {
            let mut request = Request::new(name, &i32::from(mtu).to_ne_bytes());
            request.issue(&control, libc::SIOCSIFMTU as libc::Ioctl).map_err(failed("set the MTU of"))?;
        }
        let mut request = Request::new(name, &[]);
        request.issue(&control, libc::SIOCGIFFLAGS as libc::Ioctl).map_err(failed("bring up"))?;
        let up = request.flags() as u16 | libc::IFF_UP as u16;
        request.data[..2].copy_from_slice(&up.to_ne_bytes());
        request.issue(&control, libc::SIOCSIFFLAGS as libc::Ioctl).map_err(failed("bring up"))?;
    }
    Ok(taps)
}

/// A tap's queue.
pub struct Tap {
    fd: OwnedFd,
    /// Its frames have a header.
    header: bool,
    offloads: Offloads,
    attached: bool,
    up: bool,
    refused: bool,
}

/// What the kernel calls them.
const OFFLOADS: [(Offloads, libc::c_uint); 6] = [
    (Offloads::CSUM, libc::TUN_F_CSUM),
    (Offloads::TSO4, libc::TUN_F_TSO4),
    (Offloads::TSO6, libc::TUN_F_TSO6),
    (Offloads::ECN, libc::TUN_F_TSO_ECN),
    (Offloads::USO4, libc::TUN_F_USO4),
    (Offloads::USO6, libc::TUN_F_USO6),
];

impl Tap {
    fn new(fd: OwnedFd, header: bool) -> io::Result<Self> {
        let mut tap =
            Self { fd, header, offloads: Offloads::empty(), attached: true, up: true, refused: false };
        if header {
            let size = HEADER as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads an int.
            checked(unsafe { libc::ioctl(tap.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })?;
            // Kernels before 6.2 do no UDP.
            let udp = Offloads::USO4 | Offloads::USO6;
            let possible = [Offloads::all(), Offloads::all() - udp];
            let found = possible.into_iter().find(|offloads| tap.set_offloads(*offloads).is_ok());
            tap.offloads = found.unwrap_or_default();
            tap.set_offloads(Offloads::empty())?;
        }
        Ok(tap)
    }

    /// One that was passed to us, made with `flags`.
    pub fn passed(fd: OwnedFd, flags: libc::c_int) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Self::new(fd, flags & libc::IFF_VNET_HDR != 0)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let flags = OFFLOADS.iter().filter(|(offload, _)| offloads.contains(*offload));
        set(&self.fd, libc::TUNSETOFFLOAD, flags.fold(0, |all, (_, flag)| all | libc::c_ulong::from(*flag)))
    }

    fn lose(&mut self, error: &io::Error) {
        log::warn!("tap: {error}: the link is down");
        self.up = false;
    }
}

/// The interface is gone, not just down.
fn is_the_end(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

impl Wire for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn is_up(&self) -> bool {
        self.up
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn accept(&mut self, offloads: Offloads) {
        // The kernel refuses what it does not do, and what stands without CSUM; both are not offered.
        if self.header
            && self.attached
            && let Err(error) = self.set_offloads(offloads & self.offloads)
        {
            log::warn!("tap: set offloads {offloads:?}: {error}");
        }
    }

    fn set_attached(&mut self, on: bool) {
        if self.attached == on {
            return;
        }
        let flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE } as u16;
        match Request::new("", &flags.to_ne_bytes()).issue(&self.fd, libc::TUNSETQUEUE) {
            Ok(()) => self.attached = on,
            Err(error) => log::warn!("tap: {} a queue: {error}", if on { "attach" } else { "detach" }),
        }
    }

    fn look(&mut self) {
        if self.up
            && let Err(error) = Request::new("", &[]).issue(&self.fd, libc::TUNGETIFF)
            && is_the_end(&error)
        {
            self.lose(&error);
        }
    }

    fn send(&mut self, header: &[u8; HEADER], frame: &Buffers) -> bool {
        let slices = Slices::of([frame], 0);
        if !self.up || !self.attached || !slices.is_whole() || slices.len() > MAX_FRAME {
            self.refused = true;
            return true;
        }
        match slices.write_to(&self.fd, if self.header { header } else { &[] }) {
            Ok(_) => return true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) if is_the_end(&error) => self.lose(&error),
            // The interface is down, or the frame makes no sense to the host: it is lost.
            Err(error) => log::debug!("tap: a frame of {} bytes is dropped: {error}", slices.len()),
        }
        self.refused = true;
        true
    }

    fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    fn receive(&mut self, head: &mut Head, rest: &Slices) -> Option<usize> {
        if !self.up || !self.attached {
            return None;
        }
        *head = Head::default();
        let Head { header, start } = head;
        let own = if self.header { HEADER } else { 0 };
        // A byte more than there is room for tells a frame that was cut from one that fits.
        let mut over = [0];
        let read = rest.read_from(&self.fd, &mut [&mut header[..own], start], usize::MAX, &mut over);
        match read {
            Ok(n) => return Some(n.saturating_sub(own)),
            Err(error) if is_the_end(&error) => self.lose(&error),
            Err(_) => {}
        }
        None
    }
}
