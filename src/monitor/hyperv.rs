//! Microsoft's hypervisor interface, as far as KVM leaves it to the monitor: what comes out of the guest, and who answers.
//!
//! Source: Hypervisor Top-Level Functional Specification (TLFS).

use serde::{Deserialize, Serialize};

/// Hypercall status: no such call.
pub const INVALID_HYPERCALL_CODE: u64 = 2;
/// Hypercall status: a connection of this number is not there.
pub const INVALID_CONNECTION_ID: u64 = 0x12;
/// HvCallPostMessage.
pub const POST_MESSAGE: u16 = 0x5c;
/// HvCallSignalEvent.
pub const SIGNAL_EVENT: u16 = 0x5d;

/// The state of a vCPU's interrupt controller of Hyper-V's (SynIC; TLFS, SynIC MSRs): as the guest wrote it to its MSRs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synic {
    /// SCONTROL: bit 0 is on.
    pub control: u64,
    /// SIEFP: the event flags page; bit 0 is on.
    pub events: u64,
    /// SIMP: the message page; bit 0 is on.
    pub messages: u64,
}

/// Who answers the hypercalls of Hyper-V's interface that KVM leaves to the monitor. Called by vCPU threads that hold its
/// mutex; rules as for [`Device`](crate::bus::Device).
pub trait Hypercalls: Send {
    /// vCPU `vcpu` has set its interrupt controller up.
    fn set_synic(&mut self, vcpu: u32, synic: Synic);
    /// A hypercall, and its status (TLFS, Hypercall Interface).
    fn call(&mut self, input: u64, parameters: [u64; 2]) -> u64;
}

/// The status of a hypercall where nobody has connections to anything.
pub fn unanswered(input: u64) -> u64 {
    match input as u16 {
        POST_MESSAGE | SIGNAL_EVENT => INVALID_CONNECTION_ID,
        _ => INVALID_HYPERCALL_CODE,
    }
}
