//! Time since a moment: the time stamp counter, whose speed KVM's clock tells (Documentation/virt/kvm/x86/msr.rst).

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc};

const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// CPUID 0x40000001, EAX: that MSR is there.
const CLOCKSOURCE2: u32 = 1 << 3;
/// Counts in a second where nothing is told: a usual processor's, so that waiting is some time.
const USUAL: u64 = 3_000_000_000;

/// What the hypervisor writes.
#[repr(C, align(64))]
struct SystemTime {
    version: u32,
    _pad: u32,
    counter: u64,
    time: u64,
    multiplier: u32,
    shift: i8,
    flags: [u8; 3],
}

/// A stopwatch.
pub struct Clock {
    start: u64,
    /// Nanoseconds of a count, times 2^32, after that shift; none if nobody tells.
    scale: Option<(u32, i8)>,
}

impl Clock {
    /// Starts at zero.
    pub fn start() -> Self {
        // SAFETY: every processor with long mode has it.
        Self { start: unsafe { _rdtsc() }, scale: scale() }
    }

    /// Milliseconds since the start.
    pub fn milliseconds(&self) -> u64 {
        // SAFETY: as in `start`.
        let counts = u128::from(unsafe { _rdtsc() }.saturating_sub(self.start));
        let nanoseconds = match self.scale {
            Some((multiplier, shift)) => {
                let shifted = if shift >= 0 { counts << (shift & 31) } else { counts >> (-shift & 63) };
                (shifted * u128::from(multiplier)) >> 32
            }
            None => (counts * 1000) >> (USUAL / 1_000_000).ilog2(),
        };
        (nanoseconds / 1_000_000) as u64
    }
}

fn scale() -> Option<(u32, i8)> {
    let signature = __cpuid(0x4000_0000);
    if signature.ebx.to_le_bytes() != *b"KVMK" || __cpuid(0x4000_0001).eax & CLOCKSOURCE2 == 0 {
        return None;
    }
    let mut told =
        SystemTime { version: 0, _pad: 0, counter: 0, time: 0, multiplier: 0, shift: 0, flags: [0; 3] };
    let at = &raw mut told;
    for value in [at as u64 | 1, 0] {
        // SAFETY: CPUID says that the MSR is there. The hypervisor writes only between these two.
        unsafe {
            asm!("wrmsr", in("ecx") MSR_SYSTEM_TIME, in("eax") value as u32, in("edx") (value >> 32) as u32);
        }
    }
    // SAFETY: a local, which the hypervisor has written.
    let told = unsafe { at.read_volatile() };
    (told.multiplier != 0).then_some((told.multiplier, told.shift))
}
