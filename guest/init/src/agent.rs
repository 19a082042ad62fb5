//! Runs the agent, if the initramfs has it and there is a socket device or a console port by which the host can reach it
//! (docs/agent.md), and starts it again when it ends.

use core::ffi::CStr;

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};

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

/// Milliseconds between the agent's end and its next start: twice as many each time, so that one that cannot run takes no time
/// from the guest, and the first again for one that has run for the longest.
const FIRST_PAUSE: u64 = 100;
const LONGEST_PAUSE: u64 = 60_000;

/// The agent: its program, held over a change of root (the other one need not have it), and its process.
#[derive(Debug)]
pub struct Agent {
    program: OwnedFd,
    state: State,
    /// The next one.
    pause: u64,
}

/// Times are in milliseconds of the guest's clock since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running { process: Pid, since: u64 },
    Ended { until: u64 },
}

impl Agent {
    /// `None` where there is no agent, or no way to it.
    pub fn find() -> Option<Self> {
        let vsock = open(c"/dev/vsock", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        if !vsock.is_ok_and(|device| kernel::has_vsock(&device)) && virtio_port(PORT).is_none() {
            return None;
        }
        let program = open(PROGRAM, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Some(Self { program, state: State::Ended { until: 0 }, pause: FIRST_PAUSE })
    }

    /// Starts it, in a session of its own: what ends the console's does not end it.
    ///
    /// # Safety
    /// The process must have one thread.
    pub unsafe fn start(&mut self) {
        let child = || {
            let _ = rustix::process::setsid();
            let mut path = Text::<40>::new();
            path.push(b"/proc/self/fd/");
            path.push(Text::<12>::decimal(self.program.as_raw_fd() as u32).bytes());
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
        match unsafe { kernel::fork(child) } {
            Ok(process) => self.state = State::Running { process, since: now() },
            Err(error) => {
                complain(b"make", b"a process", error);
                self.rest(now());
            }
        }
    }

    /// Notes that the child `process` has ended, which may be the agent.
    pub fn note_end_of(&mut self, process: Pid) {
        self.note_end_at(process, now());
    }

    fn note_end_at(&mut self, ended: Pid, now: u64) {
        let State::Running { process, since } = self.state else { return };
        if process == ended {
            if now.saturating_sub(since) >= LONGEST_PAUSE {
                self.pause = FIRST_PAUSE;
            }
            self.rest(now);
        }
    }

    fn rest(&mut self, now: u64) {
        self.state = State::Ended { until: now + self.pause };
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
    }

    /// Milliseconds until it is to be started; `None` while it runs.
    pub fn pause(&self) -> Option<u32> {
        match self.state {
            State::Running { .. } => None,
            State::Ended { until } => Some(until.saturating_sub(now()) as u32),
        }
    }
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_ends_at_once_is_started_ever_less_often_until_it_has_run_for_long() {
        let program = open(c"/dev/null", OFlags::RDONLY, Mode::empty()).expect("/dev/null");
        let mut agent = Agent { program, state: State::Ended { until: 0 }, pause: FIRST_PAUSE };
        let process = rustix::process::getpid();
        let mut ends_after = |ran: u64| {
            agent.state = State::Running { process, since: 1_000 };
            agent.note_end_at(Pid::INIT, 1_000 + ran);
            assert!(matches!(agent.state, State::Running { .. }), "another one's end");
            agent.note_end_at(process, 1_000 + ran);
            match agent.state {
                State::Ended { until } => until - ran - 1_000,
                State::Running { .. } => panic!("it has ended"),
            }
        };
        assert_eq!([0, 1, 500].map(&mut ends_after), [100, 200, 400]);
        assert_eq!([0; 20].map(&mut ends_after)[19], LONGEST_PAUSE);
        assert_eq!([LONGEST_PAUSE, 0].map(&mut ends_after), [100, 200]);
    }
}
