//! The few kernel and CPU services that rustix does not offer: fork and exec without a libc, signalfd, I/O ports,
//! event-device bits. Called by the other modules; knows nothing of orders or policy.

use core::arch::asm;
use core::ffi::CStr;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

// Linux's x86-64 system call numbers.
const SYS_RT_SIGPROCMASK: usize = 14;
const SYS_IOCTL: usize = 16;
const SYS_FORK: usize = 57;
const SYS_EXECVE: usize = 59;
const SYS_KILL: usize = 62;
const SYS_IOPERM: usize = 173;
const SYS_EXIT_GROUP: usize = 231;
const SYS_SIGNALFD4: usize = 289;

/// `SFD_CLOEXEC | SFD_NONBLOCK` (linux/signalfd.h).
const SIGNALFD_FLAGS: usize = 0o2_000_000 | 0o4_000;
/// sizeof(struct signalfd_siginfo); its first field is the signal number.
const SIGINFO_SIZE: usize = 128;
/// The kernel's sigset_t has 64 bits.
const SIGSET_SIZE: usize = 8;

/// The signals that init answers. All are blocked, and read through [`next_signal`].
const SIGNALS: [Signal; 6] =
    [Signal::CHILD, Signal::TERM, Signal::INT, Signal::USR1, Signal::USR2, Signal::POWER];

/// # Safety
/// As for the system call `number` with these arguments.
unsafe fn syscall4(number: usize, a: usize, b: usize, c: usize, d: usize) -> Result<usize, Errno> {
    // SAFETY: the caller's contract; what the call does not take it does not look at.
    unsafe { syscall(number, [a, b, c, d, 0]) }
}

/// # Safety
/// As for the system call `number` with these arguments.
pub(crate) unsafe fn syscall(number: usize, [a, b, c, d, e]: [usize; 5]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the x86-64 convention: arguments in rdi, rsi, rdx, r10, r8; rcx and r11 are lost; the caller vouches for the rest.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match result {
        -4095..0 => Err(Errno::from_raw_os_error(-result as i32)),
        _ => Ok(result as usize),
    }
}

/// Blocks `SIGNALS` and returns a descriptor that becomes readable when one comes.
pub fn take_signals() -> Result<OwnedFd, Errno> {
    let mask = SIGNALS.iter().fold(0u64, |mask, signal| mask | 1 << (signal.as_raw() - 1));
    set_signal_mask(mask)?;
    // SAFETY: `mask` is a valid set of SIGSET_SIZE bytes, and lives over the call.
    let fd = unsafe {
        syscall4(SYS_SIGNALFD4, usize::MAX, &raw const mask as usize, SIGSET_SIZE, SIGNALFD_FLAGS)?
    };
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Blocks every signal that can be blocked, but SIGHUP.
pub fn block_all_but_hangup() -> Result<(), Errno> {
    set_signal_mask(!(1 << (Signal::HUP.as_raw() - 1)))
}

fn set_signal_mask(mask: u64) -> Result<(), Errno> {
    const SIG_SETMASK: usize = 2;
    // SAFETY: `mask` is a valid set of SIGSET_SIZE bytes, and lives over the call; the old one is not asked for.
    unsafe { syscall4(SYS_RT_SIGPROCMASK, SIG_SETMASK, &raw const mask as usize, 0, SIGSET_SIZE) }.map(drop)
}

/// Makes a child that runs `child`, with no signal blocked. What `child` returns is the exit code.
///
/// # Safety
/// The process must have one thread: the child gets no other.
pub unsafe fn fork(child: impl FnOnce() -> u8) -> Result<Pid, Errno> {
    // SAFETY: the child has its own copy of all memory, and by contract nothing else was running.
    let pid = unsafe { syscall4(SYS_FORK, 0, 0, 0, 0)? };
    if let Some(pid) = Pid::from_raw(pid as i32) {
        return Ok(pid);
    }
    let _ = set_signal_mask(0);
    exit(child())
}

/// Ends the process.
pub fn exit(code: u8) -> ! {
    loop {
        // SAFETY: it takes a number, and does not return.
        let _ = unsafe { syscall4(SYS_EXIT_GROUP, code.into(), 0, 0, 0) };
    }
}

/// Becomes another program; returns only why it could not.
///
/// # Safety
/// `arguments` and `environment` must be NULL-terminated arrays of pointers to C strings.
pub unsafe fn execute(path: &CStr, arguments: *const *const u8, environment: *const *const u8) -> Errno {
    // SAFETY: the caller's contract.
    match unsafe { syscall4(SYS_EXECVE, path.as_ptr() as usize, arguments as usize, environment as usize, 0) }
    {
        Ok(_) => Errno::INVAL,
        Err(error) => error,
    }
}

/// Sends a signal to every process but this one, which must be PID 1 (kill(2), pid -1).
pub fn signal_all_others(signal: Signal) {
    // SAFETY: touches no memory of ours. That there is no other process is no error here.
    let _ = unsafe { syscall4(SYS_KILL, usize::MAX, signal.as_raw() as usize, 0, 0) };
}

/// The next pending signal's number, if there is one.
pub fn next_signal(signals: BorrowedFd<'_>) -> Option<i32> {
    let mut info = [0u8; SIGINFO_SIZE];
    match rustix::io::read(signals, &mut info) {
        Ok(SIGINFO_SIZE) => Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]])),
        _ => None,
    }
}

/// Whether an event device can send `KEY_POWER` (linux/input-event-codes.h).
pub fn has_power_key(device: impl AsFd) -> bool {
    const EV_KEY: usize = 1;
    const KEY_POWER: usize = 116;
    let mut keys = [0u8; 96];
    // EVIOCGBIT(EV_KEY, 96) = _IOC(_IOC_READ, 'E', 0x20 + EV_KEY, 96)
    let request = (2 << 30) | (keys.len() << 16) | (0x45 << 8) | (0x20 + EV_KEY);
    // SAFETY: the kernel writes at most the 96 bytes that the request names.
    let got = unsafe {
        syscall4(SYS_IOCTL, device.as_fd().as_raw_fd() as usize, request, &raw mut keys as usize, 0)
    };
    got.is_ok() && keys[KEY_POWER / 8] & (1 << (KEY_POWER % 8)) != 0
}

/// Whether a socket device leads to the host: the guest has an address of its own then. `device` is `/dev/vsock`.
pub fn has_vsock(device: impl AsFd) -> bool {
    /// IOCTL_VM_SOCKETS_GET_LOCAL_CID
    const GET_LOCAL_CID: usize = 0x7b9;
    /// The first that is no well-known one; VMADDR_CID_ANY says that there is none.
    const FIRST: u32 = 3;
    let mut cid = u32::MAX;
    // SAFETY: the kernel writes one number of 32 bits, which lives over the call.
    let got = unsafe {
        syscall4(SYS_IOCTL, device.as_fd().as_raw_fd() as usize, GET_LOCAL_CID, &raw mut cid as usize, 0)
    };
    got.is_ok() && (FIRST..u32::MAX).contains(&cid)
}

/// Writes one byte to an I/O port; false if the kernel does not let us.
pub fn write_port(port: u16, value: u8) -> bool {
    // SAFETY: ioperm touches no memory of ours.
    if unsafe { syscall4(SYS_IOPERM, port.into(), 1, 1, 0) }.is_err() {
        return false;
    }
    // SAFETY: the port was just opened to us, and whoever ordered it knows what it does.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `child` in a process of its own, as these tests change process state; its exit code.
    fn code_of(child: impl FnOnce() -> u8) -> Option<i32> {
        // SAFETY: the child touches nothing that another thread of the test harness could have locked.
        let pid = unsafe { fork(child) }.expect("fork");
        let (_, status) = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())
            .expect("waitpid")
            .expect("an ended child");
        status.exit_status()
    }

    #[test]
    fn signals_come_through_the_descriptor_and_one_at_a_time() {
        let code = code_of(|| {
            let Ok(signals) = take_signals() else {
                return 1;
            };
            if next_signal(signals.as_fd()).is_some() {
                return 2;
            }
            let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::USR1);
            if next_signal(signals.as_fd()) != Some(Signal::USR1.as_raw()) {
                return 3;
            }
            u8::from(next_signal(signals.as_fd()).is_some())
        });
        assert_eq!(code, Some(0));
    }

    #[test]
    fn a_program_is_executed_with_its_arguments_and_environment() {
        let arguments = [c"sh", c"-c", c"test \"$A\" = b && exit 42"].map(|a| a.as_ptr().cast());
        let arguments = [arguments[0], arguments[1], arguments[2], core::ptr::null()];
        let environment = [c"A=b".as_ptr().cast(), core::ptr::null()];
        // SAFETY: NULL-terminated arrays of C strings.
        let run = |path| unsafe { execute(path, arguments.as_ptr(), environment.as_ptr()) };
        assert_eq!(code_of(|| run(c"/bin/sh").raw_os_error() as u8), Some(42));
        assert_eq!(run(c"/nonexistent"), Errno::NOENT);
    }

    #[test]
    fn a_plain_file_has_no_power_key() {
        let file =
            rustix::fs::open(c"/proc/self/stat", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
        assert!(!has_power_key(file.expect("procfs")));
    }
}
