//! Between `vmm exec` and its like on the host and the agent in a guest (guest/agent): the protocol, the host's end of it, and
//! the tar streams that files travel in. docs/agent.md has the wire format.
//!
//! Both ends take the other for hostile: lengths are checked before memory is, a window bounds what each stream may keep, and
//! what makes no sense ends the session with a reason.

pub mod client;
pub mod port;
pub mod protocol;
pub mod tar;
mod wire;

pub use client::Error;
