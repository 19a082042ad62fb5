//! The process sees a file system of its own (mount_namespaces(7)), and in the end of that nothing but what its run was granted,
//! below a root that is empty otherwise. It shares no System V IPC, host name or control groups with others either.
//!
//! There is no namespace of processes: the child that saves memory would be its init, and the last. Nor of networks: making one takes
//! longer than a start, and who has no business there makes no socket.

use std::env::current_dir;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path};
use std::sync::OnceLock;

use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_remount,
    move_mount, open_tree,
};
use rustix::process::{chdir, chroot, fchdir, getegid, geteuid};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use super::files::Grant;

/// Whether this process has left those of its host.
static LEFT: OnceLock<()> = OnceLock::new();
/// Whether there are no other files than those of grants.
static ALONE: OnceLock<()> = OnceLock::new();

/// Leaves the host's, if this user, or this container, may have others. To be called while there is one thread. All files are where they
/// were.
///
/// # Errors
/// It is half done, and the process must not go on.
pub(super) fn leave() -> io::Result<Result<(), Errno>> {
    let ours = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    let owned = capabilities(None)?.effective;
    // Whoever has capabilities needs them still, a tap's above all, and they would be nothing in a namespace of users.
    let flags = match owned.is_empty() {
        true => ours | UnshareFlags::NEWUSER,
        false if owned.contains(CapabilitySet::SYS_ADMIN) => ours,
        false => return Ok(Err(Errno::PERM)),
    };
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: there is one thread, and descriptors stay shared as they are.
    if let Err(error) = unsafe { unshare_unsafe(flags) } {
        return Ok(Err(error));
    }
    if flags.contains(UnshareFlags::NEWUSER) {
        // user_namespaces(7): who may not set groups may name one.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
        fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    }
    // What the host unmounts goes from here, too; nothing that is mounted here gets there. A user who may have the namespace may still be
    // denied what is to be done in it (AppArmor), and goes on there as before.
    if let Err(error) = mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC) {
        return Ok(Err(error));
    }
    let _ = LEFT.set(());
    Ok(Ok(()))
}

/// From now on this process finds nothing but `grants`, where they were. To be called before the calling thread gives its capabilities
/// up; all threads find the same.
///
/// # Errors
/// The kernel refuses; all is where it was.
pub(super) fn stay_in(grants: &[Grant]) -> io::Result<()> {
    if LEFT.get().is_none() {
        return Ok(());
    }
    let is_there = |path: &&Path| path.is_absolute() && path.exists();
    let mut paths: Vec<_> = grants.iter().map(Grant::path).filter(is_there).collect();
    paths.sort_unstable();
    // What is in a granted folder is there with it.
    paths.dedup_by(|path, earlier| path.starts_with(*earlier));
    if paths.first() == Some(&Path::new("/")) {
        return Err(io::Error::other("a socket of its is in the root folder itself"));
    }
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(tmpfs.as_fd(), "size", "64k")?;
    fsconfig_create(tmpfs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(tmpfs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Over the host's root, which stays where it is for whoever has it already.
    move_mount(root.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    paths.into_iter().try_for_each(|path| show(path, root.as_fd()))?;
    let here = current_dir();
    fchdir(&root)?;
    let read_only = MountFlags::RDONLY | MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID;
    mount_remount(".", read_only | MountFlags::NOEXEC, "")?;
    chroot(".")?;
    // What is named from there, such as a core, is found if it is a place.
    let _ = here.and_then(|here| Ok(chdir(here)?));
    let _ = ALONE.set(());
    Ok(())
}

/// Has what is at `path` be there below `root`, too.
fn show(path: &Path, root: BorrowedFd<'_>) -> io::Result<()> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o755);
    // All folders on the way, those that ".." leads out of again as well: whoever names the path goes that way. There are no symbolic links
    // below that root, and nothing above it.
    let mut way = vec![root.try_clone_to_owned()?];
    for part in above.components() {
        let [.., at] = &way[..] else { break };
        match part {
            Component::Normal(name) => {
                match mkdirat(at, name, mode) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                way.push(openat(at, name, folder, Mode::empty())?);
            }
            Component::ParentDir if way.len() > 1 => _ = way.pop(),
            _ => {}
        }
    }
    let Some(at) = way.last() else { return Ok(()) };
    match path.is_dir() {
        true => match mkdirat(at, name, mode) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        },
        false => drop(openat(at, name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, mode)?),
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // A namespace's user may not see what lies below a mount of others, so takes such a place with all that is mounted in it.
    let there =
        open_tree(CWD, path, flags).or_else(|_| open_tree(CWD, path, flags | OpenTreeFlags::AT_RECURSIVE))?;
    Ok(move_mount(there.as_fd(), "", at, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Whether this process finds nothing but what it was granted.
pub(super) fn is_alone() -> bool {
    ALONE.get().is_some()
}
