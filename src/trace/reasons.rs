//! Hardware exit reasons: what made the processor leave the guest, by the numbers and names of both architectures.
//!
//! VT-x: the basic exit reasons of the Intel SDM, vol. 3, appendix C. AMD-V: the intercept exit codes of the AMD APM, vol. 2,
//! appendix C. KVM shows its user only KVM_EXIT_*; [`of`] goes back to the reason behind it.

use vmm_monitor::config::msr;
use vmm_monitor::recorder::{Event, Kind};

/// A reason in both architectures' terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason {
    /// VT-x basic exit reason.
    pub vtx: u16,
    /// AMD-V exit code.
    pub svm: u16,
}

/// VT-x basic exit reasons: number and name.
pub const VTX: [(u16, &str); 72] = [
    (0, "exception or NMI"),
    (1, "external interrupt"),
    (2, "triple fault"),
    (3, "INIT signal"),
    (4, "start-up IPI"),
    (5, "I/O SMI"),
    (6, "other SMI"),
    (7, "interrupt window"),
    (8, "NMI window"),
    (9, "task switch"),
    (10, "CPUID"),
    (11, "GETSEC"),
    (12, "HLT"),
    (13, "INVD"),
    (14, "INVLPG"),
    (15, "RDPMC"),
    (16, "RDTSC"),
    (17, "RSM"),
    (18, "VMCALL"),
    (19, "VMCLEAR"),
    (20, "VMLAUNCH"),
    (21, "VMPTRLD"),
    (22, "VMPTRST"),
    (23, "VMREAD"),
    (24, "VMRESUME"),
    (25, "VMWRITE"),
    (26, "VMXOFF"),
    (27, "VMXON"),
    (28, "control-register access"),
    (29, "MOV DR"),
    (30, "I/O instruction"),
    (31, "RDMSR"),
    (32, "WRMSR"),
    (33, "VM-entry failure: invalid guest state"),
    (34, "VM-entry failure: MSR loading"),
    (36, "MWAIT"),
    (37, "monitor trap flag"),
    (39, "MONITOR"),
    (40, "PAUSE"),
    (41, "VM-entry failure: machine check"),
    (43, "TPR below threshold"),
    (44, "APIC access"),
    (45, "virtualized EOI"),
    (46, "access to GDTR or IDTR"),
    (47, "access to LDTR or TR"),
    (48, "EPT violation"),
    (49, "EPT misconfiguration"),
    (50, "INVEPT"),
    (51, "RDTSCP"),
    (52, "VMX-preemption timer"),
    (53, "INVVPID"),
    (54, "WBINVD"),
    (55, "XSETBV"),
    (56, "APIC write"),
    (57, "RDRAND"),
    (58, "INVPCID"),
    (59, "VMFUNC"),
    (60, "ENCLS"),
    (61, "RDSEED"),
    (62, "page-modification log full"),
    (63, "XSAVES"),
    (64, "XRSTORS"),
    (65, "PCONFIG"),
    (66, "SPP-related event"),
    (67, "UMWAIT"),
    (68, "TPAUSE"),
    (69, "LOADIWKEY"),
    (70, "ENCLV"),
    (72, "ENQCMD PASID translation failure"),
    (73, "ENQCMDS PASID translation failure"),
    (74, "bus lock"),
    (75, "instruction timeout"),
];

/// AMD-V exit codes that stand alone: number and name. Ranges (CR, DR, exceptions) are [`svm_name`]'s.
pub const SVM: [(u16, &str); 58] = [
    (0x60, "INTR"),
    (0x61, "NMI"),
    (0x62, "SMI"),
    (0x63, "INIT"),
    (0x64, "VINTR"),
    (0x65, "CR0_SEL_WRITE"),
    (0x66, "IDTR_READ"),
    (0x67, "GDTR_READ"),
    (0x68, "LDTR_READ"),
    (0x69, "TR_READ"),
    (0x6a, "IDTR_WRITE"),
    (0x6b, "GDTR_WRITE"),
    (0x6c, "LDTR_WRITE"),
    (0x6d, "TR_WRITE"),
    (0x6e, "RDTSC"),
    (0x6f, "RDPMC"),
    (0x70, "PUSHF"),
    (0x71, "POPF"),
    (0x72, "CPUID"),
    (0x73, "RSM"),
    (0x74, "IRET"),
    (0x75, "SWINT"),
    (0x76, "INVD"),
    (0x77, "PAUSE"),
    (0x78, "HLT"),
    (0x79, "INVLPG"),
    (0x7a, "INVLPGA"),
    (0x7b, "IOIO"),
    (0x7c, "MSR"),
    (0x7d, "TASK_SWITCH"),
    (0x7e, "FERR_FREEZE"),
    (0x7f, "SHUTDOWN"),
    (0x80, "VMRUN"),
    (0x81, "VMMCALL"),
    (0x82, "VMLOAD"),
    (0x83, "VMSAVE"),
    (0x84, "STGI"),
    (0x85, "CLGI"),
    (0x86, "SKINIT"),
    (0x87, "RDTSCP"),
    (0x88, "ICEBP"),
    (0x89, "WBINVD"),
    (0x8a, "MONITOR"),
    (0x8b, "MWAIT"),
    (0x8c, "MWAIT_CONDITIONAL"),
    (0x8d, "XSETBV"),
    (0x8e, "RDPRU"),
    (0x8f, "EFER_WRITE_TRAP"),
    (0xa0, "INVLPGB"),
    (0xa1, "INVLPGB_ILLEGAL"),
    (0xa2, "INVPCID"),
    (0xa3, "MCOMMIT"),
    (0xa4, "TLBSYNC"),
    (0x400, "NPF"),
    (0x401, "AVIC_INCOMPLETE_IPI"),
    (0x402, "AVIC_NOACCEL"),
    (0x403, "VMGEXIT"),
    // All ones as hardware gives it; this is its low half.
    (0xffff, "INVALID"),
];

/// The name of a VT-x basic exit reason.
pub fn vtx_name(number: u16) -> &'static str {
    VTX.iter().find(|(known, _)| *known == number).map_or("reserved", |(_, name)| name)
}

/// The name of an AMD-V exit code.
pub fn svm_name(code: u16) -> String {
    match code {
        0x00..=0x0f => format!("CR{code}_READ"),
        0x10..=0x1f => format!("CR{}_WRITE", code - 0x10),
        0x20..=0x2f => format!("DR{}_READ", code - 0x20),
        0x30..=0x3f => format!("DR{}_WRITE", code - 0x30),
        0x40..=0x5f => format!("EXCP{}", code - 0x40),
        0x90..=0x9f => format!("CR{}_WRITE_TRAP", code - 0x90),
        _ => SVM.iter().find(|(known, _)| *known == code).map_or("reserved", |(_, name)| name).to_owned(),
    }
}

/// Names that KVM gives reasons in its trace events, where they are not those of the tables above in other letters: VT-x
/// (arch/x86/include/uapi/asm/vmx.h).
const KVM_VTX: [(&str, u16); 32] = [
    ("EXCEPTION_NMI", 0),
    ("EXTERNAL_INTERRUPT", 1),
    ("TRIPLE_FAULT", 2),
    ("INIT_SIGNAL", 3),
    ("SIPI_SIGNAL", 4),
    ("INTERRUPT_WINDOW", 7),
    ("NMI_WINDOW", 8),
    ("TASK_SWITCH", 9),
    ("CR_ACCESS", 28),
    ("DR_ACCESS", 29),
    ("IO_INSTRUCTION", 30),
    ("MSR_READ", 31),
    ("MSR_WRITE", 32),
    ("INVALID_STATE", 33),
    ("MSR_LOAD_FAIL", 34),
    ("MWAIT_INSTRUCTION", 36),
    ("MONITOR_TRAP_FLAG", 37),
    ("MONITOR_INSTRUCTION", 39),
    ("PAUSE_INSTRUCTION", 40),
    ("MCE_DURING_VMENTRY", 41),
    ("TPR_BELOW_THRESHOLD", 43),
    ("APIC_ACCESS", 44),
    ("EOI_INDUCED", 45),
    ("GDTR_IDTR", 46),
    ("LDTR_TR", 47),
    ("EPT_VIOLATION", 48),
    ("EPT_MISCONFIG", 49),
    ("PREEMPTION_TIMER", 52),
    ("APIC_WRITE", 56),
    ("PML_FULL", 62),
    ("BUS_LOCK", 74),
    ("NOTIFY", 75),
];

/// The same for AMD-V (svm.h there).
const KVM_SVM: [(&str, u16); 9] = [
    ("interrupt", 0x60),
    ("io", 0x7b),
    ("msr", 0x7c),
    ("hypercall", 0x81),
    ("DB excp", 0x41),
    ("BP excp", 0x43),
    ("UD excp", 0x46),
    ("PF excp", 0x4e),
    ("AC excp", 0x51),
];

/// The number and our name of the reason that KVM calls `name`: VT-x's if `vtx`, else AMD-V's.
pub fn by_kvm_name(name: &str, vtx: bool) -> Option<(u16, String)> {
    let given =
        |table: &[(&str, u16)]| table.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    if vtx {
        let plain =
            || VTX.iter().find(|(_, known)| known.eq_ignore_ascii_case(name)).map(|(number, _)| *number);
        let number = given(&KVM_VTX).or_else(plain)?;
        return Some((number, vtx_name(number).to_owned()));
    }
    // "read_cr4" is CR4_READ.
    let turned =
        name.split_once('_').map_or_else(String::new, |(access, register)| format!("{register}_{access}"));
    let is = |code: u16| [name, turned.as_str()].iter().any(|text| svm_name(code).eq_ignore_ascii_case(text));
    let code = given(&KVM_SVM).or_else(|| (0..=0x403).find(|code| is(*code)))?;
    Some((code, svm_name(code)))
}

/// The reason behind an exit that reached the monitor; `None` where hardware had no part in it (a signal to the thread), or
/// where it cannot be told.
///
/// An access to an address without memory is an EPT violation the first time; KVM on VT-x then marks the page so that later
/// ones are EPT misconfigurations (its MMIO cache). AMD-V knows only nested page faults. On both the emulator decodes it.
pub fn of(kind: Kind) -> Option<Reason> {
    let reason = |vtx, svm| Some(Reason { vtx, svm });
    match kind {
        Kind::PioIn | Kind::PioOut => reason(30, 0x7b),
        Kind::MmioRead | Kind::MmioWrite => reason(49, 0x400),
        Kind::Halt => reason(12, 0x78),
        Kind::Shutdown => reason(2, 0x7f),
        Kind::SystemEvent => reason(32, 0x7c),
        Kind::FailEntry => reason(33, 0xffff),
        Kind::Debug => reason(0, 0x41),
        Kind::IoApicEoi => reason(45, 0x402),
        Kind::MsrRead => reason(31, 0x7c),
        Kind::MsrWrite => reason(32, 0x7c),
        Kind::Hypercall => reason(18, 0x81),
        _ => None,
    }
}

/// What hardware says beside the reason (the exit qualification, EXITINFO1): port, size, direction; or the access.
pub fn qualification(event: &Event) -> Option<String> {
    let size = event.size;
    let string = if event.count > 1 { format!(", string of {}", event.count) } else { String::new() };
    Some(match event.kind()? {
        Kind::PioIn => format!("in {size}B {:#x}{string}", event.address),
        Kind::PioOut => format!("out {size}B {:#x}{string}", event.address),
        Kind::MmioRead => format!("read {size}B at {:#x}", event.address),
        Kind::MmioWrite => format!("write {size}B at {:#x}", event.address),
        Kind::MsrRead => msr::name(event.address as u32),
        Kind::MsrWrite => format!("{} <- {:#x}", msr::name(event.address as u32), event.value),
        Kind::Hypercall => format!("Hyper-V's call {:#x}", event.address & 0xffff),
        Kind::IoApicEoi => format!("vector {:#x}", event.address),
        Kind::SystemEvent => format!("request {}", event.address),
        Kind::FailEntry => format!("reason {:#x}", event.value),
        Kind::InternalError => format!("suberror {}", event.address),
        Kind::Other => format!("KVM exit reason {}", event.address),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_in_order_and_every_reason_has_a_name() {
        assert!(VTX.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(SVM.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for reason in Kind::ALL.into_iter().filter_map(of) {
            assert_ne!(vtx_name(reason.vtx), "reserved");
            assert_ne!(svm_name(reason.svm), "reserved");
        }
        assert_eq!((vtx_name(30), svm_name(0x7b).as_str()), ("I/O instruction", "IOIO"));
        let name = |name, vtx| by_kvm_name(name, vtx).map(|(number, _)| number);
        for (text, code) in
            [("npf", 0x400), ("read_cr4", 4), ("write_dr0", 0x30), ("cpuid", 0x72), ("io", 0x7b)]
        {
            assert_eq!(name(text, false), Some(code), "{text}");
        }
        for (text, number) in [("EPT_VIOLATION", 48), ("CPUID", 10), ("HLT", 12), ("XSETBV", 55)] {
            assert_eq!(name(text, true), Some(number), "{text}");
        }
        assert_eq!(name("nonsense", true).or(name("nonsense", false)), None);
        assert_eq!((vtx_name(35), svm_name(0x13).as_str()), ("reserved", "CR3_WRITE"));
    }
}
