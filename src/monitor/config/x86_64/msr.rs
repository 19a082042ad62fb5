//! Model-specific registers: their names, and ranges of them as `--cpu ...,msr-deny=` takes them.
//!
//! Names are those of their sources: SDM vol. 4 (IA32_, MSR_), APM vol. 2, appendix A (for AMD's, without a prefix), Linux's
//! arch/x86/include/uapi/asm/kvm_para.h (KVM_) and Microsoft's TLFS (HV_). Those are here that guests of KVM meet.

use std::fmt;
use std::str::FromStr;

use crate::config::text::ParseError;

/// Registers that stand alone, by number.
const NAMES: [(u32, &str); 101] = [
    (0x10, "IA32_TIME_STAMP_COUNTER"),
    (0x17, "IA32_PLATFORM_ID"),
    (0x1b, "IA32_APIC_BASE"),
    (0x34, "MSR_SMI_COUNT"),
    (0x3a, "IA32_FEATURE_CONTROL"),
    (0x3b, "IA32_TSC_ADJUST"),
    (0x48, "IA32_SPEC_CTRL"),
    (0x49, "IA32_PRED_CMD"),
    (0x79, "IA32_BIOS_UPDT_TRIG"),
    (0x8b, "IA32_BIOS_SIGN_ID"),
    (0xcd, "MSR_FSB_FREQ"),
    (0xce, "MSR_PLATFORM_INFO"),
    (0xcf, "IA32_CORE_CAPABILITIES"),
    (0xe1, "IA32_UMWAIT_CONTROL"),
    (0xe7, "IA32_MPERF"),
    (0xe8, "IA32_APERF"),
    (0xfe, "IA32_MTRRCAP"),
    (0x10a, "IA32_ARCH_CAPABILITIES"),
    (0x10b, "IA32_FLUSH_CMD"),
    (0x122, "IA32_TSX_CTRL"),
    (0x140, "MISC_FEATURES_ENABLES"),
    (0x174, "IA32_SYSENTER_CS"),
    (0x175, "IA32_SYSENTER_ESP"),
    (0x176, "IA32_SYSENTER_EIP"),
    (0x179, "IA32_MCG_CAP"),
    (0x17a, "IA32_MCG_STATUS"),
    (0x17b, "IA32_MCG_CTL"),
    (0x198, "IA32_PERF_STATUS"),
    (0x199, "IA32_PERF_CTL"),
    (0x19a, "IA32_CLOCK_MODULATION"),
    (0x19b, "IA32_THERM_INTERRUPT"),
    (0x19c, "IA32_THERM_STATUS"),
    (0x1a0, "IA32_MISC_ENABLE"),
    (0x1a4, "MSR_MISC_FEATURE_CONTROL"),
    (0x1b0, "IA32_ENERGY_PERF_BIAS"),
    (0x1c4, "IA32_XFD"),
    (0x1c5, "IA32_XFD_ERR"),
    (0x1d9, "IA32_DEBUGCTL"),
    (0x1db, "MSR_LASTBRANCH_FROM_IP"),
    (0x1dc, "MSR_LASTBRANCH_TO_IP"),
    (0x1dd, "MSR_LASTINT_FROM_IP"),
    (0x1de, "MSR_LASTINT_TO_IP"),
    (0x1fc, "MSR_POWER_CTL"),
    (0x277, "IA32_PAT"),
    (0x2ff, "IA32_MTRR_DEF_TYPE"),
    (0x345, "IA32_PERF_CAPABILITIES"),
    (0x38d, "IA32_FIXED_CTR_CTRL"),
    (0x38e, "IA32_PERF_GLOBAL_STATUS"),
    (0x38f, "IA32_PERF_GLOBAL_CTRL"),
    (0x390, "IA32_PERF_GLOBAL_OVF_CTRL"),
    (0x3f1, "IA32_PEBS_ENABLE"),
    (0x570, "IA32_RTIT_CTL"),
    (0x606, "MSR_RAPL_POWER_UNIT"),
    (0x611, "MSR_PKG_ENERGY_STATUS"),
    (0x6a0, "IA32_U_CET"),
    (0x6a2, "IA32_S_CET"),
    (0x6e0, "IA32_TSC_DEADLINE"),
    (0xd90, "IA32_BNDCFGS"),
    (0xda0, "IA32_XSS"),
    (0x4000_0000, "HV_X64_MSR_GUEST_OS_ID"),
    (0x4000_0001, "HV_X64_MSR_HYPERCALL"),
    (0x4000_0002, "HV_X64_MSR_VP_INDEX"),
    (0x4000_0003, "HV_X64_MSR_RESET"),
    (0x4000_0010, "HV_X64_MSR_VP_RUNTIME"),
    (0x4000_0020, "HV_X64_MSR_TIME_REF_COUNT"),
    (0x4000_0021, "HV_X64_MSR_REFERENCE_TSC"),
    (0x4000_0073, "HV_X64_MSR_VP_ASSIST_PAGE"),
    (0x4000_0080, "HV_X64_MSR_SCONTROL"),
    (0x4000_0081, "HV_X64_MSR_SVERSION"),
    (0x4000_0082, "HV_X64_MSR_SIEFP"),
    (0x4000_0083, "HV_X64_MSR_SIMP"),
    (0x4000_0084, "HV_X64_MSR_EOM"),
    (0x4b56_4d00, "KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d02, "KVM_ASYNC_PF_EN"),
    (0x4b56_4d03, "KVM_STEAL_TIME"),
    (0x4b56_4d04, "KVM_PV_EOI_EN"),
    (0x4b56_4d05, "KVM_POLL_CONTROL"),
    (0x4b56_4d06, "KVM_ASYNC_PF_INT"),
    (0x4b56_4d07, "KVM_ASYNC_PF_ACK"),
    (0xc000_0080, "IA32_EFER"),
    (0xc000_0081, "IA32_STAR"),
    (0xc000_0082, "IA32_LSTAR"),
    (0xc000_0083, "IA32_CSTAR"),
    (0xc000_0084, "IA32_FMASK"),
    (0xc000_0100, "IA32_FS_BASE"),
    (0xc000_0101, "IA32_GS_BASE"),
    (0xc000_0102, "IA32_KERNEL_GS_BASE"),
    (0xc000_0103, "IA32_TSC_AUX"),
    (0xc000_0104, "TSC_RATIO"),
    (0xc001_0010, "SYSCFG"),
    (0xc001_0015, "HWCR"),
    (0xc001_001f, "NB_CFG"),
    (0xc001_0055, "INT_PENDING_MSG"),
    (0xc001_0063, "PSTATE_STATUS"),
    (0xc001_0114, "VM_CR"),
    (0xc001_0117, "VM_HSAVE_PA"),
    (0xc001_0140, "OSVW_ID_LENGTH"),
    (0xc001_0141, "OSVW_STATUS"),
    (0xc001_1029, "DE_CFG"),
    (0xc001_102a, "BU_CFG2"),
];

/// Registers in rows: number of the first, how many, how far apart, and the name, which the place in the row follows.
const ROWS: [(u32, u32, u32, &str); 20] = [
    (0xc1, 8, 1, "IA32_PMC"),
    (0x186, 8, 1, "IA32_PERFEVTSEL"),
    (0x200, 10, 2, "IA32_MTRR_PHYSBASE"),
    (0x201, 10, 2, "IA32_MTRR_PHYSMASK"),
    (0x250, 1, 1, "IA32_MTRR_FIX64K_00000_"),
    (0x258, 2, 1, "IA32_MTRR_FIX16K_"),
    (0x268, 8, 1, "IA32_MTRR_FIX4K_"),
    (0x280, 32, 1, "IA32_MC_CTL2_"),
    (0x309, 4, 1, "IA32_FIXED_CTR"),
    (0x400, 32, 4, "IA32_MC_CTL_"),
    (0x401, 32, 4, "IA32_MC_STATUS_"),
    (0x402, 32, 4, "IA32_MC_ADDR_"),
    (0x403, 32, 4, "IA32_MC_MISC_"),
    (0x480, 18, 1, "IA32_VMX_CAPABILITY_"),
    (0x4000_0090, 16, 1, "HV_X64_MSR_SINT"),
    (0x4000_00b0, 4, 2, "HV_X64_MSR_STIMER_CONFIG"),
    (0x4000_00b1, 4, 2, "HV_X64_MSR_STIMER_COUNT"),
    (0xc001_0000, 4, 1, "PERF_LEGACY_CTL"),
    (0xc001_0004, 4, 1, "PERF_LEGACY_CTR"),
    (0xc001_0200, 12, 1, "PERF_CTL_CTR"),
];

/// What a register is called, with its number: `IA32_EFER (0xc0000080)`, or the number alone.
pub fn name(number: u32) -> String {
    let alone = NAMES.iter().find(|(n, _)| *n == number).map(|(_, name)| (*name).to_owned());
    let named = alone.or_else(|| {
        ROWS.iter().find_map(|(first, count, step, name)| {
            let offset = number.checked_sub(*first)?;
            (offset.is_multiple_of(*step) && offset / step < *count)
                .then(|| format!("{name}{}", offset / step))
        })
    });
    named.map_or_else(|| format!("{number:#x}"), |name| format!("{name} ({number:#x})"))
}

/// Registers from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// Number of the first.
    pub first: u32,
    /// Number of the last.
    pub last: u32,
}

impl Range {
    /// The most registers of one range: KVM's bitmap for it has 0x600 bytes (KVM_MSR_FILTER_MAX_BITMAP_SIZE).
    const MOST: u32 = 0x3000;
    /// The x2APIC's registers, which KVM's filter leaves out.
    const X2APIC: Self = Self { first: 0x800, last: 0x8ff };
}

/// A stretch of registers of which some are denied: what KVM's filter is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Number of the first.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// A bit for each: 0 is denied.
    pub allowed: Vec<u8>,
}

impl Window {
    /// The most of them (KVM_MSR_FILTER_MAX_RANGES).
    pub const MOST: usize = 16;

    /// As few as have all of `ranges`.
    pub fn around(ranges: &[Range]) -> Vec<Self> {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        let mut windows: Vec<Self> = Vec::new();
        for range in ranges {
            if windows.last().is_none_or(|window| range.last - window.first >= Range::MOST) {
                windows.push(Self { first: range.first, count: 0, allowed: Vec::new() });
            }
            let Some(window) = windows.last_mut() else { continue };
            window.count = window.count.max(range.last - window.first + 1);
            window.allowed.resize(window.count.div_ceil(8) as usize, 0xff);
            for at in range.first - window.first..=range.last - window.first {
                window.allowed[at as usize / 8] &= !(1 << (at % 8));
            }
        }
        windows
    }
}

impl FromStr for Range {
    type Err = ParseError;

    /// `NUMBER`, `NUMBER-NUMBER`, `NAME`; numbers are hexadecimal with 0x.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let one = |text: &str| {
            let named = NAMES.iter().find(|(_, name)| name.eq_ignore_ascii_case(text)).map(|(n, _)| *n);
            named.or_else(|| match text.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16).ok(),
                None => text.parse().ok(),
            })
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let wrong = |what: &str| ParseError::new(format!("msr-deny={text}: {what}"));
        let (Some(first), Some(last)) = (one(first), one(last)) else {
            return Err(wrong("unknown MSR name; give its number (0x10a) or a range (0x480-0x491)"));
        };
        if last < first {
            return Err(wrong("the range ends before it begins"));
        }
        if last - first >= Self::MOST {
            return Err(wrong("too many registers: a range has at most 0x3000"));
        }
        if first <= Self::X2APIC.last && last >= Self::X2APIC.first {
            return Err(wrong(
                "KVM cannot filter the x2APIC's registers, 0x800 to 0x8ff; -x2apic hides them",
            ));
        }
        Ok(Self { first, last })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{:#x}", self.first),
            false => write!(f, "{:#x}-{:#x}", self.first, self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_their_names() {
        for (number, said) in [
            (0xc000_0080, "IA32_EFER (0xc0000080)"),
            (0x203, "IA32_MTRR_PHYSMASK1 (0x203)"),
            (0x204, "IA32_MTRR_PHYSBASE2 (0x204)"),
            (0x9f, "0x9f"),
            (0x4000_00b3, "HV_X64_MSR_STIMER_COUNT1 (0x400000b3)"),
            (0xc001_0007, "PERF_LEGACY_CTR3 (0xc0010007)"),
        ] {
            assert_eq!(name(number), said);
        }
        assert!(NAMES.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn windows_have_all_ranges_and_nothing_else_denied() {
        let ranges = |text: &str| text.split(' ').map(|text| text.parse().unwrap()).collect::<Vec<Range>>();
        for (text, count) in [
            ("0x10", 1),
            ("0xc0010114 0xc0010000-0xc0010007 0xc0010117 0xc0000080", 2),
            ("0-0x7ff 0x900-0x2fff 0x3000 0xffffffff", 3),
            ("5-9 1-20 8-8", 1),
        ] {
            let ranges = ranges(text);
            let windows = Window::around(&ranges);
            assert_eq!(windows.len(), count, "{text}");
            for window in &windows {
                assert!(
                    window.count <= Range::MOST && window.allowed.len() == window.count.div_ceil(8) as usize
                );
                for at in 0..window.count {
                    let number = window.first + at;
                    let denied = ranges.iter().any(|range| (range.first..=range.last).contains(&number));
                    assert_eq!(window.allowed[at as usize / 8] >> (at % 8) & 1 == 0, denied, "{number:#x}");
                }
            }
            let denied: u32 =
                windows.iter().flat_map(|window| &window.allowed).map(|byte| byte.count_zeros()).sum();
            assert!(ranges.len() as u32 <= denied || text.starts_with('5'));
        }
    }

    #[test]
    fn ranges_read_back_and_what_kvm_cannot_filter_is_said() {
        for text in ["0x10a", "0xc0000080-0xc0000084", "0x3000-0x5fff"] {
            assert_eq!(text.parse::<Range>().unwrap().to_string(), text);
        }
        assert_eq!("ia32_efer".parse::<Range>().unwrap().to_string(), "0xc0000080");
        assert_eq!("266".parse::<Range>().unwrap().to_string(), "0x10a");
        for (text, said) in [
            ("", "number"),
            ("0x", "number"),
            ("0x100000000", "number"),
            ("5-4", "ends before"),
            ("0-0x3000", "0x3000"),
            ("0x7ff-0x800", "x2APIC"),
            ("0x808", "x2APIC"),
        ] {
            let error = text.parse::<Range>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
