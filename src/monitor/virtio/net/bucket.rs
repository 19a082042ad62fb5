//! [`Bucket`]: a token bucket. In any stretch of time no more passes than its rate gives in that time, its burst, and the last
//! frame, which may overdraw it: so one that is larger than the burst passes, too. Exact: nothing is rounded.

use std::time::{Duration, Instant};

const NANOS: i128 = 1_000_000_000;
/// What has to wait waits for this part of a second's worth, or for half a burst if that is less: so a limited way is woken a
/// thousand times a second at most, and not for each frame.
const PORTION: u64 = 1000;

/// Tokens, which come at a rate and are taken.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// A second.
    rate: u64,
    /// Billionths of a token, as are all of the others: a nanosecond brings `rate` of them.
    burst: i128,
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A bucket with `burst` tokens in it, and `rate` more each second. Neither is 0.
    pub fn new(rate: u64, burst: u64, now: Instant) -> Self {
        let burst = i128::from(burst.max(1)) * NANOS;
        Self { rate: rate.max(1), burst, level: burst, filled: now }
    }

    /// Whether tokens may be taken at `now`.
    pub fn admits(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_nanos();
        let brought = i128::try_from(passed).unwrap_or(i128::MAX).saturating_mul(self.rate.into());
        self.level = self.level.saturating_add(brought).min(self.burst);
        self.filled = now;
        self.level > 0
    }

    /// Takes tokens, more than there are if need be.
    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * NANOS;
    }

    /// From the last [`Bucket::admits`], which said no, until it is worth asking again.
    pub fn wait(&self) -> Duration {
        let portion = (i128::from(self.rate / PORTION) * NANOS).min(self.burst / 2).max(1);
        let (missing, rate) = ((portion - self.level).max(1), i128::from(self.rate));
        let nanos = (missing + rate - 1) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whoever takes whenever it may, after any pauses, gets in every stretch of time what was promised, and not more.
        #[test]
        fn no_stretch_of_time_has_more_than_its_share_and_a_greedy_taker_gets_all_of_it(
            rate in 1u64..1 << 40, burst in 1u64..1 << 32,
            steps in prop::collection::vec((0u64..3_000_000_000, 1u64..70_000, any::<bool>()), 1..60),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = Bucket::new(rate, burst, now);
            let mut taken: Vec<(Instant, u64)> = Vec::new();
            let mut waited_out = true;
            for (pause, size, obedient) in steps {
                now += Duration::from_nanos(pause);
                if bucket.admits(now) {
                    bucket.take(size);
                    taken.push((now, size));
                } else if obedient && bucket.wait() < Duration::from_secs(1 << 20) {
                    now += bucket.wait();
                    waited_out &= bucket.admits(now);
                }
            }
            prop_assert!(waited_out, "after the wait there is something");
            for (i, (from, _)) in taken.iter().enumerate() {
                let mut sum = 0u128;
                for (to, size) in &taken[i..] {
                    let allowed = u128::from(burst) * 1_000_000_000 + u128::from(rate) * (*to - *from).as_nanos();
                    prop_assert!(sum * 1_000_000_000 < allowed, "before the last frame the bucket is not empty");
                    sum += u128::from(*size);
                }
            }
        }
    }

    #[test]
    fn a_greedy_taker_gets_the_whole_rate() {
        let start = Instant::now();
        let (mut bucket, mut now, mut sum) = (Bucket::new(12_500_000, 100_000, start), start, 0);
        while now < start + Duration::from_secs(10) {
            while bucket.admits(now) {
                bucket.take(1514);
                sum += 1514;
            }
            now += bucket.wait();
        }
        // The end may come in a wait for a thousandth of a second's worth.
        let promised = 10 * 12_500_000 + 100_000;
        assert!((promised - 15_000..promised + 1514).contains(&sum), "{sum} of {promised}");
    }

    #[test]
    fn the_largest_and_the_smallest_numbers_do_no_harm() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1 << 40);
        for (rate, burst) in [(1, 1), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let mut bucket = Bucket::new(rate, burst, start);
            assert!(bucket.admits(later));
            bucket.take(u64::MAX);
            bucket.take(u64::MAX);
            assert!(!bucket.admits(later) && bucket.wait() > Duration::ZERO);
        }
    }
}
