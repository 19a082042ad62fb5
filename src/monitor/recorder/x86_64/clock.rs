//! The recorder's clock: the processor's time-stamp counter, read without a system call.

/// The time-stamp counter. Its rate is told by whoever reads it beside a clock of known rate.
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: RDTSC has no preconditions on x86-64 in a process that has not asked for SIGSEGV on it (prctl PR_SET_TSC).
    unsafe { core::arch::x86_64::_rdtsc() }
}
