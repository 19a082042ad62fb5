//! Hardware exit reasons: what made the processor leave the guest, by the numbers and names of both vendors.
//!
//! VT-x: the basic exit reasons of the Intel SDM, vol. 3, appendix C. AMD-V: the intercept exit codes of the AMD APM, vol. 2,
//! appendix C. KVM shows its user only KVM_EXIT_*; [`of`] goes back to the reason behind it. [`PAIRS`] is the one table of
//! what the vendors have in common: labs, reports, pages and `vmm top` all ask it.

use std::fmt::{self, Write};
use std::str::FromStr;

use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::config::msr;
use vmm_monitor::recorder::{Event, Kind};

/// Where both vendors list their reasons, for who reads along.
pub const SOURCES: &str = "Intel SDM vol. 3, appendix C; AMD APM vol. 2, appendix C";

/// A reason by one vendor's number: of Intel a VT-x basic exit reason, of AMD an AMD-V exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reason {
    /// Whose number it is.
    pub vendor: Vendor,
    /// The number.
    pub number: u16,
}

/// `VT-x 30 I/O instruction`, `AMD-V 0x7b IOIO`; `{:#}` leaves the vendor out.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            write!(f, "{} ", extension(self.vendor))?;
        }
        match self.vendor {
            Vendor::Intel => write!(f, "{} {}", self.number, vtx_name(self.number)),
            Vendor::Amd => write!(f, "{:#x} {}", self.number, svm_name(self.number)),
        }
    }
}

/// What `vendor` calls hardware virtualization.
pub fn extension(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Intel => "VT-x",
        Vendor::Amd => "AMD-V",
    }
}

/// Whose reasons a host has, by what its CPUID calls the maker. A maker that is neither has Intel's.
pub fn vendor(maker: &str) -> Vendor {
    if maker.as_bytes() == Vendor::Amd.name() { Vendor::Amd } else { Vendor::Intel }
}

/// Whose reasons are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Shown {
    /// Both vendors', the host's own first.
    #[default]
    Both,
    /// One vendor's.
    Only(Vendor),
}

impl FromStr for Shown {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "both" => Ok(Self::Both),
            "intel" => Ok(Self::Only(Vendor::Intel)),
            "amd" => Ok(Self::Only(Vendor::Amd)),
            _ => Err("expected intel, amd or both"),
        }
    }
}

/// A reason as the host's hardware has it, and what the other vendor has for the same event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Both {
    /// The host's own.
    pub own: Reason,
    /// The other vendor's, from and to. None: it has no counterpart.
    pub other: Vec<(Reason, Reason)>,
}

impl Both {
    /// Of `own`, where nothing is known beside the number.
    pub fn of(own: Reason) -> Self {
        Self { own, other: own.counterparts() }
    }

    /// Of an exit that reached the monitor, on a host of `vendor`'s.
    pub fn of_pair(pair: Pair, vendor: Vendor) -> Self {
        let (own, other) = match vendor {
            Vendor::Intel => (pair.vtx(), pair.svm()),
            Vendor::Amd => (pair.svm(), pair.vtx()),
        };
        Self { own, other: vec![(other, other)] }
    }

    /// By what hardware said beside its number, `info1` of KVM's trace event (the exit qualification; EXITINFO1), one of several
    /// counterparts. Exit qualifications: SDM vol. 3, tables 28-3 and 28-4; EXITINFO1: APM vol. 2, 15.11 and 15.25.6.
    pub fn narrowed(mut self, info1: u64) -> Self {
        let bit = |bit: u32| info1 >> bit & 1;
        let number = match (self.own.vendor, self.own.number) {
            // RDMSR or WRMSR.
            (Vendor::Amd, 0x7c) => Some(31 + bit(0) as u16),
            // A reserved bit in the nested page table: KVM's mark for an address without memory, as a misconfiguration is on VT-x.
            (Vendor::Amd, 0x400) => Some(48 + bit(3) as u16),
            // MOV to and from a control register, CLTS, LMSW.
            (Vendor::Intel, 28) => match info1 >> 4 & 3 {
                0 => Some(0x10 + (info1 & 15) as u16),
                1 => Some((info1 & 15) as u16),
                _ => Some(0x10),
            },
            (Vendor::Intel, 29) => Some(0x30 - 0x10 * bit(4) as u16 + (info1 & 7) as u16),
            _ => None,
        };
        if let Some(number) = number {
            let other = Reason { vendor: self.own.vendor.other(), number };
            self.other = vec![(other, other)];
        }
        self
    }

    /// One vendor's number, where there is exactly one.
    pub fn single(&self, vendor: Vendor) -> Option<Reason> {
        match self.other[..] {
            _ if vendor == self.own.vendor => Some(self.own),
            [(from, to)] if from == to => Some(from),
            _ => None,
        }
    }

    /// One vendor's name for it: `30 I/O instruction`, or that there is none.
    pub fn name(&self, vendor: Vendor) -> String {
        if vendor == self.own.vendor {
            return format!("{:#}", self.own);
        }
        let mut text = String::new();
        for (from, to) in &self.other {
            // Writing to a String does not fail.
            let _ = write!(text, "{}{from:#}", if text.is_empty() { "" } else { ", " });
            if from != to {
                let _ = write!(text, " to {to:#}");
            }
        }
        if text.is_empty() { "no counterpart".to_owned() } else { text }
    }

    /// The whole of it: `AMD-V 0x7b IOIO = VT-x 30 I/O instruction`.
    pub fn text(&self, shown: Shown) -> String {
        let one = |vendor| format!("{} {}", extension(vendor), self.name(vendor));
        let (own, other) = (self.own.vendor, self.own.vendor.other());
        match shown {
            Shown::Only(vendor) if vendor == own => one(own),
            Shown::Only(vendor) if self.other.is_empty() => {
                format!("no {} counterpart of {}", extension(vendor), self.own)
            }
            Shown::Only(vendor) => one(vendor),
            Shown::Both if self.other.is_empty() => {
                format!("{}, no {} counterpart", self.own, extension(other))
            }
            Shown::Both => format!("{} = {}", one(own), one(other)),
        }
    }
}

/// A reason in both vendors' terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// VT-x basic exit reason.
    pub vtx: u16,
    /// AMD-V exit code.
    pub svm: u16,
}

impl Pair {
    /// Intel's side.
    pub fn vtx(self) -> Reason {
        Reason { vendor: Vendor::Intel, number: self.vtx }
    }

    /// AMD's side.
    pub fn svm(self) -> Reason {
        Reason { vendor: Vendor::Amd, number: self.svm }
    }
}

/// The same event on both: a VT-x basic exit reason, and AMD-V exit codes, from and to. What is in no row has no counterpart
/// (VMREAD, or PUSHF). Two rows may share a code: AMD-V has one for reading and writing MSRs.
pub const PAIRS: [(u16, &[(u16, u16)]); 41] = [
    // Exceptions by vector, NMI, and INT1 (ICEBP), which is an exception on VT-x.
    (0, &[(0x40, 0x5f), (0x61, 0x61), (0x88, 0x88)]),
    (1, &[(0x60, 0x60)]),
    (2, &[(0x7f, 0x7f)]),
    (3, &[(0x63, 0x63)]),
    (5, &[(0x62, 0x62)]),
    (6, &[(0x62, 0x62)]),
    (7, &[(0x64, 0x64)]),
    // AMD-V has no NMI window: KVM waits for the handler's IRET.
    (8, &[(0x74, 0x74)]),
    (9, &[(0x7d, 0x7d)]),
    (10, &[(0x72, 0x72)]),
    (12, &[(0x78, 0x78)]),
    (13, &[(0x76, 0x76)]),
    (14, &[(0x79, 0x79)]),
    (15, &[(0x6f, 0x6f)]),
    (16, &[(0x6e, 0x6e)]),
    (17, &[(0x73, 0x73)]),
    (18, &[(0x81, 0x81)]),
    (20, &[(0x80, 0x80)]),
    (24, &[(0x80, 0x80)]),
    (28, &[(0x00, 0x1f), (0x65, 0x65), (0x90, 0x9f)]),
    (29, &[(0x20, 0x3f)]),
    (30, &[(0x7b, 0x7b)]),
    (31, &[(0x7c, 0x7c)]),
    (32, &[(0x7c, 0x7c), (0x8f, 0x8f)]),
    (33, &[(0xffff, 0xffff)]),
    (36, &[(0x8b, 0x8c)]),
    (39, &[(0x8a, 0x8a)]),
    (40, &[(0x77, 0x77)]),
    (44, &[(0x402, 0x402)]),
    (45, &[(0x402, 0x402)]),
    (46, &[(0x66, 0x67), (0x6a, 0x6b)]),
    (47, &[(0x68, 0x69), (0x6c, 0x6d)]),
    (48, &[(0x400, 0x400)]),
    (49, &[(0x400, 0x400)]),
    (51, &[(0x87, 0x87)]),
    (53, &[(0x7a, 0x7a)]),
    (54, &[(0x89, 0x89)]),
    (55, &[(0x8d, 0x8d)]),
    (56, &[(0x401, 0x402)]),
    (58, &[(0xa2, 0xa2)]),
    (74, &[(0xa5, 0xa5)]),
];

impl Reason {
    /// What the other vendor has for the same event, from and to, by [`PAIRS`].
    pub fn counterparts(self) -> Vec<(Self, Self)> {
        let vendor = self.vendor.other();
        let reason = |number| Self { vendor, number };
        let has = |codes: &[(u16, u16)]| codes.iter().any(|(from, to)| (*from..=*to).contains(&self.number));
        match self.vendor {
            Vendor::Intel => {
                let rows = PAIRS.iter().filter(|(vtx, _)| *vtx == self.number);
                rows.flat_map(|(_, codes)| *codes).map(|(from, to)| (reason(*from), reason(*to))).collect()
            }
            Vendor::Amd => {
                let rows = PAIRS.iter().filter(|(_, codes)| has(codes));
                rows.map(|(vtx, _)| (reason(*vtx), reason(*vtx))).collect()
            }
        }
    }

    /// Whether it is one of these VT-x basic exit reasons, or AMD-V's counterpart of one.
    pub fn is_one_of(self, vtx: &[u16]) -> bool {
        match self.vendor {
            Vendor::Intel => vtx.contains(&self.number),
            Vendor::Amd => self.counterparts().iter().any(|(reason, _)| vtx.contains(&reason.number)),
        }
    }
}

/// VT-x basic exit reasons: number and name.
const VTX: [(u16, &str); 72] = [
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
const SVM: [(u16, &str); 60] = [
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
    (0xa5, "BUSLOCK"),
    (0xa6, "IDLE_HLT"),
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

/// The reason that KVM calls `name` on a host of `vendor`'s.
pub fn by_kvm_name(name: &str, vendor: Vendor) -> Option<Reason> {
    let given =
        |table: &[(&str, u16)]| table.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    if vendor == Vendor::Intel {
        let plain =
            || VTX.iter().find(|(_, known)| known.eq_ignore_ascii_case(name)).map(|(number, _)| *number);
        return Some(Reason { vendor, number: given(&KVM_VTX).or_else(plain)? });
    }
    // "read_cr4" is CR4_READ.
    let turned =
        name.split_once('_').map_or_else(String::new, |(access, register)| format!("{register}_{access}"));
    let is = |code: u16| [name, turned.as_str()].iter().any(|text| svm_name(code).eq_ignore_ascii_case(text));
    Some(Reason { vendor, number: given(&KVM_SVM).or_else(|| (0..=0x403).find(|code| is(*code)))? })
}

/// The reason behind an exit that reached the monitor; `None` where hardware had no part in it (a signal to the thread), or
/// where it cannot be told.
///
/// An access to an address without memory is an EPT violation the first time; KVM on VT-x then marks the page so that later
/// ones are EPT misconfigurations (its MMIO cache). AMD-V knows only nested page faults. On both the emulator decodes it.
pub fn of(kind: Kind) -> Option<Pair> {
    let reason = |vtx, svm| Some(Pair { vtx, svm });
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

    fn vtx(number: u16) -> Reason {
        Reason { vendor: Vendor::Intel, number }
    }

    fn svm(number: u16) -> Reason {
        Reason { vendor: Vendor::Amd, number }
    }

    #[test]
    fn the_tables_are_in_order_and_every_reason_has_a_name() {
        assert!(VTX.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(SVM.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(PAIRS.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (vtx, codes) in PAIRS {
            assert_ne!(vtx_name(vtx), "reserved", "{vtx}");
            for code in codes.iter().flat_map(|(from, to)| [*from, *to]) {
                assert_ne!(svm_name(code), "reserved", "{code:#x}");
            }
        }
        assert_eq!((vtx_name(30), svm_name(0x7b).as_str()), ("I/O instruction", "IOIO"));
        let number = |name, vendor| by_kvm_name(name, vendor).map(|reason| reason.number);
        for (text, code) in
            [("npf", 0x400), ("read_cr4", 4), ("write_dr0", 0x30), ("cpuid", 0x72), ("io", 0x7b)]
        {
            assert_eq!(number(text, Vendor::Amd), Some(code), "{text}");
        }
        for (text, basic) in [("EPT_VIOLATION", 48), ("CPUID", 10), ("HLT", 12), ("XSETBV", 55)] {
            assert_eq!(number(text, Vendor::Intel), Some(basic), "{text}");
        }
        assert_eq!(number("nonsense", Vendor::Intel).or(number("nonsense", Vendor::Amd)), None);
        assert_eq!((vtx_name(35), svm_name(0x13).as_str()), ("reserved", "CR3_WRITE"));
    }

    #[test]
    fn exits_to_the_monitor_are_paired_as_the_table_says() {
        for pair in Kind::ALL.into_iter().filter_map(of) {
            let holds = |one: Reason, other: Reason| {
                one.counterparts().iter().any(|(from, to)| (from..=to).contains(&&other))
            };
            assert!(holds(pair.vtx(), pair.svm()) && holds(pair.svm(), pair.vtx()), "{pair:?}");
        }
    }

    #[test]
    fn every_reason_is_told_in_both_vendors_terms_or_has_no_counterpart() {
        for (own, shown, text) in [
            (vtx(30), Shown::Both, "VT-x 30 I/O instruction = AMD-V 0x7b IOIO"),
            (svm(0x7b), Shown::Both, "AMD-V 0x7b IOIO = VT-x 30 I/O instruction"),
            (svm(0x7b), Shown::Only(Vendor::Amd), "AMD-V 0x7b IOIO"),
            (svm(0x7b), Shown::Only(Vendor::Intel), "VT-x 30 I/O instruction"),
            (svm(0x7c), Shown::Both, "AMD-V 0x7c MSR = VT-x 31 RDMSR, 32 WRMSR"),
            (svm(0x14), Shown::Both, "AMD-V 0x14 CR4_WRITE = VT-x 28 control-register access"),
            (vtx(29), Shown::Both, "VT-x 29 MOV DR = AMD-V 0x20 DR0_READ to 0x3f DR15_WRITE"),
            (svm(0x84), Shown::Both, "AMD-V 0x84 STGI, no VT-x counterpart"),
            (svm(0x84), Shown::Only(Vendor::Intel), "no VT-x counterpart of AMD-V 0x84 STGI"),
            (vtx(52), Shown::Only(Vendor::Amd), "no AMD-V counterpart of VT-x 52 VMX-preemption timer"),
        ] {
            assert_eq!(Both::of(own).text(shown), text);
        }
        for (own, info1, other) in [
            (svm(0x7c), 1, "32 WRMSR"),
            (svm(0x7c), 0, "31 RDMSR"),
            (svm(0x400), 0x1_0000_0004, "48 EPT violation"),
            (svm(0x400), 0x1_0000_000d, "49 EPT misconfiguration"),
            (vtx(28), 0x0004, "0x14 CR4_WRITE"),
            (vtx(28), 0x0013, "0x3 CR3_READ"),
            (vtx(29), 0x0017, "0x27 DR7_READ"),
            (vtx(29), 0x0007, "0x37 DR7_WRITE"),
            (vtx(12), 7, "0x78 HLT"),
        ] {
            assert_eq!(Both::of(own).narrowed(info1).name(own.vendor.other()), other, "{own} {info1:#x}");
        }
        assert!(svm(0x7c).is_one_of(&[32]) && vtx(32).is_one_of(&[32]) && !svm(0x84).is_one_of(&[32]));
        assert_eq!((vendor("AuthenticAMD"), vendor("GenuineIntel")), (Vendor::Amd, Vendor::Intel));
    }
}
