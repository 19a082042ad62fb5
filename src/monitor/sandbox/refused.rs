//! What happens when a thread makes a call that is on no list of its role: the kernel does not make it, and sends SIGSYS
//! (`SECCOMP_RET_TRAP`).

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use libc::{c_int, siginfo_t};
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::JAIL;

/// A call that was refused.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    /// Its number.
    pub call: i32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = usize::try_from(self.call).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
        let [first, second, third, ..] = self.arguments;
        let thread = thread::current();
        let thread = thread.name().unwrap_or("without a name");
        write!(
            f,
            "the sandbox refused system call {name} ({}) with {first:#x}, {second:#x}, {third:#x}, of thread {thread}",
            self.call
        )
    }
}

/// The offset of `si_syscall` in `siginfo_t`, which libc does not name (include/uapi/asm-generic/siginfo.h: three ints, one of them
/// padding, and `si_call_addr` precede it).
const SI_SYSCALL: usize = 24;
/// `SYS_SECCOMP` there: it is a filter that sent this.
const SYS_SECCOMP: c_int = 1;

static ENDS: AtomicBool = AtomicBool::new(false);

type End = Box<dyn Fn(&Refused) + Send + Sync>;

static END: OnceLock<End> = OnceLock::new();

/// From now on refused calls are told of, and have `end` end the process.
pub(super) fn listen(end: impl Fn(&Refused) + Send + Sync + 'static) -> io::Result<()> {
    // The first is all that there is.
    let _ = END.set(Box::new(end));
    register_signal_handler(libc::SIGSYS, on_signal).map_err(io::Error::from)
}

extern "C" fn on_signal(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(jail) = JAIL.get() else { return };
    // SAFETY: the kernel passes both to a handler that was registered with SA_SIGINFO.
    let (info, context) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    if info.si_code != SYS_SECCOMP {
        return;
    }
    // SAFETY: a siginfo of this code has it there, and is longer.
    let call = unsafe { (&raw const *info).byte_add(SI_SYSCALL).cast::<i32>().read() };
    let register = |register: c_int| context.uc_mcontext.gregs[register as usize] as u64;
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];
    let refused = Refused { call, arguments: arguments.map(register) };
    // It has not happened. What this thread holds, nobody waits for any more: the process ends.
    if jail.goes_on {
        (jail.refused)(&refused);
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
        return;
    }
    if !ENDS.swap(true, Ordering::SeqCst)
        && let Some(end) = END.get()
    {
        end(&refused);
    }
    // Until the process has ended.
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}
