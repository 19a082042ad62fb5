//! File systems, modules and the switch to another root, without a heap: paths and small files live in fixed buffers.

use crate::console::{complain, say};
use crate::orders::Orders;
use core::ffi::CStr;
use core::net::Ipv4Addr;
use interface::Ip;
use rustix::fs::{Mode, OFlags, Timespec, mkdir, open, symlink};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use rustix::path::Arg;

/// Whom programs ask for names, and where that is said for a root that is read-only.
const RESOLVERS: &CStr = c"/etc/resolv.conf";
const RESOLVERS_BESIDE: &CStr = c"/run/resolv.conf";

/// Up to `N` bytes of text; what does not fit is cut off.
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    /// Empty.
    pub const fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    /// A number in decimal.
    pub fn decimal(mut value: u32) -> Self {
        let mut digits = [0; 10];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (value % 10) as u8;
            value /= 10;
            if value == 0 {
                break;
            }
        }
        let mut text = Self::new();
        text.push(&digits[at..]);
        text
    }

    /// Appends.
    pub fn push(&mut self, more: &[u8]) {
        for (to, from) in self.bytes[self.length..].iter_mut().zip(more) {
            *to = *from;
            self.length += 1;
        }
    }

    /// What was pushed.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads a file into `buffer`, as far as it fits; a missing one is empty.
pub fn read_file<'b>(path: &CStr, buffer: &'b mut [u8]) -> &'b [u8] {
    let mut length = 0;
    if let Ok(file) = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        while let Ok(count) = rustix::io::read(&file, &mut buffer[length..]) {
            if count == 0 {
                break;
            }
            length += count;
        }
    }
    &buffer[..length]
}

/// Waits up to `milliseconds` until `path` exists.
pub fn wait_for_path(path: &[u8], milliseconds: u32) -> bool {
    const STEP_MS: u32 = 5;
    for _ in 0..=milliseconds / STEP_MS {
        if rustix::fs::access(path, rustix::fs::Access::EXISTS).is_ok() {
            return true;
        }
        if milliseconds > 0 {
            let step = Timespec { tv_sec: 0, tv_nsec: i64::from(STEP_MS) * 1_000_000 };
            let _ = rustix::event::poll(&mut [], Some(&step));
        }
    }
    false
}

/// Mounts on `target`, making it if it is missing. That something is mounted there already (the kernel may have mounted
/// /dev) is fine.
fn mount_on(kind: &CStr, target: &CStr, flags: MountFlags, data: Option<&CStr>) {
    let _ = mkdir(target, Mode::from_raw_mode(0o755));
    match mount(kind, target, kind, flags, data) {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => complain(b"mount", target.to_bytes(), error),
    }
}

/// /dev and /proc: what reading the orders and the first word on the console need.
pub fn mount_first() {
    mount_on(c"devtmpfs", c"/dev", MountFlags::NOSUID, Some(c"mode=0755"));
    mount_on(c"proc", c"/proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None);
}

/// The rest of what programs expect.
pub fn mount_rest() {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    mount_on(c"sysfs", c"/sys", plain | MountFlags::NOEXEC, None);
    mount_on(
        c"devpts",
        c"/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"mode=0620,ptmxmode=0666"),
    );
    mount_on(c"tmpfs", c"/dev/shm", plain, Some(c"mode=1777"));
    mount_on(c"tmpfs", c"/run", plain, Some(c"mode=0755"));
    mount_on(c"tmpfs", c"/tmp", plain, Some(c"mode=1777"));
    for (target, link) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"fd/0", c"/dev/stdin"),
        (c"fd/1", c"/dev/stdout"),
        (c"fd/2", c"/dev/stderr"),
    ] {
        let _ = symlink(target, link);
    }
}

/// Loads what the file at `list` lists, one path a line, in that order; one that the kernel has already is fine.
pub fn load_modules(list: &CStr) {
    let mut buffer = [0; 4096];
    let list = read_file(list, &mut buffer);
    for path in list.split(|&b| b == b'\n').filter(|path| !path.is_empty()) {
        let loaded = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::system::finit_module(&file, c"", 0));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => complain(b"load", path, error),
        }
    }
}

/// Sets up the interface that `ip=` asks for.
pub fn set_up_network(ip: &Ip<'_>) {
    let mut path = Text::<64>::new();
    path.push(b"/sys/class/net/");
    path.push(ip.device);
    // Its driver may have been loaded a moment ago.
    if !wait_for_path(path.bytes(), 2_000) {
        say(&[b"guest-init: no network interface ", ip.device]);
        return;
    }
    if let Err(error) = ip.set_up() {
        complain(b"set up", ip.device, error);
    }
}

/// Says whom to ask for names: in the file of whatever is `/` by now, or over that of a root that cannot be written.
pub fn name_resolver(dns: Ipv4Addr) {
    let mut text = Text::<64>::new();
    text.push(b"nameserver");
    for (before, number) in [b' ', b'.', b'.', b'.'].into_iter().zip(dns.octets()) {
        text.push(&[before]);
        text.push(Text::<10>::decimal(number.into()).bytes());
    }
    text.push(b"\n");
    let write = |path: &CStr| {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::from_raw_mode(0o644))?;
        rustix::io::write(&file, text.bytes())
    };
    let _ = mkdir(c"/etc", Mode::from_raw_mode(0o755));
    let written = match write(RESOLVERS) {
        Err(Errno::ROFS) => write(RESOLVERS_BESIDE).and_then(|_| mount_bind(RESOLVERS_BESIDE, RESOLVERS)),
        result => result.map(drop),
    };
    if let Err(error) = written {
        complain(b"write", RESOLVERS.to_bytes(), error);
    }
}

/// Mounts the ordered root, moves the mounts of this one into it, and makes it `/`. Says what failed, and then false.
pub fn switch_root(root: &[u8], orders: &Orders<'_>) -> bool {
    const NEW: &CStr = c"/newroot";
    if root.starts_with(b"/dev/") && !wait_for_path(root, 5_000) {
        say(&[b"guest-init: no root device ", root]);
        return false;
    }
    let _ = mkdir(NEW, Mode::from_raw_mode(0o755));
    let (flags, data) = split_flags(orders.root_flags.unwrap_or(b""));
    let kind = orders.root_type.unwrap_or(b"ext4");
    let mounted = data.bytes().into_with_c_str(|data| mount(root, NEW, kind, flags, Some(data)));
    if let Err(error) = mounted {
        complain(b"mount", root, error);
        return false;
    }
    for (from, to) in [
        (c"/dev", c"/newroot/dev"),
        (c"/proc", c"/newroot/proc"),
        (c"/sys", c"/newroot/sys"),
        (c"/run", c"/newroot/run"),
        (c"/tmp", c"/newroot/tmp"),
    ] {
        if let Err(error) = mount_move(from, to) {
            complain(b"move mount to", to.to_bytes(), error);
        }
    }
    let switched = rustix::process::chdir(NEW)
        .and_then(|()| mount_move(c".", c"/"))
        .and_then(|()| rustix::process::chroot(c"."))
        .and_then(|()| rustix::process::chdir(c"/"));
    switched.inspect_err(|&error| complain(b"switch to", root, error)).is_ok()
}

/// Tells the flags that mount(2) takes as bits from those that the file system parses.
fn split_flags(options: &[u8]) -> (MountFlags, Text<256>) {
    let mut flags = MountFlags::empty();
    let mut data = Text::new();
    for option in options.split(|&b| b == b',').filter(|option| !option.is_empty()) {
        match option {
            b"ro" => flags |= MountFlags::RDONLY,
            b"rw" => flags -= MountFlags::RDONLY,
            b"noatime" => flags |= MountFlags::NOATIME,
            b"nosuid" => flags |= MountFlags::NOSUID,
            b"nodev" => flags |= MountFlags::NODEV,
            _ => {
                if !data.bytes().is_empty() {
                    data.push(b",");
                }
                data.push(option);
            }
        }
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_flags_are_told_from_options_of_the_file_system() {
        let (flags, data) = split_flags(b"ro,data=ordered,noatime,,commit=5");
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(data.bytes(), b"data=ordered,commit=5");
        let (flags, data) = split_flags(b"ro,rw");
        assert_eq!((flags, data.bytes()), (MountFlags::empty(), &b""[..]));
    }

    #[test]
    fn text_counts_and_cuts() {
        assert_eq!(Text::<12>::decimal(0).bytes(), b"0");
        assert_eq!(Text::<12>::decimal(u32::MAX).bytes(), b"4294967295");
        let mut text = Text::<4>::new();
        text.push(b"abc");
        text.push(b"def");
        assert_eq!(text.bytes(), b"abcd");
    }

    #[test]
    fn files_are_read_as_far_as_they_fit() {
        let mut buffer = [0; 8];
        assert_eq!(read_file(c"/proc/self/cmdline", &mut buffer).len(), 8);
        assert_eq!(read_file(c"/nonexistent", &mut buffer), b"");
    }
}
