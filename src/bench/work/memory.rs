//! Work for the memory: bandwidth as STREAM's triad measures it, and the latency of dependent loads.

use crate::measure::Random;

/// Bytes of each array of the triad: more than the last cache, as STREAM asks for, of all but large servers.
pub const ARRAY: usize = 32 << 20;
/// Bytes that the chase goes over.
pub const CHASED: usize = 64 << 20;

/// The triad's three arrays.
pub struct Arrays {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

impl Arrays {
    /// All written to, so that no page is missing.
    pub fn new() -> Self {
        let array = |value| vec![value; ARRAY / size_of::<f64>()];
        Self { a: array(1.0), b: array(2.0), c: array(0.5) }
    }

    /// a = b + 3 c, so many times. 1 if it came out right.
    pub fn triad(&mut self, rounds: u64) -> u64 {
        for _ in 0..rounds {
            let (b, c) = (std::hint::black_box(&self.b), std::hint::black_box(&self.c));
            for ((a, b), c) in self.a.iter_mut().zip(b).zip(c) {
                *a = b + 3.0 * c;
            }
            std::hint::black_box(&mut self.a);
        }
        let last = self.a.len() - 1;
        (self.a[0] == 3.5 && self.a[last] == 3.5).into()
    }
}

/// A cache line that knows which is next.
#[derive(Clone)]
#[repr(align(64))]
struct Line(u32);

/// Cache lines in one random cycle through all of them.
pub struct Ring(Vec<Line>);

impl Ring {
    /// Over `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let count = bytes / size_of::<Line>();
        let mut next: Vec<Line> = (0..count as u32).map(Line).collect();
        let mut random = Random::new(1);
        // Sattolo's shuffle leaves a single cycle.
        for last in (1..count).rev() {
            next.swap(last, random.below(last));
        }
        Self(next)
    }

    /// Follows it for so many steps, and returns where that ends.
    pub fn chase(&self, steps: u64) -> u64 {
        let mut at = 0;
        for _ in 0..steps {
            at = self.0[at as usize].0;
        }
        at.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chase_comes_by_every_line_once() {
        let ring = Ring::new(1000 * 64);
        let mut seen = vec![false; 1000];
        (0..1000).for_each(|steps| seen[ring.chase(steps) as usize] = true);
        assert!(seen.iter().all(|seen| *seen));
        assert_eq!(ring.chase(1000), 0);
    }
}
