//! Containers of our own: processes isolated by namespaces, without a VM.

pub mod container;
pub mod mounts;
