//! A virtual machine monitor on KVM.

pub mod api;
pub mod boot;
pub mod bus;
pub mod chardev;
pub mod cli;
pub mod config;
pub mod disk;
pub mod event_loop;
pub mod guest_log;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod state;
pub mod vcpu;
pub mod virtio;
pub mod vm;

/// An error and its sources on one line, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
