//! A file system of one file, `disk`, which the test serves by hand (the kernel's linux/fuse.h): its storage may be slow, or stop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

/// Of an open file: no page cache, and no request when a descriptor is closed.
const OPEN_FLAGS: u32 = 1 | 1 << 5;
/// Seconds for which the kernel may keep what it was told.
const VALID: u32 = 3600;
/// How long a MiB takes to be read, or to be given back.
const MIB_TAKES: Duration = Duration::from_millis(20);

/// A mounted file system, and its server.
pub struct Fuse {
    dir: PathBuf,
    device: Arc<File>,
    stopped: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Fuse {
    /// Mounts it on the folder `dir`; the file has `size` bytes, all zero.
    pub fn mount(dir: &Path, size: u64) -> io::Result<Self> {
        let device = Arc::new(File::options().read(true).write(true).open("/dev/fuse")?);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&*device);
        let data = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
        let data = std::ffi::CString::new(data)?;
        mount("vmm-test", dir, "fuse", MountFlags::NOSUID | MountFlags::NODEV, data.as_c_str())?;
        let stopped = Arc::<AtomicBool>::default();
        let (its_device, its_end) = (device.clone(), stopped.clone());
        let server = thread::spawn(move || {
            while !its_end.load(Ordering::SeqCst) {
                if is_asked(&its_device, Duration::from_millis(10)) && serve(&its_device, size).is_none() {
                    return;
                }
            }
        });
        Ok(Self { dir: dir.to_owned(), device, stopped, server: Some(server) })
    }

    /// From now on nothing is answered. Requests stay where they are: what a server has taken and does not answer, no process can
    /// be freed from, not even by SIGKILL.
    pub fn stop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.server.take().map(JoinHandle::join);
    }

    /// Whether a request waits for its answer.
    pub fn is_asked(&self) -> bool {
        is_asked(&self.device, Duration::ZERO)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = unmount(&self.dir, UnmountFlags::DETACH);
        self.stop();
    }
}

fn is_asked(device: &File, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&patience)).is_ok_and(|ready| ready > 0)
}

/// Answers one request. None: the file system is gone.
fn serve(mut device: &File, size: u64) -> Option<()> {
    let mut request = vec![0; 1 << 18];
    let len = device.read(&mut request).ok()?;
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
    let (unique, node) = (long(8), long(16));
    assert_eq!(word(0) as usize, len);
    let (error, answer) = match word(4) {
        FORGET | BATCH_FORGET | INTERRUPT => return Some(()),
        // Version 7.31; no feature; writes of 128 KiB.
        INIT => (0, words(&[7, 31, 1 << 17, 0, 0, 1 << 17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        // A node and its generation; names and attributes are valid for longer than any test runs.
        LOOKUP => (0, [words(&[2, 0, 0, 0, VALID, 0, VALID, 0, 0, 0]), attributes(2, size)].concat()),
        GETATTR => (0, [words(&[VALID, 0, 0, 0]), attributes(node, size)].concat()),
        OPEN => (0, words(&[0, 0, OPEN_FLAGS, 0])),
        READ => {
            let len = word(40 + 16);
            thread::sleep(MIB_TAKES * len / (1 << 20));
            (0, vec![0; len as usize])
        }
        RELEASE => (0, Vec::new()),
        FALLOCATE => {
            thread::sleep(MIB_TAKES * (long(40 + 16) >> 20) as u32);
            (0, Vec::new())
        }
        _ => (libc::ENOSYS, Vec::new()),
    };
    let mut reply = words(&[16 + answer.len() as u32, -error as u32]);
    reply.extend(unique.to_ne_bytes());
    reply.extend(answer);
    // Whoever asked may have gone.
    let _ = device.write(&reply);
    Some(())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_attr`: node 1 is the folder, any other the file.
fn attributes(node: u64, size: u64) -> Vec<u8> {
    let (mode, size) = if node == 1 { (libc::S_IFDIR | 0o755, 4096) } else { (libc::S_IFREG | 0o600, size) };
    let mut attributes: Vec<u8> =
        [node, size, size / 512, 0, 0, 0].iter().flat_map(|long| long.to_ne_bytes()).collect();
    attributes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
    attributes
}
