//! What the workload does as PID 1 of a guest that has nothing but it: mount what it needs, and power off in the end.

use std::fs;
use std::io;

use interface::Ip;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Where a shared folder is.
pub const SHARE: &str = "/share";

/// Mounts /dev, unless the kernel has done so, the shared folder `share`, and sets the interface up that `ip` describes.
///
/// # Errors
/// This process is not PID 1, or a mount fails, or there is no such interface.
pub fn prepare(ip: Option<&str>, share: Option<&str>) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("--guest is for PID 1 of a virtual machine"));
    }
    match mount(c"devtmpfs", c"/dev", c"devtmpfs", MountFlags::empty(), None) {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(error) => return Err(io::Error::other(format!("mount devtmpfs on /dev: {error}"))),
    }
    if let Some(tag) = share {
        let failed = |error: io::Error| io::Error::other(format!("mount {tag} at {SHARE}: {error}"));
        fs::create_dir(SHARE).map_err(failed)?;
        mount(tag, SHARE, "virtiofs", MountFlags::empty(), None).map_err(|error| failed(error.into()))?;
        mount("proc", "/proc", "proc", MountFlags::empty(), None).map_err(|error| failed(error.into()))?;
    }
    let Some(text) = ip else { return Ok(()) };
    let ip =
        Ip::parse(text.as_bytes()).ok_or_else(|| io::Error::other(format!("{text:?} has no address")))?;
    ip.set_up().map_err(|error| io::Error::other(format!("set the interface up: {error}")))
}

/// Has the guest's kernel know nothing of any file. Not done on a host: its other programs would notice.
///
/// # Errors
/// It refuses.
pub fn forget() -> io::Result<()> {
    if std::process::id() == 1 {
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3")?;
    }
    Ok(())
}

/// Ends the machine.
///
/// # Errors
/// The kernel refused.
pub fn power_off() -> io::Result<()> {
    rustix::fs::sync();
    Ok(reboot(RebootCommand::PowerOff)?)
}
