//! The names of CPU features, as Linux's /proc/cpuinfo has them, and the CPUID bit of each.
//!
//! Sources: SDM vol. 2, CPUID; APM vol. 3, appendix E; Linux's arch/x86/include/asm/cpufeatures.h for the names. What
//! Linux makes up itself (constant_tsc, pti ...) is not here, nor is virtualization, which `nested=on` gives.

/// A register of CPUID's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// 32 features: leaf, index, register, and the name of each bit, lowest first; `-` where there is none.
pub struct Word {
    /// Leaf (EAX).
    pub function: u32,
    /// Index (ECX).
    pub index: u32,
    /// Register of the result.
    pub register: Register,
    /// Names by bit.
    names: &'static str,
}

impl Word {
    /// The bits that have names, with them.
    pub fn bits(&self) -> impl Iterator<Item = (u32, &'static str)> {
        (0..).zip(self.names.split_ascii_whitespace()).filter(|(_, name)| *name != "-")
    }
}

const fn word(function: u32, index: u32, register: Register, names: &'static str) -> Word {
    Word { function, index, register, names }
}

/// Every word of features.
pub const WORDS: [Word; 11] = [
    word(
        1,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr \
         sse sse2 ss ht tm ia64 pbe",
    ),
    word(
        1,
        0,
        Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl - smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand hypervisor",
    ),
    word(
        7,
        0,
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Ecx,
        "- avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc -",
    ),
    word(
        7,
        0,
        Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect - md_clear - - - serialize - tsxldtrk - \
         pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 - - flush_l1d arch_capabilities - -",
    ),
    word(
        7,
        1,
        Eax,
        "- - - - avx_vnni avx512_bf16 - - - - fzrm fsrs fsrc - - - - fred lkgs - - amx_fp16 - avx_ifma - - lam",
    ),
    word(0xd, 1, Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x8000_0001,
        0,
        Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0001,
        0,
        Ecx,
        "lahf_lm cmp_legacy - extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(0x8000_0008, 0, Ebx, "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb"),
    word(
        0x8000_000a,
        0,
        Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold \
         avic - v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi",
    ),
];

/// Where the feature `name` is.
pub fn find(name: &str) -> Option<(&'static Word, u32)> {
    WORDS.iter().find_map(|word| word.bits().find(|(_, n)| *n == name).map(|(bit, _)| (word, bit)))
}

/// The names most like `name`, best first.
pub fn nearest(name: &str) -> Vec<&'static str> {
    let mut all: Vec<_> =
        WORDS.iter().flat_map(Word::bits).map(|(_, n)| (strsim::jaro_winkler(name, n), n)).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.into_iter().take(3).map(|(_, n)| n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_at_their_bits_and_none_is_there_twice() {
        for (name, function, register, bit) in [
            ("sse2", 1, Edx, 26),
            ("tsc_deadline_timer", 1, Ecx, 24),
            ("hypervisor", 1, Ecx, 31),
            ("avx512vl", 7, Ebx, 31),
            ("la57", 7, Ecx, 16),
            ("rdpid", 7, Ecx, 22),
            ("sgx_lc", 7, Ecx, 30),
            ("fsrm", 7, Edx, 4),
            ("ibt", 7, Edx, 20),
            ("arch_capabilities", 7, Edx, 29),
            ("lam", 7, Eax, 26),
            ("lm", 0x8000_0001, Edx, 29),
            ("topoext", 0x8000_0001, Ecx, 22),
            ("mwaitx", 0x8000_0001, Ecx, 29),
            ("ibpb", 0x8000_0008, Ebx, 12),
            ("vnmi", 0x8000_000a, Edx, 25),
        ] {
            let (word, at) = find(name).unwrap();
            assert_eq!((word.function, word.register, at), (function, register, bit), "{name}");
        }
        let mut names: Vec<_> = WORDS.iter().flat_map(Word::bits).map(|(_, name)| name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(WORDS.iter().all(|word| word.bits().all(|(bit, _)| bit < 32)));
    }
}
