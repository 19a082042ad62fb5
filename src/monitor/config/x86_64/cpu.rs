//! `--cpu`: which features of the host's processor the guest is shown.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{cpu_features, msr};
use crate::config::text::ParseError;

/// What the guest's CPUs can do:
/// `host|x86-64-v1|x86-64-v2|x86-64-v3[,+FEATURE][,-FEATURE][,+hyperv][,nested=on][,msr-deny=MSR[-MSR]][,vendor=intel|amd]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// What it starts from.
    pub model: Model,
    /// Features that must be there, by their names in /proc/cpuinfo.
    pub add: Vec<String>,
    /// Features that must not.
    pub remove: Vec<String>,
    /// VT-x or AMD-V, so that the guest can run guests of its own.
    pub nested: bool,
    /// Microsoft's hypervisor interface, as far as KVM has it: what Windows and guests like it look for.
    pub hyperv: bool,
    /// MSRs that the guest may neither read nor write: it gets #GP.
    pub msr_deny: Vec<msr::Range>,
    /// Whose processor CPUID says it is. Absent: the host's maker.
    pub vendor: Option<Vendor>,
}

/// A set of features to start from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Model {
    /// All that KVM supports on this host.
    #[default]
    Host,
    /// A level of the x86-64 psABI and what every such processor and KVM have beside it: the same on every host that
    /// has it at all.
    Baseline(Level),
}

/// A level of the x86-64 psABI (its section 3.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The first 64-bit processors: SSE2.
    V1,
    /// About 2009: SSE4.2, POPCNT.
    V2,
    /// About 2013: AVX2, BMI2, FMA.
    V3,
}

/// The maker's name in CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD.
    Amd,
}

impl Vendor {
    /// The 12 bytes of EBX, EDX and ECX in leaf 0.
    pub fn name(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
        }
    }

    /// The one that it is not.
    pub fn other(self) -> Self {
        match self {
            Self::Intel => Self::Amd,
            Self::Amd => Self::Intel,
        }
    }
}

/// What [`Cpu::hyperv`] is called. No bit of CPUID, but a set of leaves.
const HYPERV: &str = "hyperv";

const MSR_DENY: &str = "msr-deny=";

/// The features of each level that it adds to those below. The first list has what makes a PC besides the psABI's, and
/// what KVM has on every host: it is no less portable, and without it a guest would be slow or not start.
const LEVELS: [(Level, &str); 3] = [
    (
        Level::V1,
        "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht syscall nx \
         lm cmp_legacy topoext x2apic tsc_deadline_timer tsc_adjust hypervisor",
    ),
    (Level::V2, "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"),
    (Level::V3, "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
];

/// Of those, what the psABI does not ask for: shown where the host's KVM has it, and no error where not.
const OPTIONAL: &str =
    "vme de pse mce sep mtrr pge mca pat pse36 clflush ht cmp_legacy topoext tsc_deadline_timer tsc_adjust";

impl Level {
    /// The features of this level, and whether a processor must have each to be of it.
    pub fn features(self) -> impl Iterator<Item = (&'static str, bool)> {
        let lists = LEVELS.iter().filter(move |(level, _)| *level <= self);
        lists
            .flat_map(|(_, names)| names.split_ascii_whitespace())
            .map(|name| (name, !OPTIONAL.split_ascii_whitespace().any(|n| n == name)))
    }
}

const MODELS: [(&str, Model); 4] = [
    ("host", Model::Host),
    ("x86-64-v1", Model::Baseline(Level::V1)),
    ("x86-64-v2", Model::Baseline(Level::V2)),
    ("x86-64-v3", Model::Baseline(Level::V3)),
];

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MODELS.iter().find(|(_, model)| model == self).map_or("host", |(name, _)| name))
    }
}

/// AMD-V's registers, VM_CR and VM_HSAVE_PA (APM vol. 2, 15.30), which KVM gives to every guest, whatever its CPUID.
const AMD_V: [msr::Range; 2] = [
    msr::Range { first: 0xc001_0114, last: 0xc001_0114 },
    msr::Range { first: 0xc001_0117, last: 0xc001_0117 },
];

impl Cpu {
    /// The MSRs that KVM must not let the guest use: those of `msr_deny`, and with a baseline those of features that it does
    /// not have where KVM does not hide them itself.
    pub fn denied_msrs(&self) -> Vec<msr::Window> {
        let unseen: &[_] = if self.model == Model::Host || self.nested { &[] } else { &AMD_V };
        msr::Window::around(&[&self.msr_deny, unseen].concat())
    }
}

impl FromStr for Cpu {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut cpu = Self::default();
        for (i, item) in text.split(',').enumerate() {
            let known = |name: &str| match cpu_features::find(name) {
                Some(_) => Ok(name.to_owned()),
                None if ["svm", "vmx"].contains(&name) => {
                    Err(ParseError::new(format!("{name} comes with nested=on and cannot be given otherwise")))
                }
                None => {
                    let near = cpu_features::nearest(name).join(", ");
                    Err(ParseError::new(format!("unknown CPU feature {name:?}; similar ones are {near}")))
                }
            };
            if let Some(name) = item.strip_prefix('+') {
                if name == HYPERV {
                    cpu.hyperv = true;
                } else {
                    cpu.add.push(known(name)?);
                }
            } else if let Some(name) = item.strip_prefix('-') {
                cpu.remove.push(known(name)?);
            } else {
                match item {
                    "nested=on" | "nested" => cpu.nested = true,
                    "nested=off" => cpu.nested = false,
                    "vendor=intel" => cpu.vendor = Some(Vendor::Intel),
                    "vendor=amd" => cpu.vendor = Some(Vendor::Amd),
                    _ if item.starts_with(MSR_DENY) => cpu.msr_deny.push(item[MSR_DENY.len()..].parse()?),
                    _ if i == 0 => {
                        let model = MODELS.iter().find(|(name, _)| *name == item);
                        cpu.model = model.map(|(_, model)| *model).ok_or_else(|| no_model(item))?;
                    }
                    _ => {
                        return Err(ParseError::new(format!(
                            "{item:?} is no part of a CPU model; expected +FEATURE, -FEATURE, nested=on, msr-deny=MSR or \
                             vendor=intel|amd"
                        )));
                    }
                }
            }
        }
        let (windows, most) = (cpu.denied_msrs().len(), msr::Window::MOST);
        if windows > most {
            return Err(ParseError::new(format!(
                "too many MSR ranges: KVM filters {most} places, and these need {windows}"
            )));
        }
        match cpu.add.iter().find(|name| cpu.remove.contains(name)) {
            Some(name) => Err(ParseError::new(format!("{name} is both added and removed"))),
            None => Ok(cpu),
        }
    }
}

fn no_model(name: &str) -> ParseError {
    let names: Vec<_> = MODELS.iter().map(|(name, _)| *name).collect();
    ParseError::new(format!("unknown CPU model {name:?}; expected one of {}", names.join(", ")))
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.model)?;
        self.add.iter().try_for_each(|name| write!(f, ",+{name}"))?;
        self.remove.iter().try_for_each(|name| write!(f, ",-{name}"))?;
        if self.hyperv {
            write!(f, ",+{HYPERV}")?;
        }
        if self.nested {
            f.write_str(",nested=on")?;
        }
        self.msr_deny.iter().try_for_each(|range| write!(f, ",{MSR_DENY}{range}"))?;
        match self.vendor {
            None => Ok(()),
            Some(Vendor::Intel) => f.write_str(",vendor=intel"),
            Some(Vendor::Amd) => f.write_str(",vendor=amd"),
        }
    }
}

impl Serialize for Cpu {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cpu {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_read_back_and_wrong_names_get_the_nearest() {
        for text in [
            "host",
            "x86-64-v2,+aes,-x2apic,+hyperv,nested=on,vendor=amd",
            "host,msr-deny=0x10a,msr-deny=0x480-0x491",
            "host,-avx2",
        ] {
            assert_eq!(text.parse::<Cpu>().unwrap().to_string(), text);
        }
        assert_eq!("+avx2,nested=on".parse::<Cpu>().unwrap().to_string(), "host,+avx2,nested=on");
        for (text, said) in [
            ("haswell", "x86-64-v3"),
            ("host,+avx3", "avx2"),
            ("host,-sse4.2", "sse4_2"),
            ("host,+svm", "nested=on"),
            ("host,+aes,-aes", "both"),
            ("host,aes", "+FEATURE"),
            ("host,msr-deny=efer", "its number"),
            (
                &(0..17).fold("host".to_owned(), |text, n| format!("{text},msr-deny={}", n * 0x3000)),
                "16 places",
            ),
            ("", "x86-64-v1"),
        ] {
            let error = text.parse::<Cpu>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn every_level_is_made_of_known_features() {
        for (name, _) in Level::V3.features() {
            assert!(cpu_features::find(name).is_some(), "{name}");
        }
        assert!(Level::V2.features().all(|(name, _)| name != "avx"));
    }
}
