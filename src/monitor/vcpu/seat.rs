//! The thread of a vCPU before that runs: something is done on it at once, beside the thread that made it, and then it waits for what
//! it was made for.
//!
//! A start has work for two processors, and the thread of vCPU 0 is needed anyway. A machine that stands ready has all of its.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::threads::{self, Role};

type Work = Box<dyn FnOnce() + Send>;

/// A thread that waits. Dropped, it ends.
#[derive(Debug)]
pub struct Seat {
    role: Role,
    is_inside: bool,
    thread: JoinHandle<()>,
    work: Sender<Work>,
}

impl Seat {
    /// Starts the thread of this vCPU, which does `first`. The receiver gets the result; nothing, if that panicked.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn new<T: Send + 'static>(
        vcpu: u32,
        first: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<(Self, Receiver<T>)> {
        let (tell, told) = channel();
        let (work, waits) = channel::<Work>();
        let role = Role::Vcpu(vcpu);
        let thread = threads::spawn_outside(&role, move || {
            // Whoever asked is gone if something else went wrong meanwhile; then so is the other end of `work`.
            let _ = tell.send(first());
            while let Ok(work) = waits.recv() {
                work();
            }
        })?;
        Ok((Self { role, is_inside: false, thread, work }, told))
    }

    /// Has it do `work` beside the thread that asks. The receiver is as that of [`Seat::new`].
    pub fn meanwhile<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
        let (tell, told) = channel();
        // Where nobody does it, nothing comes.
        let _ = self.work.send(Box::new(move || drop(tell.send(work()))));
        told
    }

    /// Has it enter the jail, where it does all else from now on. Nobody waits for that.
    pub fn enter(&mut self) {
        if !std::mem::replace(&mut self.is_inside, true) {
            let role = self.role.clone();
            // It waits: only a panic in what it did before can have ended it, and no VM came out of that.
            let _ = self.work.send(Box::new(move || threads::enter(&role)));
        }
    }

    /// Has it do `work`, its last, in the jail.
    pub(super) fn run(mut self, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        self.enter();
        let _ = self.work.send(Box::new(work));
        self.thread
    }
}
