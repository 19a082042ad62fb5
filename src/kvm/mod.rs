//! The only module that issues KVM ioctls.

pub mod regs;
