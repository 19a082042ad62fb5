//! Starts the agent, if the initramfs has it and there is a socket device or a console port by which the host can reach it
//! (docs/agent.md).

use core::ffi::CStr;

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};

use crate::console::complain;
use crate::finish::virtio_port;
use crate::kernel;
use crate::mounts::Text;

const PROGRAM: &CStr = c"/sbin/vmm-agent";
const NAME: &CStr = c"vmm-agent";
/// The console port that is the agent's, where there is no socket device.
const PORT: &[u8] = b"vmm.agent";

/// What a shell returns when it cannot find the program.
const NOT_FOUND: u8 = 127;

/// The agent's program, held over a change of root: the other one need not have it.
#[derive(Debug)]
pub struct Agent(OwnedFd);

impl Agent {
    /// `None` where there is no agent, or no way to it.
    pub fn find() -> Option<Self> {
        let vsock = open(c"/dev/vsock", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        if !vsock.is_ok_and(|device| kernel::has_vsock(&device)) && virtio_port(PORT).is_none() {
            return None;
        }
        open(PROGRAM, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok().map(Self)
    }

    /// Starts it, in a session of its own: what ends the console's does not end it.
    ///
    /// # Safety
    /// The process must have one thread.
    pub unsafe fn start(self) {
        let child = || {
            let _ = rustix::process::setsid();
            let mut path = Text::<40>::new();
            path.push(b"/proc/self/fd/");
            path.push(Text::<12>::decimal(self.0.as_raw_fd() as u32).bytes());
            path.push(b"\0");
            let Ok(path) = CStr::from_bytes_with_nul(path.bytes()) else { return NOT_FOUND };
            let arguments = [NAME.as_ptr().cast(), core::ptr::null()];
            let variables = [core::ptr::null()];
            // SAFETY: both arrays end with NULL, and hold C strings that outlive the call.
            let error = unsafe { kernel::execute(path, arguments.as_ptr(), variables.as_ptr()) };
            complain(b"run", PROGRAM.to_bytes(), error);
            NOT_FOUND
        };
        // SAFETY: one thread, by contract.
        if let Err(error) = unsafe { kernel::fork(child) } {
            complain(b"make", b"a process", error);
        }
    }
}
