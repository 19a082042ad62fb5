//! [`Kernel`]: the host's kernel as who serves rings (linux/vhost.h), whatever kind of device they are of.
//!
//! One descriptor for each set of rings, with a thread of the kernel's behind it. It is told where guest memory is mapped, and uses
//! that while a back end of the kind's is set: whoever sets it keeps the memory mapped until it is none.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::ioctl::{Opcode, opcode};

use super::Ring;
use crate::event_loop::Event;
use crate::memory::{self, GuestRam};

/// The magic number of its requests.
const VHOST: u8 = 0xaf;

/// `struct vhost_vring_state`: a number, of a ring.
#[repr(C)]
struct State {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`: a descriptor, of a ring. -1 is none.
#[repr(C)]
struct File {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`: a ring's parts, where they are in this process.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest_address: u64,
    size: u64,
    host_address: u64,
    padding: u64,
}

/// `struct vhost_memory` with room for as many regions as guest memory has at most; its request's number knows of none.
#[repr(C)]
struct Regions {
    count: u32,
    padding: u32,
    regions: [Region; 4],
}

const GET_FEATURES: Opcode = opcode::read::<u64>(VHOST, 0x00);
const SET_FEATURES: Opcode = opcode::write::<u64>(VHOST, 0x00);
const SET_OWNER: Opcode = opcode::none(VHOST, 0x01);
const SET_MEM_TABLE: Opcode = opcode::write::<u64>(VHOST, 0x03);
const SET_VRING_NUM: Opcode = opcode::write::<State>(VHOST, 0x10);
const SET_VRING_ADDR: Opcode = opcode::write::<Addresses>(VHOST, 0x11);
const SET_VRING_BASE: Opcode = opcode::write::<State>(VHOST, 0x12);
const GET_VRING_BASE: Opcode = opcode::read_write::<State>(VHOST, 0x12);
const SET_VRING_KICK: Opcode = opcode::write::<File>(VHOST, 0x20);
const SET_VRING_CALL: Opcode = opcode::write::<File>(VHOST, 0x21);
const SET_VRING_ERR: Opcode = opcode::write::<File>(VHOST, 0x22);
const NET_SET_BACKEND: Opcode = opcode::write::<File>(VHOST, 0x30);
const VSOCK_SET_GUEST_CID: Opcode = opcode::write::<u64>(VHOST, 0x60);
const VSOCK_SET_RUNNING: Opcode = opcode::write::<libc::c_int>(VHOST, 0x61);

/// The kernel's end of two rings.
#[derive(Debug)]
pub struct Kernel {
    fd: OwnedFd,
    features: u64,
}

impl Kernel {
    /// The driver at `path`, for the memory of this process.
    ///
    /// # Errors
    /// What was tried of it, and what the host said: there is no such driver, or not for this user.
    pub fn open(path: &str) -> Result<Self, (&'static str, io::Error)> {
        let failed = |what| move |source| (what, source);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed("open"))?;
        let mut kernel = Self { fd: file.into(), features: 0 };
        let mut features = 0u64;
        // SAFETY: SET_OWNER takes nothing.
        unsafe { kernel.issue(SET_OWNER, std::ptr::null_mut::<u8>()) }.map_err(failed("own"))?;
        // SAFETY: GET_FEATURES writes a u64.
        unsafe { kernel.issue(GET_FEATURES, &raw mut features) }.map_err(failed("ask"))?;
        kernel.features = features;
        Ok(kernel)
    }

    /// The feature bits of virtio and of its rings that the kernel knows here.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Tells of `rings`, as agreed by `features`, in `ram`. One that breaks the rules will signal `broken`. Nothing is served yet.
    ///
    /// # Errors
    /// The kernel refuses: a ring outside of guest memory, say.
    pub fn tell(
        &self,
        ram: &GuestRam,
        features: u64,
        rings: &[Option<Ring<'_>>; 2],
        broken: &Event,
    ) -> io::Result<()> {
        let features = features & self.features;
        self.set(SET_FEATURES, &features)?;
        self.set_memory(ram)?;
        for (ring, index) in rings.iter().zip(0..) {
            let Some(ring) = ring else { continue };
            let at = |(address, len)| {
                memory::host_address(ram, address, len).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
            };
            let [descriptors, used, available] = ring.parts().map(at);
            let addresses = Addresses {
                index,
                flags: 0,
                descriptors: descriptors?,
                used: used?,
                available: available?,
                log: 0,
            };
            let Ring { size, next, kick, call, .. } = *ring;
            self.set(SET_VRING_NUM, &State { index, num: size.into() })?;
            self.set(SET_VRING_BASE, &State { index, num: next.into() })?;
            self.set(SET_VRING_ADDR, &addresses)?;
            self.set(SET_VRING_ERR, &File { index, fd: broken.as_fd().as_raw_fd() })?;
            self.set(SET_VRING_CALL, &File { index, fd: call.as_raw_fd() })?;
            self.set(SET_VRING_KICK, &File { index, fd: kick.as_raw_fd() })?;
        }
        Ok(())
    }

    /// Where the kernel has come to in each ring: the index of the next available entry, which all before have been used. Nothing is
    /// served any more.
    ///
    /// # Errors
    /// The kernel refuses: never seen.
    pub fn next(&self) -> io::Result<[u16; 2]> {
        let mut next = [0; 2];
        for (next, index) in next.iter_mut().zip(0..) {
            let mut state = State { index, num: 0 };
            // SAFETY: GET_VRING_BASE reads and writes a struct vhost_vring_state.
            unsafe { self.issue(GET_VRING_BASE, &raw mut state) }?;
            *next = state.num as u16;
        }
        Ok(next)
    }

    /// vhost-net: serves ring `index` on `tap`, or no longer. When this returns, the kernel has let go of what it no longer serves.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_tap(&self, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set(NET_SET_BACKEND, &File { index, fd: tap.map_or(-1, |tap| tap.as_raw_fd()) })
    }

    /// vhost-vsock: the guest's address.
    ///
    /// # Errors
    /// Another guest has it.
    pub fn set_guest_cid(&self, cid: u32) -> io::Result<()> {
        self.set(VSOCK_SET_GUEST_CID, &u64::from(cid))
    }

    /// vhost-vsock: serves both rings, or no longer. When this returns, the kernel has let go of what it no longer serves.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_running(&self, on: bool) -> io::Result<()> {
        self.set(VSOCK_SET_RUNNING, &libc::c_int::from(on))
    }

    fn set_memory(&self, ram: &GuestRam) -> io::Result<()> {
        let mut table = Regions { count: 0, padding: 0, regions: Default::default() };
        for (guest_address, host, size) in memory::slots(ram) {
            let region = table.regions.get_mut(table.count as usize).ok_or(io::ErrorKind::OutOfMemory)?;
            *region = Region { guest_address, size, host_address: host.addr() as u64, padding: 0 };
            table.count += 1;
        }
        self.set(SET_MEM_TABLE, &table)
    }

    /// A request that reads `value`, which is of its type.
    fn set<T>(&self, request: Opcode, value: &T) -> io::Result<()> {
        // SAFETY: the callers, all in this file, pass what linux/vhost.h says that the request reads.
        unsafe { self.issue(request, std::ptr::from_ref(value).cast_mut()) }
    }

    /// # Safety
    /// `value` is what the request reads and writes.
    unsafe fn issue<T>(&self, request: Opcode, value: *mut T) -> io::Result<()> {
        // SAFETY: as the caller says.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as libc::Ioctl, value) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
