//! A virtual machine monitor on KVM.

pub mod bus;
pub mod config;
pub mod disk;
pub mod event_loop;
pub mod kvm;
pub mod memory;
pub mod state;
pub mod vm;
