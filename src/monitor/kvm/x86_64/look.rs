//! [`VcpuState`]: what a vCPU does or waits for, for a person who looks at a guest that stands still.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_STOPPED, KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
};
use serde::{Deserialize, Serialize};

use crate::kvm::{Error, Vcpu, ioctl};

// Local APIC registers (SDM vol. 3, table 12-1).
const TPR: usize = 0x80;
const SVR: usize = 0xf0;
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// A vCPU at one moment: run state, local APIC and what is about to be delivered to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Its number.
    pub vcpu: u32,
    /// KVM_GET_MP_STATE in words: `runnable`, `halted` ...
    pub run: String,
    /// The next instruction's address.
    pub rip: u64,
    /// RFLAGS.IF: it takes interrupts.
    pub takes_interrupts: bool,
    /// The local APIC is on (SVR, bit 8).
    pub apic_enabled: bool,
    /// Task priority: vectors up to it wait.
    pub tpr: u8,
    /// Vectors that were requested and not delivered (IRR).
    pub requested: Vec<u8>,
    /// Vectors that were delivered and not ended (ISR).
    pub in_service: Vec<u8>,
    /// The local APIC's timer, in words.
    pub timer: String,
    /// Exceptions, interrupts and NMIs that KVM is about to deliver (KVM_GET_VCPU_EVENTS), in words.
    pub pending: Vec<String>,
}

impl Vcpu {
    /// What it does or waits for. It must stand still.
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn state(&self) -> Result<VcpuState, Error> {
        let regs = self.regs()?;
        let apic = ioctl("KVM_GET_LAPIC", self.fd.get_lapic())?;
        Ok(VcpuState {
            vcpu: self.id(),
            run: run_state(self.mp_state()?.mp_state),
            rip: regs.rip,
            takes_interrupts: regs.rflags & INTERRUPT_FLAG != 0,
            apic_enabled: register(&apic, SVR) & 1 << 8 != 0,
            tpr: register(&apic, TPR) as u8,
            requested: vectors(&apic, IRR),
            in_service: vectors(&apic, ISR),
            timer: self.timer(&apic),
            pending: self.pending()?,
        })
    }

    fn timer(&self, apic: &kvm_lapic_state) -> String {
        let lvt = register(apic, LVT_TIMER);
        let masked = if lvt & 1 << 16 != 0 { ", masked" } else { "" };
        let vector = lvt & 0xff;
        let counts = (register(apic, INITIAL_COUNT), register(apic, CURRENT_COUNT));
        match lvt >> 17 & 3 {
            2 => {
                let (deadline, now) =
                    (self.msr(IA32_TSC_DEADLINE).unwrap_or(0), self.msr(IA32_TSC).unwrap_or(0));
                let when = match deadline.checked_sub(now) {
                    _ if deadline == 0 => "not set".to_owned(),
                    Some(left) => format!("in {left} ticks"),
                    None => format!("{} ticks ago", now - deadline),
                };
                format!("TSC deadline {when}, vector {vector:#x}{masked}")
            }
            mode => {
                let mode = if mode == 0 { "one-shot" } else { "periodic" };
                format!("{mode}, {} of {} left, vector {vector:#x}{masked}", counts.1, counts.0)
            }
        }
    }

    fn pending(&self) -> Result<Vec<String>, Error> {
        let events = ioctl("KVM_GET_VCPU_EVENTS", self.fd.get_vcpu_events())?;
        let mut pending = Vec::new();
        let mut add = |there: u8, what: String| {
            if there != 0 {
                pending.push(what);
            }
        };
        add(events.exception.injected, format!("exception {} injected", events.exception.nr));
        add(events.exception.pending, format!("exception {} pending", events.exception.nr));
        add(events.interrupt.injected, format!("interrupt {:#x} injected", events.interrupt.nr));
        add(events.interrupt.shadow, "interrupts shadowed".to_owned());
        add(events.nmi.injected, "NMI injected".to_owned());
        add(events.nmi.pending, "NMI pending".to_owned());
        add(events.nmi.masked, "NMIs masked".to_owned());
        Ok(pending)
    }
}

fn run_state(state: u32) -> String {
    match state {
        KVM_MP_STATE_RUNNABLE => "runnable".to_owned(),
        KVM_MP_STATE_UNINITIALIZED => "waits for INIT".to_owned(),
        KVM_MP_STATE_INIT_RECEIVED => "waits for SIPI".to_owned(),
        KVM_MP_STATE_HALTED => "halted".to_owned(),
        KVM_MP_STATE_SIPI_RECEIVED => "got SIPI".to_owned(),
        KVM_MP_STATE_STOPPED => "stopped".to_owned(),
        other => format!("state {other}"),
    }
}

fn register(apic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes: Vec<u8> = apic.regs[offset..offset + 4].iter().map(|byte| *byte as u8).collect();
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The vectors whose bits are set in the eight registers from `offset` on, 32 in each.
fn vectors(apic: &kvm_lapic_state, offset: usize) -> Vec<u8> {
    let set = |vector: &u8| {
        let word = register(apic, offset + usize::from(vector / 32) * 0x10);
        word & 1 << (vector % 32) != 0
    };
    (0..=u8::MAX).filter(set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_read_from_their_bits() {
        let mut apic = kvm_lapic_state::default();
        apic.regs[IRR] = 1;
        apic.regs[IRR + 0x70 + 3] = i8::MIN;
        apic.regs[IRR + 0x10 + 1] = 4;
        assert_eq!(vectors(&apic, IRR), [0, 42, 255]);
        assert!(vectors(&apic, ISR).is_empty());
    }
}
