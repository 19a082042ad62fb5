//! The guest's CPUID: what KVM supports, with this machine's topology and frequencies written in.
//!
//! A pure function of KVM's table, so that it is tested without KVM. One package, one thread a core, APIC
//! identifier = vCPU number. Nested virtualization is shown only if asked for.
//! Sources: SDM vol. 2, CPUID; APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2 as Leaf};

/// Which vCPU of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// vCPU number.
    pub id: u32,
    /// vCPUs of the machine.
    pub count: u32,
}

impl Topology {
    /// Bits of an APIC identifier that tell the cores of the package apart.
    fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }
}

/// Frequencies that the guest need not measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frequencies {
    /// Time stamp counter; 0 if it is not known.
    pub tsc_khz: u32,
}

/// The local APIC timer's input clock in KVM: one tick a nanosecond.
const APIC_HZ: u32 = 1_000_000_000;
/// First of the hypervisor's leaves, and the one that tells frequencies (the vendors' common convention).
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_FREQUENCIES: u32 = 0x4000_0010;

/// Whether the processor is Intel's: EBX of leaf 0 begins the vendor's name.
pub fn is_intels(table: &[Leaf]) -> bool {
    table.iter().any(|l| l.function == 0 && l.ebx == u32::from_le_bytes(*b"Genu"))
}

/// The whole table for one vCPU. `tsc_deadline`: the in-kernel local APIC has TSC-deadline mode, which
/// KVM_GET_SUPPORTED_CPUID leaves to us to say.
pub fn table(
    supported: &[Leaf],
    at: Topology,
    frequencies: Frequencies,
    tsc_deadline: bool,
    nested: bool,
) -> Vec<Leaf> {
    let intel = is_intels(supported);
    let mut table: Vec<Leaf> =
        supported.iter().filter(|l| ![0xb, 0x1f, 0x15, 0x8000_0026].contains(&l.function)).copied().collect();
    let mut highest = table.iter().filter(|l| l.function < HYPERVISOR).map(|l| l.function).max().unwrap_or(0);
    let has_1f = supported.iter().any(|l| l.function == 0x1f);
    for leaf in [Some(0xb), has_1f.then_some(0x1f)].into_iter().flatten() {
        table.extend(extended_topology(leaf, at));
        highest = highest.max(leaf);
    }
    if frequencies.tsc_khz != 0 {
        if intel {
            // TSC = crystal * EBX / EAX, and the crystal is what drives the APIC timer.
            let (eax, ebx, ecx) = (APIC_HZ / 1000, frequencies.tsc_khz, APIC_HZ);
            table.push(Leaf { function: 0x15, eax, ebx, ecx, ..Default::default() });
            highest = highest.max(0x15);
        }
        let (function, eax, ebx) = (HYPERVISOR_FREQUENCIES, frequencies.tsc_khz, APIC_HZ / 1000);
        table.push(Leaf { function, eax, ebx, ..Default::default() });
    }
    for leaf in &mut table {
        fit(leaf, at, frequencies, tsc_deadline, highest);
        if !nested {
            hide_virtualization(leaf);
        }
    }
    table
}

/// Writes the machine's facts into one leaf.
fn fit(leaf: &mut Leaf, at: Topology, frequencies: Frequencies, tsc_deadline: bool, highest: u32) {
    let many = at.count > 1;
    match leaf.function {
        0 => leaf.eax = leaf.eax.max(highest),
        1 => {
            set_bits(&mut leaf.ebx, 24, 8, at.id);
            set_bits(&mut leaf.ebx, 16, 8, if many { at.count.next_power_of_two().min(255) } else { 1 });
            set_bits(&mut leaf.edx, 28, 1, u32::from(many)); // HTT: more than one logical processor
            set_bits(&mut leaf.ecx, 21, 1, 1); // x2APIC
            set_bits(&mut leaf.ecx, 24, 1, u32::from(tsc_deadline));
            set_bits(&mut leaf.ecx, 31, 1, 1); // a hypervisor is present
        }
        4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 7;
            let sharing = if level >= 3 { at.count.next_power_of_two() } else { 1 };
            set_bits(&mut leaf.eax, 14, 12, sharing - 1);
            if leaf.function == 4 {
                set_bits(&mut leaf.eax, 26, 6, (at.count.next_power_of_two() - 1).min(63));
            }
        }
        HYPERVISOR if frequencies.tsc_khz != 0 => leaf.eax = leaf.eax.max(HYPERVISOR_FREQUENCIES),
        0x8000_0001 => {
            set_bits(&mut leaf.ecx, 1, 1, u32::from(many)); // CmpLegacy
        }
        0x8000_0008 => {
            set_bits(&mut leaf.ecx, 0, 8, at.count - 1);
            set_bits(&mut leaf.ecx, 12, 4, at.core_bits());
        }
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (at.id, at.id, 0, 0),
        _ => {}
    }
}

/// Takes VT-x and AMD-V away.
fn hide_virtualization(leaf: &mut Leaf) {
    match leaf.function {
        1 => set_bits(&mut leaf.ecx, 5, 1, 0),
        0x8000_0001 => set_bits(&mut leaf.ecx, 2, 1, 0),
        0x8000_000a => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Leaves 0xb and 0x1f: a level of one thread, a level of cores, the end.
fn extended_topology(function: u32, at: Topology) -> [Leaf; 3] {
    const SMT: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let level = |index: u32, eax, ebx, kind| Leaf {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind,
        edx: at.id,
        ..Default::default()
    };
    [level(0, 0, 1, SMT), level(1, at.core_bits(), at.count, CORE), level(2, 0, 0, 0)]
}

fn set_bits(register: &mut u32, shift: u32, count: u32, value: u32) {
    let mask = ((1u32 << count) - 1) << shift;
    *register = (*register & !mask) | ((value << shift) & mask);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(table: &[Leaf], function: u32, index: u32) -> Leaf {
        let mut found = table.iter().filter(|l| l.function == function && l.index == index);
        let leaf = *found.next().unwrap_or_else(|| panic!("leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        leaf
    }

    fn supported(vendor: &[u8; 4]) -> Vec<Leaf> {
        let leaf = |function, index, eax, ecx| {
            let ebx = if function == 0 { u32::from_le_bytes(*vendor) } else { 0 };
            Leaf { function, index, eax, ebx, ecx, ..Default::default() }
        };
        vec![
            leaf(0, 0, 0xd, 0),
            leaf(1, 0, 0, 1 << 5),
            leaf(4, 0, 1 << 5 | 1 | 0xfff << 14, 0),
            leaf(4, 3, 3 << 5 | 3, 0),
            leaf(4, 4, 0, 0),
            leaf(0xb, 0, 0x77, 0),
            leaf(0xb, 1, 0x77, 1),
            leaf(0x1f, 0, 0x77, 0),
            leaf(HYPERVISOR, 0, 0x4000_0001, 0),
            leaf(0x8000_0001, 0, 0, 1 << 2),
            leaf(0x8000_0008, 0, 0, 0),
            leaf(0x8000_001e, 0, 9, 9),
        ]
    }

    #[test]
    fn topology_of_six_cores() {
        let at = Topology { id: 5, count: 6 };
        let table = table(&supported(b"Genu"), at, Frequencies { tsc_khz: 2_400_000 }, true, false);
        let one = find(&table, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (5, 8, 1));
        assert_eq!(one.ecx, 1 << 31 | 1 << 24 | 1 << 21, "hypervisor, TSC deadline, x2APIC, no VMX");
        assert_eq!(find(&table, 4, 0).eax >> 14 & 0xfff, 0, "L1 is private");
        assert_eq!(find(&table, 4, 3).eax >> 14 & 0xfff, 7, "L3 is shared");
        assert_eq!(find(&table, 4, 4).eax, 0, "the end of the caches");
        for function in [0xb, 0x1f] {
            let (smt, core, end) =
                (find(&table, function, 0), find(&table, function, 1), find(&table, function, 2));
            assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, 5));
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        }
        assert_eq!(find(&table, 0x8000_0008, 0).ecx, 3 << 12 | 5);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx, 1 << 1, "CmpLegacy, no SVM");
        assert_eq!(find(&table, 0x8000_001e, 0).eax, 5);
    }

    #[test]
    fn frequencies_are_told() {
        let at = Topology { id: 0, count: 1 };
        let intel = table(&supported(b"Genu"), at, Frequencies { tsc_khz: 2_400_000 }, true, false);
        let tsc = find(&intel, 0x15, 0);
        assert_eq!(u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax), 2_400_000_000);
        assert!(find(&intel, 0, 0).eax >= 0x1f);
        let amd = table(&supported(b"Auth"), at, Frequencies { tsc_khz: 2_400_000 }, true, false);
        assert_eq!(find(&amd, HYPERVISOR_FREQUENCIES, 0).eax, 2_400_000);
        assert!(find(&amd, HYPERVISOR, 0).eax >= HYPERVISOR_FREQUENCIES);
        assert!(!amd.iter().any(|l| l.function == 0x15));
        let unknown = table(&supported(b"Genu"), at, Frequencies { tsc_khz: 0 }, false, false);
        assert!(!unknown.iter().any(|l| [0x15, HYPERVISOR_FREQUENCIES].contains(&l.function)));
    }
}
