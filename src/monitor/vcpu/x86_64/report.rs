//! The report of a failed run: what happened, what to try, registers, and the code at RIP.
//!
//! Written for the person in front of the terminal; called once, by the vCPU thread that failed.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

use super::{linear, registers};
use crate::kvm::exit::Stuck;
use crate::kvm::{self, Error, Vcpu};
use crate::memory::GuestRam;
use crate::vcpu::dispatch::End;

/// The report; none for an end that is not a failure.
pub fn report(vcpu: &Vcpu, ram: &GuestRam, end: &Result<End, Error>) -> Option<String> {
    let mut text = String::new();
    let mut bytes = None;
    let id = vcpu.id();
    let line = match end {
        Ok(End::Shutdown | End::Reset | End::Exit(_) | End::Panic | End::NothingToBoot) => return None,
        Ok(End::TripleFault) => format!(
            "vcpu{id}: triple fault: an exception while delivering a double fault, most often because the guest has no \
             valid IDT or stack yet; to see its early output: `serial=stdio` `cmdline='console=ttyS0 earlyprintk=serial'`"
        ),
        Ok(End::Stuck(Stuck::FailEntry { reason, cpu })) => format!(
            "vcpu{id}: the processor refused to enter the guest (hardware reason {reason:#x}, host CPU {cpu}): \
             its register state is invalid; the host's kernel log may say more (dmesg)"
        ),
        Ok(End::Stuck(Stuck::InternalError { suberror, instruction })) => {
            bytes = *instruction;
            internal_error(id, *suberror)
        }
        Ok(End::Stuck(Stuck::Unexpected(number))) => {
            format!("vcpu{id}: unexpected KVM exit reason {number}")
        }
        Err(error) => format!("vcpu{id}: {}", crate::error_chain(error)),
    };
    text.push_str(&line);
    if matches!(end, Ok(End::TripleFault)) && at_reset_vector(vcpu) {
        text.push_str(
            "\n  (AMD-V leaves no state behind: KVM has reset the vCPU, and what follows is its state after reset)",
        );
    }
    // Writing to a String does not fail.
    let _ = dump(&mut text, vcpu);
    let _ = instruction(&mut text, vcpu, ram, bytes);
    Some(text)
}

fn internal_error(id: u32, suberror: u32) -> String {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION if !kvm::host_has_hardware_virtualization() => format!(
            "vcpu{id}: the host's KVM could not emulate the instruction below. This processor offers no hardware \
             virtualization (no vmx or svm flag), so KVM emulates every guest instruction, and not all of them: \
             run on a host with VT-x or AMD-V, or with nested virtualization enabled"
        ),
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => format!(
            "vcpu{id}: KVM could not emulate the instruction below; most often the guest ran into, or accessed, an address that \
             has neither RAM nor a device"
        ),
        other => format!("vcpu{id}: KVM internal error, suberror {other}; see the host's kernel log (dmesg)"),
    }
}

/// After a shutdown the VMCB's contents are undefined (APM vol. 2, 15.14.3), so kvm-amd resets the vCPU before it tells.
fn at_reset_vector(vcpu: &Vcpu) -> bool {
    registers::next(vcpu).is_ok_and(|at| at == 0xffff_fff0)
}

fn dump(text: &mut String, vcpu: &Vcpu) -> std::fmt::Result {
    let (Ok(r), Ok(s)) = (vcpu.regs(), vcpu.sregs()) else { return Ok(()) };
    let general = [
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
        [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
        [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
        [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        [("rip", r.rip), ("flg", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
        [("cr3", s.cr3), ("cr4", s.cr4), ("efr", s.efer), ("cs ", u64::from(s.cs.selector))],
    ];
    for row in general {
        write!(text, "\n ")?;
        for (name, value) in row {
            write!(text, " {name}={value:016x}")?;
        }
    }
    Ok(())
}

/// The instruction at RIP: its bytes (KVM's, or those in guest memory) and what they mean.
fn instruction(
    text: &mut String,
    vcpu: &Vcpu,
    ram: &GuestRam,
    known: Option<([u8; 15], usize)>,
) -> std::fmt::Result {
    let (Ok(r), Ok(s)) = (vcpu.regs(), vcpu.sregs()) else { return Ok(()) };
    let mut bytes = [0; linear::MAX_INSTRUCTION];
    let len = match known {
        Some((known, len)) => {
            bytes = known;
            len
        }
        None => linear::read(vcpu, ram, registers::code(&s, r.rip), &mut bytes),
    };
    if len == 0 {
        return write!(text, "\n  no readable memory at rip");
    }
    let bits = registers::bits(&s).into();
    let mut decoder = Decoder::with_ip(bits, &bytes[..len], r.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mut shown = String::new();
    if instruction.is_invalid() {
        shown.push_str("(no valid instruction)");
    } else {
        NasmFormatter::new().format(&instruction, &mut shown);
    }
    let count = if instruction.is_invalid() { len } else { instruction.len() };
    write!(text, "\n  {:#x}: ", r.rip)?;
    bytes[..count].iter().try_for_each(|b| write!(text, "{b:02x} "))?;
    write!(text, " {shown}")
}
