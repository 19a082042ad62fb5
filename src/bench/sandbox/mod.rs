//! Processes kept apart from the rest of the host by the kernel's own means, without a VM.

pub mod container;
pub mod mounts;
