//! Requests that are done at once: facts, time, randomness, the host name, a network interface, the end.

use std::{fs, io, thread};

use interface::Ip;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::ioctl::{self, Setter, opcode};
use rustix::process::{Pid, Signal, kill_process};
use rustix::system::{sethostname, sysinfo, uname};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::sync::atomic::Ordering;
use vmm_agent::protocol::{Exec, Facts, Network};

use crate::listen::{SESSIONS, STACK};
use crate::process;

const RESOLVERS: &str = "/etc/resolv.conf";
const RESOLVERS_NEW: &str = "/etc/resolv.conf.vmm-agent";

/// The most that is mixed in at once: the pool has 256 bits, so this is more than enough.
const MAX_SEED: usize = 512;

pub fn facts() -> Facts {
    let names = uname();
    Facts {
        kernel: names.release().to_bytes().to_vec(),
        hostname: names.nodename().to_bytes().to_vec(),
        uptime: u64::try_from(sysinfo().uptime).unwrap_or(0),
        sessions: SESSIONS.load(Ordering::Relaxed),
    }
}

pub fn set_time(nanoseconds: u64) -> io::Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let time = Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX),
        tv_nsec: (nanoseconds % SECOND) as i64,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// Sets the clock, unless it is right as far as anybody can tell: `nanoseconds` was now when the message left, which may have been on
/// its way for as long as its sender waits. A clock that is right is not to be set back by that.
pub fn correct_time(nanoseconds: u64) -> io::Result<()> {
    const ON_ITS_WAY: u64 = 60 * 1_000_000_000;
    let now = clock_gettime(ClockId::Realtime);
    let now = u64::try_from(i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)).unwrap_or(0);
    match (nanoseconds..nanoseconds.saturating_add(ON_ITS_WAY)).contains(&now) {
        true => Ok(()),
        false => set_time(nanoseconds),
    }
}

pub fn set_hostname(name: &[u8]) -> io::Result<()> {
    Ok(sethostname(name)?)
}

/// Sets an interface up, and who resolves names. What was there of either is gone, unless it fails: what is likely to is done before
/// anything changes.
pub fn set_network(network: &Network) -> io::Result<()> {
    let mask = u32::MAX.checked_shl(32 - u32::from(network.bits)).unwrap_or(0);
    let &Network { address, gateway, dns, .. } = network;
    // The kernel would refuse it only once the address is set and the old way is gone.
    if let Some(gateway) = gateway
        && (u32::from(gateway) ^ u32::from(address)) & mask != 0
    {
        let what = format!("gateway {gateway} is outside the network {address}/{}", network.bits);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    if let Some(dns) = dns {
        // An initramfs may have none.
        fs::create_dir_all("/etc").map_err(about_resolvers)?;
        fs::write(RESOLVERS_NEW, format!("nameserver {dns}\n")).map_err(about_resolvers)?;
    }
    let set_up = Ip { address, mask: mask.into(), gateway, device: &network.device, dns }.set_up();
    if dns.is_none() {
        return Ok(set_up?);
    }
    if let Err(error) = set_up {
        let _ = fs::remove_file(RESOLVERS_NEW);
        return Err(error.into());
    }
    // In place of a link, too: what it leads to belongs to a service.
    fs::rename(RESOLVERS_NEW, RESOLVERS).map_err(about_resolvers)
}

/// What became of an interface is told by its name; this is about a file.
fn about_resolvers(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("write {RESOLVERS}: {error}"))
}

/// Has the guest's init power off: by its own program, which each has, else as busybox's init takes it.
pub fn shut_down() -> io::Result<()> {
    let exec = Exec { argv: vec![b"poweroff".to_vec()], ..Exec::default() };
    match process::start(&exec) {
        Ok(started) => {
            // With its streams, whose ends it may not find closed: it has something to say about systems without D-Bus.
            let reap = move || {
                let mut started = started;
                let _ = started.child.wait();
            };
            thread::Builder::new().stack_size(STACK).spawn(reap).map(drop)
        }
        Err(_) => Ok(kill_process(Pid::INIT, Signal::USR2)?),
    }
}

/// `struct rand_pool_info` (linux/random.h), with its buffer at the full size.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    buffer: [u8; MAX_SEED],
}

/// Mixes `seed` into the pool as full entropy and has the generator begin anew with it: what a guest needs that was copied while it
/// ran.
pub fn reseed(seed: &[u8]) -> io::Result<()> {
    const ADD_ENTROPY: ioctl::Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
    const RESEED: ioctl::Opcode = opcode::none(b'R', 0x07);
    let mut info = PoolInfo { entropy_bits: 0, size: 0, buffer: [0; MAX_SEED] };
    let Some(buffer) = info.buffer.get_mut(..seed.len()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("more than {MAX_SEED} bytes")));
    };
    buffer.copy_from_slice(seed);
    info.size = seed.len() as i32;
    info.entropy_bits = info.size * 8;
    let pool = open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: RNDADDENTROPY takes a rand_pool_info and reads as many bytes after its head as that says, which are there.
    unsafe { ioctl::ioctl(pool.as_fd(), Setter::<ADD_ENTROPY, PoolInfo>::new(info)) }?;
    // SAFETY: RNDRESEEDCRNG takes nothing.
    unsafe { ioctl::ioctl(pool.as_fd(), ioctl::NoArg::<RESEED>::new()) }?;
    Ok(())
}
