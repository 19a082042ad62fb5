//! Which features of KVM's table the guest is shown: the configuration's model, and what is added and removed.
//!
//! Pure, and the last step of [`cpuid::table`](super::cpuid::table).

use kvm_bindings::kvm_cpuid_entry2 as Leaf;

use crate::config::cpu::{Cpu, Level, Model};
use crate::config::cpu_features::{self, Register};
use crate::kvm::Error;

/// Leaves whose content a baseline keeps beside its features: topology, caches, frequencies, KVM's own, names, address sizes.
const KEPT: [u32; 17] = [
    0,
    1,
    2,
    4,
    7,
    0xb,
    0xd,
    0x15,
    0x1f,
    0x8000_0000,
    0x8000_0001,
    0x8000_0005,
    0x8000_0006,
    0x8000_0007,
    0x8000_0008,
    0x8000_001d,
    0x8000_001e,
];
/// Brand string.
const BRAND: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
/// KVM's leaves, and ours; Hyper-V's, behind which KVM's are then.
const HYPERVISOR: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// AMD-V's features.
const SVM: u32 = 0x8000_000a;
/// x87, SSE and AVX state in XCR0, and the bytes that they take in an XSAVE area (SDM vol. 1, 13.4).
const XCR0_V3: u32 = 7;
const XSAVE_V3: u32 = 832;

/// Leaves in `table` what `cpu` asks for.
///
/// # Errors
/// [`Error::CpuFeature`] if the table lacks something that it asks for.
pub(super) fn apply(table: &mut Vec<Leaf>, cpu: &Cpu) -> Result<(), Error> {
    let wanted = cpu.add.iter().map(String::as_str);
    let needed: Vec<&str> = match cpu.model {
        Model::Host => wanted.collect(),
        Model::Baseline(level) => {
            let level = level.features().filter(|(_, must)| *must).map(|(name, _)| name);
            level.chain(wanted).filter(|name| !cpu.remove.iter().any(|removed| removed == name)).collect()
        }
    };
    if let Some(name) = needed.into_iter().find(|name| !has(table, name)) {
        return Err(Error::CpuFeature { name: name.to_owned(), cpu: cpu.to_string() });
    }
    if cpu.nested && !table.iter().any(has_virtualization) {
        return Err(Error::CpuFeature { name: "svm or vmx".to_owned(), cpu: cpu.to_string() });
    }
    if let Model::Baseline(level) = cpu.model {
        reduce(table, cpu, level);
    }
    for name in &cpu.remove {
        change(table, name, false);
    }
    if let Some(vendor) = cpu.vendor {
        let name = vendor.name();
        let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
        for leaf in table.iter_mut().filter(|leaf| [0, 0x8000_0000].contains(&leaf.function)) {
            (leaf.ebx, leaf.edx, leaf.ecx) = (word(0), word(4), word(8));
        }
    }
    Ok(())
}

fn has_virtualization(leaf: &Leaf) -> bool {
    (leaf.function == 1 && leaf.ecx & 1 << 5 != 0) || (leaf.function == 0x8000_0001 && leaf.ecx & 1 << 2 != 0)
}

/// Clears every feature that is neither of `level` nor added.
fn reduce(table: &mut Vec<Leaf>, cpu: &Cpu, level: Level) {
    let kept = |function: u32| {
        KEPT.contains(&function) || BRAND.contains(&function) || HYPERVISOR.contains(&function)
    };
    table.retain(|leaf| kept(leaf.function) || (cpu.nested && leaf.function == SVM));
    let here: Vec<&str> = level
        .features()
        .map(|(name, _)| name)
        .chain(cpu.add.iter().map(String::as_str))
        .filter(|name| has(table, name))
        .collect();
    for leaf in table.iter_mut() {
        match leaf.function {
            // What is left of them besides features: VMX, if it may stay.
            1 => (leaf.ecx, leaf.edx) = (leaf.ecx & u32::from(cpu.nested) << 5, 0),
            7 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            0x8000_0001 => (leaf.ecx, leaf.edx) = (leaf.ecx & u32::from(cpu.nested) << 2, 0),
            // EBX has features alone; the address sizes differ between hosts, and the guest must know them.
            0x8000_0008 => leaf.ebx = 0,
            0xd if level < Level::V3 || leaf.index > 2 => {
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
            }
            0xd if leaf.index == 0 => {
                (leaf.eax, leaf.edx) = (XCR0_V3, 0);
                leaf.ecx = XSAVE_V3;
            }
            0xd if leaf.index == 1 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    for name in here {
        change(table, name, true);
    }
}

fn register(leaf: &mut Leaf, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut leaf.eax,
        Register::Ebx => &mut leaf.ebx,
        Register::Ecx => &mut leaf.ecx,
        Register::Edx => &mut leaf.edx,
    }
}

fn has(table: &[Leaf], name: &str) -> bool {
    let Some((word, bit)) = cpu_features::find(name) else { return false };
    let mut leaves = table.iter().filter(|leaf| (leaf.function, leaf.index) == (word.function, word.index));
    leaves.any(|leaf| *register(&mut leaf.clone(), word.register) & 1 << bit != 0)
}

fn change(table: &mut [Leaf], name: &str, on: bool) {
    let Some((word, bit)) = cpu_features::find(name) else { return };
    for leaf in table.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (word.function, word.index)) {
        let register = register(leaf, word.register);
        *register = *register & !(1 << bit) | u32::from(on) << bit;
    }
}

/// The features of `table` by name.
pub(super) fn names(table: &[Leaf]) -> Vec<&'static str> {
    cpu_features::WORDS
        .iter()
        .flat_map(|word| word.bits())
        .map(|(_, name)| name)
        .filter(|name| has(table, name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<Leaf> {
        let leaf = |function, index| Leaf {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        [(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0xd, 2), (0xd, 5), (0x14, 0)]
            .into_iter()
            .chain([(0x8000_0001, 0), (0x8000_0008, 0), (SVM, 0)])
            .map(|(function, index)| leaf(function, index))
            .collect()
    }

    fn applied(text: &str) -> Vec<Leaf> {
        let mut table = host();
        apply(&mut table, &text.parse().unwrap()).unwrap();
        table
    }

    #[test]
    fn a_baseline_is_its_features_and_what_is_added() {
        for (text, level) in [("x86-64-v1", Level::V1), ("x86-64-v2", Level::V2), ("x86-64-v3", Level::V3)] {
            let mut expected: Vec<_> = level.features().map(|(name, _)| name).collect();
            let mut found = names(&applied(text));
            expected.sort_unstable();
            found.sort_unstable();
            assert_eq!(found, expected, "{text}");
        }
        let table = applied("x86-64-v2,+aes,-cx16");
        assert!(
            has(&table, "aes") && !has(&table, "cx16") && !table.iter().any(|leaf| leaf.function == 0x14)
        );
        assert!(!table.iter().any(has_virtualization));
        assert!(applied("x86-64-v2,nested=on").iter().any(has_virtualization));
        let state = applied("x86-64-v3").into_iter().find(|leaf| leaf.function == 0xd).unwrap();
        assert_eq!((state.eax, state.ecx), (XCR0_V3, XSAVE_V3));
    }

    #[test]
    fn what_the_host_lacks_is_an_error_that_names_it() {
        let mut table = host();
        change(&mut table, "avx2", false);
        for text in ["x86-64-v3", "host,+avx2"] {
            let error = apply(&mut table.clone(), &text.parse().unwrap()).unwrap_err();
            assert!(error.to_string().contains("avx2"), "{error}");
        }
        apply(&mut table, &"x86-64-v3,-avx2".parse().unwrap()).unwrap();
        for leaf in &mut table {
            leaf.ecx = 0;
        }
        assert!(apply(&mut table, &"host,nested=on".parse().unwrap()).is_err());
    }

    #[test]
    fn the_makers_name_is_changed_in_both_leaves() {
        let leaf = applied("host,vendor=intel")[0];
        assert_eq!(leaf.ebx, u32::from_le_bytes(*b"Genu"));
        assert_eq!(leaf.ecx, u32::from_le_bytes(*b"ntel"));
        assert_eq!(applied("host"), host());
    }
}
