//! Everything the machine's first process asks of the kernel before and after the command:
//! mounts, modules, ports, clock, random numbers, the change to the host's root. Called by
//! `main.rs` in the order of the functions here; knows nothing of the command.

use rig_init::{MODULE_FOLDER, NO_NPT, ROOT_FOLDER, ROOT_TAG, Request};
use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long devices may take to appear.
const PATIENCE: Duration = Duration::from_secs(60);

/// Mounts the kernel's file systems and brings the loopback interface up.
pub fn prepare() -> io::Result<()> {
    for (kind, at, options) in [
        ("devtmpfs", "/dev", "mode=755"),
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("tmpfs", "/run", "mode=755"),
        ("devpts", "/dev/pts", "mode=620,ptmxmode=666,gid=5"),
        ("tmpfs", "/dev/shm", "mode=1777"),
    ] {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, 0, options)?;
    }
    // Conveniences: a kernel without one of them still runs most commands.
    for (kind, at) in [
        ("mqueue", "/dev/mqueue"),
        ("hugetlbfs", "/dev/hugepages"),
        ("tracefs", "/sys/kernel/tracing"),
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        if let Err(error) = fs::create_dir_all(at).and_then(|()| mount(kind, at, kind, 0, "")) {
            eprintln!("rig-init: {error}");
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).map_err(|e| naming(e, link))?;
    }
    fs::create_dir_all("/run/lock")?;
    fs::create_dir_all("/run/user/0")?;
    fs::set_permissions("/run/user/0", fs::Permissions::from_mode(0o700))?;
    loopback_up()
}

/// Opens the virtio-serial port `name`, which may still have to appear.
pub fn port(name: &str) -> io::Result<File> {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let label = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if label.trim_end() == name {
                let node = Path::new("/dev").join(entry.file_name());
                if let Ok(port) = OpenOptions::new().read(true).write(true).open(node) {
                    return Ok(port);
                }
            }
        }
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("no virtio-serial port {name}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Loads every module of the initramfs; returns what failed without hurting KVM.
pub fn load_modules() -> io::Result<Vec<String>> {
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let no_npt = command_line.split_whitespace().any(|word| word == NO_NPT);
    let mut files: Vec<_> = fs::read_dir(MODULE_FOLDER)?.collect::<Result<_, _>>()?;
    files.sort_by_key(fs::DirEntry::file_name);
    let mut notes = Vec::new();
    for file in files {
        let name = file.file_name().to_string_lossy().into_owned();
        let parameters = match name.ends_with("kvm-amd.ko") && no_npt {
            true => c"npt=0",
            false => c"",
        };
        let module = File::open(file.path())?;
        // SAFETY: finit_module reads a file that is open and a string that ends in NUL.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), parameters.as_ptr(), 0) };
        if result != 0 {
            notes.push(format!("module {name}: {}", io::Error::last_os_error()));
        }
    }
    match Path::new("/dev/kvm").exists() {
        true => Ok(notes),
        false => Err(io::Error::other(format!("no /dev/kvm; {notes:?}"))),
    }
}

/// Gives the machine the request's identity and makes the host's root its root.
pub fn enter(request: &Request) -> io::Result<()> {
    seed(&request.seed)?;
    if request.time != 0 {
        let now = libc::timespec {
            tv_sec: (request.time / 1_000_000_000) as libc::time_t,
            tv_nsec: (request.time % 1_000_000_000) as libc::c_long,
        };
        // SAFETY: `now` is a valid timespec for the time of the call.
        check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &now) })?;
    }
    // SAFETY: pointer and length are those of one slice.
    check(unsafe { libc::sethostname(request.hostname.as_ptr().cast(), request.hostname.len()) })?;

    fs::create_dir_all(ROOT_FOLDER)?;
    if request.own_root {
        mount(ROOT_FOLDER, ROOT_FOLDER, "", libc::MS_BIND, "")?;
    }
    let start = Instant::now();
    while !request.own_root
        && let Err(error) = mount(ROOT_TAG, ROOT_FOLDER, "virtiofs", 0, "")
    {
        // The device is plugged in while the machine runs: it may still have to appear.
        if start.elapsed() > PATIENCE {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for point in ["/dev", "/proc", "/sys", "/run"] {
        mount(point, &format!("{ROOT_FOLDER}{point}"), "", libc::MS_MOVE, "")?;
    }
    std::env::set_current_dir(ROOT_FOLDER)?;
    mount(".", "/", "", libc::MS_MOVE, "")?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")?;
    let cwd = Path::new(OsStr::from_bytes(&request.cwd));
    std::env::set_current_dir(cwd).map_err(|error| {
        io::Error::other(format!(
            "working directory {}: {error} (the host's /dev, /proc, /sys and /run are not visible here)",
            cwd.display()
        ))
    })
}

/// Writes what the kernel still holds to the host's files.
pub fn sync() {
    // SAFETY: sync takes and returns nothing.
    unsafe { libc::sync() }
}

/// Ends the machine.
pub fn stop() -> ! {
    loop {
        // SAFETY: reboot does not touch this process's memory; it returns only on failure.
        unsafe { libc::reboot(libc::RB_AUTOBOOT) };
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: socket takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    interface.ifr_name[0] = b'l' as libc::c_char;
    interface.ifr_name[1] = b'o' as libc::c_char;
    interface.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    let result = check(unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &interface) });
    // SAFETY: the descriptor is this function's own and not used again.
    unsafe { libc::close(socket) };
    result
}

/// Mixes `bytes` into the kernel's random numbers: machines restored from one snapshot would
/// otherwise draw the same ones.
fn seed(bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct Entropy {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; 32],
    }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let Ok(bytes) = bytes.try_into() else {
        return Ok(());
    };
    let entropy = Entropy { bits: 256, size: 32, bytes };
    let random = File::open("/dev/urandom")?;
    // SAFETY: RNDADDENTROPY reads a header and the 32 bytes behind it; both are in `entropy`.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &entropy) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) })
}

fn mount(what: &str, at: &str, kind: &str, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let [source, target, kind_name, data] =
        [what, at, kind, options].map(|s| CString::new(s).unwrap_or_default());
    // SAFETY: the four strings end in NUL and outlive the call.
    check(unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind_name.as_ptr(), flags, data.as_ptr().cast())
    })
    .map_err(|error| naming(error, &format!("mount {what} at {at}")))
}

fn naming(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// The error of a C call that returned a negative number.
pub fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
