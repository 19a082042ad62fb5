//! [`Mounted`]: a shared folder that this host's kernel has mounted. Its requests come over /dev/fuse, where a guest's come over a ring; all
//! that answers them is the same. So what others wrote to judge file systems runs at the speed of the machine.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use tempfile::TempDir;
use vm_memory::GuestAddress;
use vmm_monitor::config::{Share, ShareFrom};
use vmm_monitor::memory::{Buffers, GuestRam};
use vmm_monitor::share::{Folders, Outcome, Server, Waiting};

/// Room for a request or a reply: the most data that one has, and what is before it.
const ROOM: usize = (1 << 20) + (64 << 10);

/// The ordinary user who shares a folder, where it is not root.
pub const USER: u32 = 1000;

/// Whether this machine mounts file systems that a program serves.
pub fn available(what: &str) -> bool {
    let can = rustix::process::geteuid().is_root() && File::open("/dev/fuse").is_ok();
    if !can {
        println!("SKIP: shared folders under this host's kernel: {what} needs root and /dev/fuse");
    }
    can
}

/// See the module's text.
pub struct Mounted {
    at: TempDir,
}

impl Mounted {
    /// `folder`, shared as `how` says (`,cache=never` ...) by root, or by an ordinary user.
    pub fn new(folder: &Path, how: &str, by_user: bool) -> Self {
        let at = tempfile::tempdir().unwrap();
        serve_at(folder, at.path(), how, by_user);
        Self { at }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.at.path().to_owned()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.at.path(), UnmountFlags::DETACH);
    }
}

/// Mounts `folder` at `place`. The thread that serves it ends when nobody has it mounted, or a file of it open.
pub fn serve_at(folder: &Path, place: &Path, how: &str, by_user: bool) -> JoinHandle<()> {
    let share = Share { from: ShareFrom::Path(folder.to_owned()), ..format!(".{how}").parse().unwrap() };
    let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    // As Linux's virtio-fs has it.
    let terms = "rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other";
    let options = CString::new(format!("fd={},{terms}", fuse.as_raw_fd())).unwrap();
    let source = folder.file_name().unwrap_or_default();
    mount(source, place, "fuse", MountFlags::empty(), &*options).unwrap();
    let (ready, is_ready) = mpsc::channel();
    let serving = thread::spawn(move || {
        become_server(by_user);
        let server = Folders::default().server(0, 1, &share);
        ready.send(server.as_ref().map(drop).map_err(|error| format!("{error:?}"))).unwrap();
        if let Ok(server) = server {
            serve(server, fuse);
        }
    });
    is_ready.recv().unwrap().unwrap();
    serving
}

/// Has this thread be who a machine's is: root without its capabilities, or a user.
fn become_server(by_user: bool) {
    if by_user {
        let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
        set_thread_groups(&[]).unwrap();
        set_thread_res_gid(group, group, group).unwrap();
        set_thread_res_uid(user, user, user).unwrap();
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
}

fn serve(mut server: Server, mut fuse: File) {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    let ram = Arc::new(ram);
    let buffers = |at: usize, len: usize| {
        let mut buffers = Buffers::empty(ram.clone());
        buffers.push(at as u64, len).unwrap();
        buffers
    };
    let mut bytes = vec![0; ROOM];
    let mut waiting: Vec<Waiting> = Vec::new();
    loop {
        // Nobody tells when a lock is free.
        let soon = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        let ready =
            poll(&mut [PollFd::new(&fuse, PollFlags::IN)], Some(&soon).filter(|_| !waiting.is_empty()));
        waiting.retain_mut(|waiting| {
            let Some(len) = server.again(waiting) else { return true };
            let mut reply = vec![0; len];
            buffers(2 << 20, len).read_exact(&mut reply).unwrap();
            let _ = fuse.write(&reply);
            false
        });
        if ready == Ok(0) {
            continue;
        }
        let len = match fuse.read(&mut bytes) {
            Ok(len) => len,
            // A request that was given up meanwhile.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Interrupted) => continue,
            Err(_) => return,
        };
        buffers(0, len).write_all(&bytes[..len]).unwrap();
        let len = match server.serve(&mut buffers(0, len), &mut buffers(2 << 20, ROOM)) {
            Outcome::Replied(len) => len,
            Outcome::Waits(request) => {
                waiting.push(request);
                0
            }
        };
        if len > 0 {
            buffers(2 << 20, len).read_exact(&mut bytes[..len]).unwrap();
            // Nobody may wait for it any more.
            let _ = fuse.write(&bytes[..len]);
        }
    }
}

/// A folder to share, in one that has something beside it.
pub fn folder(by_user: bool) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    given(dir.path(), &share, by_user);
    (dir, share)
}

/// Gives `share`, which is in `dir`, to who shares it.
pub fn given(dir: &Path, share: &Path, by_user: bool) {
    use std::os::unix::fs::{PermissionsExt, chown};
    if by_user {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        chown(share, Some(USER), Some(USER)).unwrap();
    }
}
