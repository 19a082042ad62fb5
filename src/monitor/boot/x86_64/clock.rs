//! The clock of a Linux without kvmclock: whether it learns the frequency of the processor's time-stamp counter.
//!
//! The machine asks once it has vCPUs, and warns.

/// What to add to `cmdline` so that a Linux with it has a clock, where it may not find one. Without kvmclock it takes the frequency of
/// the processor's clock, `tsc_khz`, from CPUID on `intels` processors only. On others it measures it against the PIT, which fails where
/// reading that takes uneven times.
pub fn missing_clock(cmdline: &str, intels: bool, tsc_khz: Option<u32>) -> Option<String> {
    let mut words = cmdline.split_ascii_whitespace();
    let without = words.clone().any(|word| word == "no-kvmclock");
    if intels || !without || words.any(|word| word.starts_with("tsc_early_khz=")) {
        return None;
    }
    Some(format!("tsc_early_khz={}", tsc_khz?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linux_without_kvmclock_is_told_the_frequency_where_it_does_not_believe_cpuid() {
        let word = Some("tsc_early_khz=2000000".to_owned());
        for (cmdline, intels, khz, expected) in [
            ("quiet no-kvmclock", false, Some(2_000_000), word),
            ("quiet no-kvmclock", true, Some(2_000_000), None),
            ("quiet no-kvmclock", false, None, None),
            ("no-kvmclock tsc_early_khz=1", false, Some(2_000_000), None),
            ("quiet", false, Some(2_000_000), None),
        ] {
            assert_eq!(missing_clock(cmdline, intels, khz), expected, "{cmdline}");
        }
    }
}
