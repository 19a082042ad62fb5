//! Folders of the host's in a guest: a FUSE server in this process (virtio 1.3, 5.11).
//!
//! [`Folders`] opens them. `wire` is what requests and replies look like. [`Server`] reads and answers them. [`Folder`] does what they ask for, with
//! `Nodes` for the files that the guest knows, `Handles` for those that it has open, `Locks` for those that it locks, and [`Owners`]
//! for whom it sees them belong to. All of it may be hostile: a name is one component, what it names is found below the folder and
//! nowhere else, and a link is only ever read. None of it knows a device or a machine.

mod acl;
mod folder;
mod folders;
mod handles;
mod kept;
mod locks;
mod nodes;
mod owners;
mod server;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

pub use folder::{Folder, SavedLocks, Terms};
pub use folders::{Error, Folders};
pub use owners::Owners;
pub use server::{Outcome, Server, State, Waiting};
