//! What the workload does as PID 1 of a guest that has nothing but it: mount what it needs, and power off in the end.

use std::io;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

/// Mounts /dev, unless the kernel has done so.
///
/// # Errors
/// This process is not PID 1, or the mount fails.
pub fn prepare() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("--guest is for PID 1 of a virtual machine"));
    }
    match mount(c"devtmpfs", c"/dev", c"devtmpfs", MountFlags::empty(), None) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(io::Error::other(format!("mount devtmpfs on /dev: {error}"))),
    }
}

/// Ends the machine.
///
/// # Errors
/// The kernel refused.
pub fn power_off() -> io::Result<()> {
    rustix::fs::sync();
    Ok(reboot(RebootCommand::PowerOff)?)
}
