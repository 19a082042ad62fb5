//! Mounts of one's own: what is mounted from here on is seen by this thread and what it starts, and is gone with them.

use std::io;
use std::path::Path;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread, and all processes that it starts from now on, mounts of their own.
///
/// # Errors
/// The caller may not: it is not root.
pub fn private() -> io::Result<()> {
    // SAFETY: the file table, which Rust's notion of an owned descriptor depends on, stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
}

/// Takes cgroup version 2 out of a hybrid layout, where it only names processes: container runtimes that see it there take it
/// for one that limits them, or give up. To be called after [`private`]. Whether there was one.
pub fn hide_hybrid_cgroup() -> bool {
    let unified = Path::new("/sys/fs/cgroup/unified");
    unified.is_dir() && unmount(unified, UnmountFlags::DETACH).is_ok()
}
