//! The one place in the monitor that makes threads, each for a [`Role`].
//!
//! A [`Role`] gives a thread its name, says whether it takes the process's signals, and which system calls it makes ([`sandbox`]).
//! Threads are made before the guest runs or by the control thread, never by a vCPU's.

use std::io;
use std::marker::PhantomData;
use std::process;
use std::thread::{Builder, JoinHandle};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm_sys_util::signal::{block_signal, unblock_signal};

use crate::error_chain;
use crate::sandbox::limits::pin_vcpu;
use crate::sandbox::{self, Needs};

/// What a thread is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Builds the machine, waits for its end, and sees to what follows: the thread of [`Session::run`](crate::session::Session::run).
    Main,
    /// Runs a vCPU, by number; that of vCPU 0 sets the VM up before.
    Vcpu(u32),
    /// Takes orders: control socket, signals, terminal; serves the serial port's input.
    Control,
    /// Carries out an order that may take its time.
    Errand,
    /// Works for whoever runs the session, and has this name.
    Owner(&'static str),
    /// Serves the queues of the device of this name, which needs this of the host.
    Device(String, Needs),
    /// Does the blocking I/O of the disk of this name.
    Disk(String),
    /// Writes to an output that may block.
    Output,
    /// Writes log lines.
    Log,
    /// Fetches pages of a saved machine's memory, and ends.
    Fetch,
}

impl Role {
    /// The thread's name, which the kernel cuts to 15 bytes.
    fn name(&self) -> String {
        match self {
            Self::Main => "vmm".to_owned(),
            Self::Vcpu(number) => format!("vcpu{number}"),
            Self::Control => "control".to_owned(),
            Self::Errand => "errand".to_owned(),
            Self::Owner(name) => (*name).to_owned(),
            Self::Device(name, _) | Self::Disk(name) => name.clone(),
            Self::Output => "output".to_owned(),
            Self::Log => "log".to_owned(),
            Self::Fetch => "fetch".to_owned(),
        }
    }
}

/// Starts a thread of this role, in the jail that the process has, if it has one.
///
/// # Errors
/// The host is out of threads.
pub fn spawn<T: Send + 'static>(
    role: Role,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let as_role = role.clone();
    spawn_outside(&role, move || {
        if as_role == Role::Control {
            ORDERS.iter().for_each(|signal| _ = unblock_signal(*signal));
        }
        enter(&as_role);
        run()
    })
}

/// The same, not yet in the jail: for who has to set something up before it can [`enter`] that.
///
/// # Errors
/// The host is out of threads.
pub fn spawn_outside<T: Send + 'static>(
    role: &Role,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let vcpu = if let Role::Vcpu(number) = role { Some(*number) } else { None };
    Builder::new().name(role.name()).spawn(move || {
        vcpu.into_iter().for_each(pin_vcpu);
        run()
    })
}

/// The calling thread is in the jail from now on, as `role`. If the kernel refuses that the process ends: nothing is done for a guest
/// outside.
pub fn enter(role: &Role) {
    if let Err(error) = sandbox::enter(role) {
        log::error!("{}", error_chain(&error));
        process::abort();
    }
}

/// Signals that are orders.
pub const ORDERS: [i32; 3] = [SIGHUP, SIGINT, SIGTERM];

/// Does `wait` on a thread that takes no orders by signal, and has it take them meanwhile.
pub fn hear_orders<T>(wait: impl FnOnce() -> T) -> T {
    ORDERS.iter().for_each(|signal| _ = unblock_signal(*signal));
    let result = wait();
    ORDERS.iter().for_each(|signal| _ = block_signal(*signal));
    result
}

/// While this lives, the thread that made it takes no orders by signal, nor do those that it starts, except for the control
/// thread: the kernel gives a signal to any thread that takes it, even to one that a hung disk holds up for ever.
#[derive(Debug)]
pub struct OrdersElsewhere {
    blocked: Vec<i32>,
    /// What was blocked on a thread has to be unblocked on it.
    _of_thread: PhantomData<*const ()>,
}

impl OrdersElsewhere {
    /// Until there is a control thread, signals wait. To be called before any other thread starts.
    pub fn from_now_on() -> Self {
        // Those that were blocked before stay so.
        let blocked = ORDERS.into_iter().filter(|signal| block_signal(*signal).is_ok()).collect();
        Self { blocked, _of_thread: PhantomData }
    }
}

impl Drop for OrdersElsewhere {
    fn drop(&mut self) {
        self.blocked.iter().for_each(|signal| _ = unblock_signal(*signal));
    }
}
