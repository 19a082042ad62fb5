//! What exits mean, in a sentence each, for who meets them the first time: by hardware's numbers, in both architectures' terms.
//!
//! VT-x: SDM vol. 3, chapter 28 (qualifications: 28.2.1) and appendix C. AMD-V: APM vol. 2, 15.7 to 15.12 (EXITINFO1, EXITINFO2)
//! and appendix C. What KVM does with them: arch/x86/kvm in Linux.

use crate::reasons::Reason;
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::recorder::Kind;

/// What an event is coloured by. The page has a colour for each, by its place here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// To the monitor: port I/O.
    Port,
    /// To the monitor: an address without memory.
    Mmio,
    /// To the monitor: anything else.
    Monitor,
    /// In KVM: a page that the nested page table did not have.
    Fault,
    /// In KVM: an interrupt, the host's or the guest's.
    Interrupt,
    /// In KVM: a model-specific register.
    Msr,
    /// In KVM: CPUID.
    Cpuid,
    /// In KVM: a control or debug register.
    Control,
    /// In KVM: the guest waits.
    Halt,
    /// In KVM: anything else.
    Kvm,
    /// A device's worker.
    Worker,
    /// A device interrupts the guest.
    Notify,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 12;
}

/// What a reason means.
#[derive(Debug)]
pub struct Meaning {
    /// VT-x basic exit reasons. AMD-V's codes follow from [`PAIRS`](crate::reasons::PAIRS).
    vtx: &'static [u16],
    /// Its colour, where KVM answers it.
    pub class: Class,
    /// Why hardware leaves the guest.
    pub what: &'static str,
    /// What KVM does, where it answers by itself.
    pub kvm: &'static str,
}

static MEANINGS: [Meaning; 19] = [
    Meaning {
        vtx: &[48, 49],
        class: Class::Fault,
        what: "The guest touched a physical address that the second page table (EPT on VT-x, nested paging on AMD-V) does not map, or not for this access.",
        kvm: "KVM looked for memory of the monitor behind that address, entered the page into the second page table, and the guest repeated the instruction.",
    },
    Meaning {
        vtx: &[1, 5, 6],
        class: Class::Interrupt,
        what: "An interrupt of the host arrived while the guest ran; the guest did nothing to cause it.",
        kvm: "The host's kernel served its interrupt. It may have let other threads run before the guest went on, and their time is counted here.",
    },
    Meaning {
        vtx: &[7, 8],
        class: Class::Interrupt,
        what: "KVM had an interrupt for the guest and had asked to be told when the guest could take one: now it can.",
        kvm: "KVM injected the interrupt that was waiting, and entered the guest in its handler.",
    },
    Meaning {
        vtx: &[43, 44, 45, 56],
        class: Class::Interrupt,
        what: "The guest used its local APIC in a way that hardware does not carry out alone.",
        kvm: "KVM's own local APIC did it: a register was read or written, an interrupt ended or sent.",
    },
    Meaning {
        vtx: &[31, 32],
        class: Class::Msr,
        what: "RDMSR or WRMSR of a model-specific register that the guest may not reach directly.",
        kvm: "KVM keeps a copy of the register for each vCPU, or acts on it: the APIC and its timer, the clock, the mode of the processor.",
    },
    Meaning {
        vtx: &[10],
        class: Class::Cpuid,
        what: "CPUID always leaves the guest on VT-x, and on AMD-V when asked: so a hypervisor decides which processor the guest sees.",
        kvm: "KVM answered from the table that the monitor had given it for this vCPU (KVM_SET_CPUID2).",
    },
    Meaning {
        vtx: &[28],
        class: Class::Control,
        what: "The guest read or wrote a control register with bits that the hypervisor watches: paging, caching, the processor's mode.",
        kvm: "KVM checked the new value, kept its own copy beside hardware's, and switched page tables or modes where it must.",
    },
    Meaning {
        vtx: &[29],
        class: Class::Control,
        what: "The guest used a debug register; hardware's may still hold the host's values.",
        kvm: "KVM loaded the guest's debug registers into hardware, and stopped watching until the vCPU is next switched out.",
    },
    Meaning {
        vtx: &[12],
        class: Class::Halt,
        what: "HLT: the guest has nothing to do and waits for an interrupt.",
        kvm: "KVM put the vCPU's thread to sleep until an interrupt came for it. The time is the guest's idleness, not work.",
    },
    Meaning {
        vtx: &[36, 39, 40, 67, 68],
        class: Class::Halt,
        what: "The guest waits: MONITOR and MWAIT, or PAUSE many times in a loop (a spinlock that another vCPU may hold).",
        kvm: "KVM let another thread run, or another vCPU of this guest, before it went on.",
    },
    Meaning {
        vtx: &[18],
        class: Class::Kvm,
        what: "VMCALL or VMMCALL: the guest knows that it has a hypervisor, and calls it.",
        kvm: "KVM carried the call out: to wake a vCPU, to send interrupts to many, to tell the clock.",
    },
    Meaning {
        vtx: &[0],
        class: Class::Kvm,
        what: "An exception in the guest, or a non-maskable interrupt, that the hypervisor asked to see first.",
        kvm: "KVM looked whether it was its own doing (an instruction to emulate, a breakpoint), else gave it back to the guest.",
    },
    Meaning {
        vtx: &[30],
        class: Class::Kvm,
        what: "IN or OUT to a port: every port of the guest is guarded, because behind them are devices that only the hypervisor plays.",
        kvm: "The port belongs to a device inside KVM, or to a doorbell (ioeventfd) that wakes a worker: the monitor's vCPU thread was not needed.",
    },
    Meaning {
        vtx: &[52],
        class: Class::Interrupt,
        what: "The VMX-preemption timer ran out: KVM uses it as the guest's APIC timer.",
        kvm: "KVM injected the timer's interrupt.",
    },
    Meaning {
        vtx: &[13, 54],
        class: Class::Kvm,
        what: "INVD or WBINVD: the guest wants its caches written back or emptied.",
        kvm: "KVM did nothing, or flushed the caches where a device of the host needs it.",
    },
    Meaning {
        vtx: &[55],
        class: Class::Control,
        what: "XSETBV: the guest chose which of the processor's extended registers it uses.",
        kvm: "KVM checked the choice against what it offers, and loaded it.",
    },
    Meaning {
        vtx: &[16, 51, 15],
        class: Class::Kvm,
        what: "The guest read a counter of the processor.",
        kvm: "KVM gave the value with the guest's offset.",
    },
    Meaning {
        vtx: &[2],
        class: Class::Kvm,
        what: "Triple fault: an exception in the handler of an exception in a handler. A processor without hypervisor would reset.",
        kvm: "KVM told the monitor.",
    },
    Meaning {
        vtx: &[33, 34, 41],
        class: Class::Kvm,
        what: "The processor refused to enter the guest: the state that it was given breaks its rules.",
        kvm: "KVM told the monitor.",
    },
];

/// Of a reason.
pub fn of(reason: Reason) -> Option<&'static Meaning> {
    MEANINGS.iter().find(|meaning| reason.is_one_of(meaning.vtx))
}

/// Why an exit reaches the monitor, where hardware's own reason does not say it.
pub fn of_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::PioIn | Kind::PioOut => MEANINGS[12].what,
        Kind::MmioRead | Kind::MmioWrite => {
            "The guest touched a physical address without memory behind it. KVM read the instruction to learn what was wanted: the address is a device's."
        }
        Kind::Halt => MEANINGS[8].what,
        Kind::Shutdown => MEANINGS[17].what,
        Kind::SystemEvent => {
            "The guest asked the hypervisor, by a paravirtual interface, to power off, reset or note its crash."
        }
        Kind::FailEntry => MEANINGS[18].what,
        Kind::InternalError => {
            "KVM met something that it cannot do: most often an instruction that its emulator does not know."
        }
        Kind::Debug => "A breakpoint or a single step that the monitor had asked for.",
        Kind::IoApicEoi => {
            "The guest ended an interrupt that had come as a level, from a pin of the I/O APIC, which is in the monitor: it looks whether the pin is still high."
        }
        Kind::Kicked => {
            "A signal to the vCPU's thread, so that it looks who wants it: to pause, to stop, to be looked at. The guest did nothing."
        }
        Kind::MsrRead | Kind::MsrWrite => {
            "RDMSR or WRMSR of a model-specific register that KVM was told to ask the monitor about: one that the machine's configuration denies, or one of Hyper-V's interrupt controller."
        }
        Kind::Hypercall => {
            "The guest called its hypervisor by Microsoft's interface, for something that KVM does not do itself."
        }
        Kind::Queue => {
            "The guest had put requests into a virtqueue and rung its doorbell; or the worker looked by itself. Once a queue is busy no vCPU leaves KVM for this: its doorbell is an ioeventfd."
        }
        Kind::Source => {
            "The host's end of the device had something: a key was pressed, a packet came, a disk was done."
        }
        Kind::Interrupt => {
            "The device told the guest that there is something to fetch: an eventfd that KVM turns into an interrupt (irqfd)."
        }
        Kind::Frame => "A frame of Ethernet passed between the guest's buffers and the device's host end.",
        _ => "A reason that this version of vmm does not know.",
    }
}

/// What hardware says beside its reason in KVM's trace event: `info1` and `info2`.
pub fn detail(reason: Reason, info1: u64, info2: u64) -> String {
    let bit = |bit: u32| info1 >> bit & 1 == 1;
    let pick = |bits: &[(u32, &str)]| {
        let set: Vec<_> = bits.iter().filter(|(at, _)| bit(*at)).map(|(_, name)| *name).collect();
        set.join(", ")
    };
    match (reason.vendor == Vendor::Amd, reason.number) {
        (true, 0x400) => {
            let access = if bit(4) {
                "fetch"
            } else if bit(1) {
                "write"
            } else {
                "read"
            };
            let present = if bit(0) { "page present" } else { "page not present" };
            let walk = if bit(33) { ", while walking the guest's own page tables" } else { "" };
            format!("{access} of guest address {info2:#x}, {present}{walk}")
        }
        (false, 48) => {
            let access = pick(&[(0, "read"), (1, "write"), (2, "fetch")]);
            let place = if info2 == 0 { String::new() } else { format!(" of guest address {info2:#x}") };
            format!("{access}{place}; qualification {info1:#x}")
        }
        (true, 0x7b) => {
            let (direction, size) = (if bit(0) { "in" } else { "out" }, info1 >> 4 & 7);
            format!("{direction} {size}B {:#x}{}", info1 >> 16 & 0xffff, if bit(2) { ", string" } else { "" })
        }
        (false, 30) => {
            let (direction, size) = (if bit(3) { "in" } else { "out" }, (info1 & 7) + 1);
            format!("{direction} {size}B {:#x}{}", info1 >> 16 & 0xffff, if bit(4) { ", string" } else { "" })
        }
        (true, 0x7c) => (if bit(0) { "WRMSR" } else { "RDMSR" }).to_owned(),
        (false, 28) => {
            let access = ["mov to", "mov from", "CLTS on", "LMSW on"][(info1 >> 4 & 3) as usize];
            format!("{access} CR{}", info1 & 15)
        }
        (true, 0x4e) => format!("error code {info1:#x}, address {info2:#x}"),
        _ if info1 == 0 && info2 == 0 => String::new(),
        _ => format!("info1 {info1:#x}, info2 {info2:#x}"),
    }
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
    fn reasons_mean_the_same_on_both_architectures() {
        for (one, other) in
            [(48, 0x400), (10, 0x72), (31, 0x7c), (28, 0x14), (30, 0x7b), (1, 0x60), (0, 0x46), (12, 0x78)]
        {
            assert!(std::ptr::eq(of(vtx(one)).unwrap(), of(svm(other)).unwrap()), "{one} {other:#x}");
        }
        assert!(of(vtx(70)).is_none() && of(svm(0x86)).is_none());
        for meaning in &MEANINGS {
            // None is hidden by one before it.
            assert!(meaning.vtx.iter().all(|number| std::ptr::eq(of(vtx(*number)).unwrap(), meaning)));
        }
        assert!(std::ptr::eq(of_kind(Kind::PioIn), of(vtx(30)).unwrap().what));
        assert!(std::ptr::eq(of_kind(Kind::Halt), of(vtx(12)).unwrap().what));
        assert!(std::ptr::eq(of_kind(Kind::Shutdown), of(vtx(2)).unwrap().what));
        assert!(std::ptr::eq(of_kind(Kind::FailEntry), of(vtx(33)).unwrap().what));
    }

    #[test]
    fn what_hardware_says_beside_it_is_decoded() {
        assert_eq!(
            detail(svm(0x400), 0x1_0000_0014, 0x1000),
            "fetch of guest address 0x1000, page not present"
        );
        assert_eq!(
            detail(svm(0x400), 0x2_0000_0006, 0x2000),
            "write of guest address 0x2000, page not present, while walking the guest's own page tables"
        );
        assert_eq!(detail(svm(0x7b), 0x3f8_0010, 0), "out 1B 0x3f8");
        assert_eq!(detail(vtx(30), 0x3f8_0008, 0), "in 1B 0x3f8");
        assert_eq!(
            (detail(svm(0x7c), 1, 0), detail(vtx(28), 0x14, 0)),
            ("WRMSR".to_owned(), "mov from CR4".to_owned())
        );
        assert_eq!(detail(vtx(48), 0x182, 0x3000), "write of guest address 0x3000; qualification 0x182");
        assert_eq!(detail(vtx(48), 0x181, 0), "read; qualification 0x181");
        assert_eq!(detail(vtx(10), 0, 0), "");
    }
}
