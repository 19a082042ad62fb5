//! Shared folders, mounted by this host's kernel: what others wrote to judge file systems, hosts in bad states, and a model.

mod acl;
mod hosts;
mod judges;
mod locks;
mod model;
mod mount;
mod others;
