//! Containers of our own: processes isolated by namespaces, without a VM; and a thread that stands back.

pub mod container;
pub mod idle;
pub mod mounts;
