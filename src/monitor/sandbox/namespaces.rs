//! Namespaces of the process's own (namespaces(7)): mounts, System V IPC, host name, control groups and, for ordinary users, users.
//! Before the guest runs, the process changes to an empty root that shows only the paths that the run was granted.
//!
//! No PID namespace: the child that saves memory would become its init, and the last process in it. No network namespace: creating one
//! takes longer than a start, and without a network the filters allow no socket.

use std::cell::Cell;
use std::env::current_dir;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::OnceLock;

use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, mount_remount,
    move_mount, open_tree,
};
use rustix::process::{PidfdFlags, chdir, chroot, fchdir, getegid, geteuid, getpid, pidfd_open};
use rustix::thread::{
    CapabilitySet, ThreadNameSpaceType, UnshareFlags, capabilities, move_into_thread_name_spaces,
    unshare_unsafe,
};

use super::files::Grant;

/// Set once the process has mounts of its own.
static LEFT: OnceLock<()> = OnceLock::new();
/// Once its first thread has all other namespaces, a descriptor of it: others may have to follow when there is none left.
static APART: OnceLock<OwnedFd> = OnceLock::new();
thread_local! {
    /// Whether the thread, and whoever it starts, has them.
    static IS_APART: Cell<bool> = const { Cell::new(false) };
}
/// Set once the root shows only what was granted.
static ALONE: OnceLock<()> = OnceLock::new();

/// Creates the namespace of mounts, and that of users for who needs one: threads share mounts only with who starts them. Call it while the
/// process has one thread. Every file stays where it was. The inner error says why this user or container may not have them; the process
/// can go on without.
///
/// # Errors
/// The process is left without a user ID of its own, and must not go on.
pub(super) fn leave() -> io::Result<Result<(), Errno>> {
    let owned = capabilities(None)?.effective;
    // Whoever has capabilities needs them still, a tap's above all, and they would be nothing in a namespace of users.
    let flags = match owned.is_empty() {
        // Who maps root needs a capability for that (user_namespaces(7)), and a process that is nobody there cannot go back.
        true if geteuid().is_root() => return Ok(Err(Errno::PERM)),
        true => UnshareFlags::NEWNS | UnshareFlags::NEWUSER,
        false if owned.contains(CapabilitySet::SYS_ADMIN) => UnshareFlags::NEWNS,
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

/// Creates the other namespaces, for the calling thread, the process's first, and those that it starts from now on. That takes as long as
/// mounts do, so it is for whoever has others to wait for.
///
/// # Errors
/// The kernel refuses.
pub(super) fn set_apart() -> io::Result<()> {
    if LEFT.get().is_some() {
        // SAFETY: nothing that threads share is among them.
        unsafe {
            unshare_unsafe(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP)?;
        }
        IS_APART.set(true);
        let _ = APART.set(pidfd_open(getpid(), PidfdFlags::empty())?);
    }
    Ok(())
}

/// The calling thread has the namespaces of the first one, if that has some and it has not. Call it before it drops its capabilities.
///
/// # Errors
/// The kernel refuses.
pub(super) fn follow() -> io::Result<()> {
    let Some(first) = APART.get() else { return Ok(()) };
    // Who has no capability was started by one that is inside.
    if IS_APART.get() || capabilities(None)?.permitted.is_empty() {
        return Ok(());
    }
    let others = ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::CONTROL_GROUP;
    move_into_thread_name_spaces(first.as_fd(), others)?;
    IS_APART.set(true);
    Ok(())
}

/// A root that shows only what was granted, as long as nobody is in it.
#[derive(Debug)]
pub(super) struct Root {
    /// Its file system, mounted nowhere yet.
    mount: OwnedFd,
    shown: Vec<Shown>,
}

/// What is at a path: the host's tree, and the place for it in the root, which takes it once that is mounted itself.
#[derive(Debug)]
struct Shown {
    tree: OwnedFd,
    folder: OwnedFd,
    name: OsString,
}

impl Root {
    /// One that is to show `grants`, at their own paths: all that can be done before it is mounted. None for a process without namespaces.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn new(grants: &[Grant]) -> io::Result<Option<Self>> {
        if LEFT.get().is_none() {
            return Ok(None);
        }
        let is_there = |path: &&Path| path.is_absolute() && path.exists();
        let mut paths: Vec<_> =
            grants.iter().filter(|grant| !grant.is_held()).map(Grant::path).filter(is_there).collect();
        paths.sort_unstable();
        // What is in a granted folder is there with it.
        paths.dedup_by(|path, earlier| path.starts_with(*earlier));
        if paths.first() == Some(&Path::new("/")) {
            return Err(io::Error::other("a path that the machine needs lies directly in /"));
        }
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(tmpfs.as_fd(), "size", "64k")?;
        fsconfig_create(tmpfs.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(tmpfs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let mut shown = Vec::with_capacity(paths.len());
        for path in paths {
            shown.extend(show(path, mount.as_fd())?);
        }
        Ok(Some(Self { mount, shown }))
    }

    /// Changes the root of all threads to it. Call it before the calling thread drops its capabilities.
    ///
    /// # Errors
    /// The kernel refuses. Every file is still where it was.
    pub(super) fn enter(self) -> io::Result<()> {
        let Self { mount, shown } = self;
        let from_nowhere = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        // Over the host's root, which stays where it is for whoever has it already.
        move_mount(mount.as_fd(), "", CWD, "/", from_nowhere)?;
        for Shown { tree, folder, name } in &shown {
            move_mount(tree.as_fd(), "", folder.as_fd(), name, from_nowhere)?;
        }
        let here = current_dir();
        fchdir(&mount)?;
        let read_only = MountFlags::RDONLY | MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID;
        mount_remount(".", read_only | MountFlags::NOEXEC, "")?;
        chroot(".")?;
        // What is named from there, such as a core, is found if it is a place.
        let _ = here.and_then(|here| Ok(chdir(here)?));
        let _ = ALONE.set(());
        Ok(())
    }
}

const MODE: Mode = Mode::from_raw_mode(0o755);

/// Creates `name` in the folder `at`, unless it exists.
fn make_folder(at: &OwnedFd, name: &OsStr) -> rustix::io::Result<()> {
    match mkdirat(at, name, MODE) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

/// Makes a place below `root` for what is at `path`, the same path there.
fn show(path: &Path, root: BorrowedFd<'_>) -> io::Result<Option<Shown>> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
    let place = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // All folders on the way, those that ".." leads out of again as well: whoever names the path goes that way. There are no symbolic links
    // below that root, and nothing above it.
    let mut way = vec![root.try_clone_to_owned()?];
    for part in above.components() {
        let [.., at] = &way[..] else { break };
        match part {
            Component::Normal(name) => {
                make_folder(at, name)?;
                way.push(openat(at, name, place, Mode::empty())?);
            }
            Component::ParentDir if way.len() > 1 => _ = way.pop(),
            _ => {}
        }
    }
    let Some(folder) = way.pop() else { return Ok(None) };
    match path.is_dir() {
        true => make_folder(&folder, name)?,
        false => drop(openat(&folder, name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, MODE)?),
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // A namespace's user may not see what lies below a mount of others, so takes such a place with all that is mounted in it.
    let tree =
        open_tree(CWD, path, flags).or_else(|_| open_tree(CWD, path, flags | OpenTreeFlags::AT_RECURSIVE))?;
    Ok(Some(Shown { tree, folder, name: name.to_owned() }))
}

/// The folder `folder`, with no way up from it. As it is where this process has no mounts of its own.
///
/// # Errors
/// The kernel refuses.
pub fn alone(folder: OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    if LEFT.get().is_none() {
        return Ok(folder);
    }
    // Nothing is above the root of a mount that is nowhere.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&folder, "", flags)?;
    let mut wanted = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    if read_only {
        wanted |= MOUNT_ATTR_RDONLY;
    }
    let attributes = libc::mount_attr { attr_set: wanted, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: it reads a structure of the size that it is told.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if set == 0 { Ok(tree) } else { Err(io::Error::last_os_error()) }
}

/// The name of this layer as far as the process has it, for people. Without a root of its own it protects nothing.
pub(super) fn layer() -> Option<&'static str> {
    ALONE.get()?;
    Some(if APART.get().is_some() { "namespaces" } else { "namespaces in part" })
}
