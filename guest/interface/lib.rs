//! Sets up a guest's network interfaces from inside, without programs or a libc: what PID 1 does before anything else runs, and
//! the agent when the host says so. And what else of the host's is in a guest: its folders ([`share`]), and the sockets by which the
//! guest's programs meet the host's ([`vsock`]).
//!
//! [`Ip`] is the kernel's own `ip=` parameter (Documentation/admin-guide/nfs/nfsroot.rst), which kernels without CONFIG_IP_PNP
//! leave to user space. By the classic ioctls of sockets (netdevice(7)); IPv4 alone. No heap.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod share;
pub mod vsock;

use core::net::Ipv4Addr;

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

// linux/sockios.h
const SIOCADDRT: Opcode = 0x890b;
const SIOCDELRT: Opcode = 0x890c;
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891c;

const IFF_UP: u8 = 1;
const RTF_UP_GATEWAY: u16 = 1 | 2;

/// `struct sockaddr_in`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Address {
    family: u16,
    port: u16,
    address: [u8; 4],
    zero: [u8; 8],
}

impl Address {
    fn new(address: Ipv4Addr) -> Self {
        Self { family: AddressFamily::INET.as_raw(), address: address.octets(), ..Self::default() }
    }
}

/// `struct ifreq` with an address in its union.
#[repr(C)]
struct Request {
    name: [u8; 16],
    address: Address,
    rest: [u8; 8],
}

/// `struct rtentry` (linux/route.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Route {
    pad1: u64,
    destination: Address,
    gateway: Address,
    mask: Address,
    flags: u16,
    pad2: i16,
    pad3: u64,
    pad4: u64,
    metric: i16,
    device: u64,
    mtu: u64,
    window: u64,
    timeout: u16,
}

/// The set-up of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip<'a> {
    /// Its address.
    pub address: Ipv4Addr,
    /// Of its network.
    pub mask: Ipv4Addr,
    /// The way to all others.
    pub gateway: Option<Ipv4Addr>,
    /// Its name; eth0 if the parameter has none.
    pub device: &'a [u8],
    /// Who resolves names.
    pub dns: Option<Ipv4Addr>,
}

impl<'a> Ip<'a> {
    /// Reads `CLIENT:SERVER:GATEWAY:NETMASK:HOST:DEVICE:AUTOCONF:DNS`, whose parts may be left empty and, at the end, out. `None` if it
    /// has no address, or none that is one: it asks for DHCP (`ip=dhcp`) or for nothing.
    pub fn parse(text: &'a [u8]) -> Option<Self> {
        let mut parts = text.split(|byte| *byte == b':');
        let address = address(parts.next()?)?;
        let [_server, gateway, mask, _host, device, _autoconf, dns] =
            core::array::from_fn(|_| parts.next().unwrap_or_default());
        let device = if device.is_empty() { b"eth0" } else { device };
        // As the kernel has it: the class of the address decides.
        let class = || match address.octets()[0] {
            0..128 => Ipv4Addr::new(255, 0, 0, 0),
            128..192 => Ipv4Addr::new(255, 255, 0, 0),
            _ => Ipv4Addr::new(255, 255, 255, 0),
        };
        let mask = self::address(mask).unwrap_or_else(class);
        Some(Self { address, mask, gateway: self::address(gateway), device, dns: self::address(dns) })
    }

    /// Gives the interface its address, brings it up, and has its way to all others lead to the gateway, if there is one. What the
    /// kernel has done already is no error.
    ///
    /// # Errors
    /// There is no such interface, or the kernel refuses.
    pub fn set_up(&self) -> Result<(), Errno> {
        let socket = control()?;
        let request = |address| Request::new(self.device, Address::new(address));
        // SAFETY: these requests read a struct ifreq with an address.
        unsafe {
            ioctl(&socket, Setter::<SIOCSIFADDR, _>::new(request(self.address)))?;
            ioctl(&socket, Setter::<SIOCSIFNETMASK, _>::new(request(self.mask)))?;
        }
        bring_up(&socket, self.device)?;
        let Some(gateway) = self.gateway else { return Ok(()) };
        let any = Address::new(Ipv4Addr::UNSPECIFIED);
        let device = Request::new(self.device, any).name;
        let old = Route { destination: any, mask: any, device: device.as_ptr() as u64, ..Route::default() };
        // SAFETY: SIOCDELRT reads a struct rtentry, and by its pointer a name that ends with NUL and lives over the call.
        while unsafe { ioctl(&socket, Setter::<SIOCDELRT, _>::new(old)) }.is_ok() {}
        let gateway = Address::new(gateway);
        let route = Route { destination: any, gateway, mask: any, flags: RTF_UP_GATEWAY, ..Route::default() };
        // SAFETY: SIOCADDRT reads a struct rtentry; without a device's name its pointer is null.
        match unsafe { ioctl(&socket, Setter::<SIOCADDRT, _>::new(route)) } {
            Err(Errno::EXIST) => Ok(()),
            added => added,
        }
    }
}

impl Request {
    fn new(name: &[u8], address: Address) -> Self {
        let mut request = Self { name: [0; 16], address, rest: [0; 8] };
        // One byte stays for the end of the text: a longer name is that of no interface.
        request.name[..15].iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        request
    }
}

/// Sets the loopback interface up: programs expect 127.0.0.1 to be there. A kernel without a network has none.
///
/// # Errors
/// The kernel refuses, or has no network.
pub fn start_loopback() -> Result<(), Errno> {
    bring_up(control()?, b"lo")
}

fn control() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
}

fn bring_up(socket: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    let mut request = Request::new(name, Address::default());
    // SAFETY: the request writes the interface's flags where the union begins, which is the family's place.
    unsafe { ioctl(&socket, Updater::<SIOCGIFFLAGS, _>::new(&mut request)) }?;
    request.address.family |= u16::from(IFF_UP);
    // SAFETY: the request reads them from there.
    unsafe { ioctl(&socket, Setter::<SIOCSIFFLAGS, _>::new(request)) }
}

fn address(text: &[u8]) -> Option<Ipv4Addr> {
    core::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_parameter_is_read_as_the_kernel_reads_it() {
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        let all = Ip::parse(b"10.0.2.15::10.0.2.2:255.255.255.0:guest:eth1:off:10.0.2.3").unwrap();
        assert_eq!((all.address, all.mask), (address("10.0.2.15"), address("255.255.255.0")));
        assert_eq!((all.gateway, all.dns), (Some(address("10.0.2.2")), Some(address("10.0.2.3"))));
        assert_eq!(all.device, b"eth1");
        let short = Ip::parse(b"192.168.1.9").unwrap();
        assert_eq!((short.mask, short.gateway, short.device), (address("255.255.255.0"), None, &b"eth0"[..]));
        assert_eq!(Ip::parse(b"10.1.1.1:::").unwrap().mask, address("255.0.0.0"));
        for none in ["", "dhcp", "off", ":::::eth0:dhcp", "1.2.3", "10.0.0.256::10.0.0.1"] {
            assert_eq!(Ip::parse(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn structures_have_the_kernels_size() {
        assert_eq!((size_of::<Request>(), size_of::<Route>()), (40, 120));
    }

    #[test]
    fn an_interface_that_is_not_there_is_an_error() {
        let ip = Ip::parse(b"10.9.9.9:::255.255.255.0::nosuch0").unwrap();
        assert!(ip.set_up().is_err());
    }
}
