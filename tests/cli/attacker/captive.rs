//! [`Captive`]: a thread of another process that makes the system calls that it is told to make (ptrace(2)), as it would for somebody who
//! has taken it over.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use libc::{c_long, c_void, pid_t, user_regs_struct};

/// What became of a call: what the kernel answered, or why not.
pub type Made = Result<i64, Refusal>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is on no list of the thread's role.
    Filter,
    /// The error that the kernel answered.
    Errno(i32),
}

/// An argument of a call.
pub enum Argument {
    Number(i64),
    /// The address of a copy of this, which the kernel may write to.
    Bytes(Vec<u8>),
}

impl From<i64> for Argument {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<i32> for Argument {
    fn from(number: i32) -> Self {
        Self::Number(number.into())
    }
}

impl From<&std::path::Path> for Argument {
    fn from(path: &std::path::Path) -> Self {
        Self::Bytes([path.as_os_str().as_encoded_bytes(), b"\0"].concat())
    }
}

impl From<&str> for Argument {
    fn from(text: &str) -> Self {
        Self::from(std::path::Path::new(text))
    }
}

impl From<Vec<u8>> for Argument {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

/// The instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Below the stack pointer, beyond what a function may use there (System V ABI, 3.2.2).
const SCRATCH: u64 = 8192;

/// A thread that stands still until this is dropped, and then goes on as if nothing had been.
pub struct Captive {
    thread: pid_t,
    memory: File,
    registers: user_regs_struct,
    /// Where an instruction is that makes a call.
    instruction: u64,
}

fn ptrace(request: u32, thread: pid_t, address: usize, data: *mut c_void) -> io::Result<c_long> {
    // SAFETY: `data` is nothing, a number, or registers that outlive the call.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

impl Captive {
    /// Takes `thread` of the process `pid`. None if it is gone, or one that the kernel works with there.
    pub fn take(pid: i32, thread: i32) -> Option<Self> {
        ptrace(libc::PTRACE_SEIZE, thread, 0, std::ptr::null_mut()).ok()?;
        ptrace(libc::PTRACE_INTERRUPT, thread, 0, std::ptr::null_mut()).unwrap();
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        // SAFETY: it is made of numbers.
        let registers = unsafe { std::mem::zeroed() };
        let mut captive = Self { thread, memory, registers, instruction: 0 };
        captive.stop();
        loop {
            captive.registers = captive.read();
            if captive.registers.rip == 0 {
                return None;
            }
            // It has just come from a call, unless it computes.
            captive.instruction = captive.registers.rip - SYSCALL.len() as u64;
            let mut code = [0; SYSCALL.len()];
            captive.memory.read_exact_at(&mut code, captive.instruction).unwrap();
            if code == SYSCALL {
                return Some(captive);
            }
            captive.step();
        }
    }

    /// The threads of the process `pid`, with their names.
    pub fn names(pid: i32) -> Vec<(i32, String)> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap());
        let name = |task: fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            Some((task.file_name().to_str()?.parse().ok()?, name.trim_end().to_owned()))
        };
        tasks.filter_map(name).collect()
    }

    /// Has it make call `number`.
    pub fn call<const N: usize>(&self, number: c_long, arguments: [Argument; N]) -> Made {
        let mut registers = self.registers;
        let mut free = registers.rsp - SCRATCH;
        let mut values = [0; 6];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = match argument {
                Argument::Number(number) => number as u64,
                Argument::Bytes(bytes) => {
                    free = (free - bytes.len() as u64) & !0xf;
                    self.memory.write_all_at(&bytes, free).unwrap();
                    free
                }
            };
        }
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = values;
        (registers.rip, registers.rax) = (self.instruction, number as u64);
        // It is in no call that would have to begin again.
        registers.orig_rax = u64::MAX;
        self.write(&mut registers);
        let mut filter = false;
        while self.read().rip == self.instruction {
            filter |= self.step() == libc::SIGSYS;
        }
        // After what a filter has to say comes what a step has.
        while self.has_pending_trap() {
            self.step();
        }
        match (filter, self.read().rax as i64) {
            (true, _) => Err(Refusal::Filter),
            (false, error @ -4095..0) => Err(Refusal::Errno(-error as i32)),
            (false, result) => Ok(result),
        }
    }

    /// Lets it go with call `number` to make, and what follows from that to bear.
    pub fn make(mut self, number: c_long) {
        (self.registers.rip, self.registers.rax) = (self.instruction, number as u64);
        self.registers.orig_rax = u64::MAX;
    }

    /// One instruction, and the signal that stops it then, which is not delivered.
    fn step(&self) -> i32 {
        ptrace(libc::PTRACE_SINGLESTEP, self.thread, 0, std::ptr::null_mut()).unwrap();
        self.stop()
    }

    fn stop(&self) -> i32 {
        let mut status = 0;
        // SAFETY: it writes to a number of ours.
        let thread = unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) };
        assert!(thread == self.thread && libc::WIFSTOPPED(status), "it ended: {status:#x}");
        libc::WSTOPSIG(status)
    }

    fn has_pending_trap(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.thread)).unwrap();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap();
        u64::from_str_radix(pending.trim(), 16).unwrap() & 1 << (libc::SIGTRAP - 1) != 0
    }

    fn read(&self) -> user_regs_struct {
        let mut registers = self.registers;
        ptrace(libc::PTRACE_GETREGS, self.thread, 0, (&raw mut registers).cast()).unwrap();
        registers
    }

    fn write(&self, registers: &mut user_regs_struct) {
        ptrace(libc::PTRACE_SETREGS, self.thread, 0, (&raw mut *registers).cast()).unwrap();
    }
}

impl Drop for Captive {
    fn drop(&mut self) {
        // Of a process that has been killed meanwhile nothing is left to let go.
        let mut registers = self.registers;
        let _ = ptrace(libc::PTRACE_SETREGS, self.thread, 0, (&raw mut registers).cast());
        let _ = ptrace(libc::PTRACE_DETACH, self.thread, 0, std::ptr::null_mut());
    }
}
