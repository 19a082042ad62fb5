//! Pools: machines that are ready before they are asked for.
//!
//! A pool is a process with spares: processes of their own, each with a machine that was restored and stands still before its first
//! instruction. Whoever asks the pool for machines gets spares, which run from then on under names of their own, and are the pool's
//! no longer. `stock` decides what is made and given away, `orders` acts on it and hears clients and spares, [`Spare`] is the pool as
//! a spare sees it. What the process of a spare is, the program knows ([`Maker`]).

mod children;
mod names;
mod orders;
mod spare;
mod stock;
mod takes;

use std::error;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::channel;

use serde::{Deserialize, Serialize};

use crate::api;
use crate::api::registry::Registry;
use crate::api::signals::Signals;
use crate::config;
use crate::event_loop::EventLoop;
use crate::threads::Role;
use children::Children;
use orders::{Orders, Work};

pub use spare::{Reason, Spare, Wanted};

/// The most spares of a pool.
pub const MAX_SIZE: u32 = 256;
/// The most machines that are taken at once.
pub const MAX_TAKEN: u32 = 1000;

/// How a pool stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What its machines are copies of, as it was named.
    pub source: String,
    /// Spares that it is to have.
    pub size: u32,
    /// Spares that stand ready.
    pub ready: u32,
    /// Machines that were taken so far.
    pub taken: u64,
    /// Memory that a spare has for itself, in bytes: the middle of those that are ready.
    pub private_bytes: Option<u64>,
    /// Why the last spare could not be made; absent once one could.
    #[serde(default)]
    pub failure: Option<String>,
    /// That was so time and again: none is made any more.
    #[serde(default)]
    pub gave_up: bool,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its name is taken, or it cannot be reached.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// It cannot have this name.
    #[error(transparent)]
    Config(#[from] config::Invalid),
    /// Its first spares could not be made.
    #[error("{}", .0.error)]
    Spare(Reason),
    /// The program could not go on when it was ready.
    #[error(transparent)]
    Maker(Box<dyn error::Error + Send + Sync>),
}

/// What a pool needs of the program that it is part of. Called on the thread of [`run`].
pub trait Maker {
    /// Starts the process of a spare called `spare`, which has `socket` for its [`Spare`].
    ///
    /// # Errors
    /// There can be no process.
    fn make(&mut self, spare: &str, socket: OwnedFd) -> io::Result<Child>;

    /// All spares are ready for the first time.
    ///
    /// # Errors
    /// The pool is not to be.
    fn ready(&mut self) -> Result<(), Box<dyn error::Error + Send + Sync>>;

    /// The process of a spare has ended that nobody has taken: nothing is to be left of it.
    fn clean_up(&mut self, spare: &str);
}

/// Keeps `size` spares of `source` under `name`, until a signal or a client ends that. Spares end with it, and machines that were
/// taken do not. Whoever reads from the pipe `starter` waits for the first spares: they are made as long as somebody does.
///
/// # Errors
/// [`Error`]; no spare is left.
pub fn run(
    name: &str,
    source: &str,
    size: u32,
    starter: OwnedFd,
    maker: &mut dyn Maker,
) -> Result<(), Error> {
    let failed = |error| Error::Api(api::Error::Thread(error));
    config::check_name(name)?;
    let registry = Registry::of_user();
    let signals = Signals::take().map_err(failed)?;
    let entry = Arc::new(registry.register_pool(name)?);
    let events = EventLoop::new().map_err(failed)?;
    let (work, waiting) = channel();
    let orders = Orders::new(&entry, &registry, (name, source, size), signals, starter, work);
    let orders = orders.map_err(failed)?;
    let orders = events.add(orders).map_err(failed)?;
    events.run(Role::Control).map_err(failed)?;
    let mut children = Children::new(name, &registry);
    let result = loop {
        // The loop holds the other end.
        match waiting.recv().unwrap_or(Work::End) {
            Work::Make(number, socket) => children.make(number, socket, maker),
            Work::Ready => {
                if let Err(error) = maker.ready() {
                    break Err(Error::Maker(error));
                }
            }
            Work::Runs(number) => children.let_go(number),
            Work::Remove(number, called) => children.remove(number, called, maker),
            Work::Reap => children.reap(maker),
            Work::GiveUp(reason) => break Err(Error::Spare(reason)),
            Work::End => break Ok(()),
        }
    };
    // Spares end when their sockets do. A client waits for its connection to end, and then for the name to be free.
    drop(orders);
    children.end(maker);
    result
}
