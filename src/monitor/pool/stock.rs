//! [`Stock`]: which spares a pool has, and what is to be done next. Pure: it is told the time, and acts on nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Spares in the making at a time, while some are waited for.
const AT_ONCE: usize = 2;
/// None is made so soon after one was taken, unless somebody waits for it: what was taken has the processors to itself.
const QUIET: Duration = Duration::from_millis(20);
/// How long a spare may be in the making.
const MAKING_LIMIT: Duration = Duration::from_secs(30);
/// From the word that a spare is wanted to its answer.
const TAKING_LIMIT: Duration = Duration::from_secs(5);
/// Until another is tried after one has failed; twice as long after each further one.
const PAUSE: Duration = Duration::from_millis(100);
/// So many fail in a row, and no further one is tried.
const FAILURES: u32 = 6;
/// A spare that ends after so long was well.
const WELL: Duration = Duration::from_secs(10);

/// What a spare is doing, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Making(Instant),
    Ready(Instant),
    Taken(Instant),
}

/// What is to be done about spares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Make one.
    Make,
    /// Look again then.
    At(Instant),
    Nothing,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Stock {
    size: usize,
    spares: BTreeMap<u32, Phase>,
    /// They were all ready once.
    filled: bool,
    /// Machines that are wanted, and for which there is no spare.
    pub wanted: usize,
    /// Machines that were taken.
    pub taken: u64,
    quiet_until: Option<Instant>,
    /// Spares that failed since one was taken.
    failures: u32,
    not_before: Option<Instant>,
}

impl Stock {
    pub fn new(size: u32) -> Self {
        Self {
            size: size as usize,
            spares: BTreeMap::new(),
            filled: false,
            wanted: 0,
            taken: 0,
            quiet_until: None,
            failures: 0,
            not_before: None,
        }
    }

    fn count(&self, is: fn(&Phase) -> bool) -> usize {
        self.spares.values().filter(|phase| is(phase)).count()
    }

    pub fn ready(&self) -> usize {
        self.count(|phase| matches!(phase, Phase::Ready(_)))
    }

    fn making(&self) -> usize {
        self.count(|phase| matches!(phase, Phase::Making(_)))
    }

    pub fn is_filled(&self) -> bool {
        self.filled
    }

    /// Too many have failed.
    pub fn gave_up(&self) -> bool {
        self.failures >= FAILURES
    }

    pub fn next(&self, now: Instant) -> Next {
        let making = self.making();
        let urgent = !self.filled || self.wanted > 0;
        if self.gave_up() || self.ready() + making >= self.size + self.wanted {
            return Next::Nothing;
        }
        let quiet = self.quiet_until.filter(|_| !urgent);
        match self.not_before.into_iter().chain(quiet).max() {
            Some(at) if at > now => Next::At(at),
            _ if making >= if urgent { AT_ONCE } else { 1 } => Next::Nothing,
            _ => Next::Make,
        }
    }

    /// When the next of them takes too long.
    pub fn deadline(&self) -> Option<Instant> {
        self.spares.values().filter_map(Phase::until).min()
    }

    /// Those that take too long.
    pub fn late(&self, now: Instant) -> Vec<u32> {
        let late = self.spares.iter().filter(|(_, phase)| phase.until().is_some_and(|until| until <= now));
        late.map(|(number, _)| *number).collect()
    }

    /// One is in the making.
    pub fn make(&mut self, number: u32, now: Instant) {
        self.spares.insert(number, Phase::Making(now));
    }

    /// One that was in the making is ready. False if it was not.
    pub fn stands(&mut self, number: u32, now: Instant) -> bool {
        match self.spares.get_mut(&number) {
            Some(phase @ Phase::Making(_)) => {
                *phase = Phase::Ready(now);
                self.filled |= self.ready() >= self.size;
                true
            }
            _ => false,
        }
    }

    /// The one that has been ready for longest is wanted.
    pub fn take(&mut self, now: Instant) -> Option<u32> {
        let mut ready = self.spares.iter_mut().filter(|(_, phase)| matches!(phase, Phase::Ready(_)));
        let (number, phase) = ready.next()?;
        *phase = Phase::Taken(now);
        self.quiet_until = Some(now + QUIET);
        Some(*number)
    }

    /// One that was wanted is not.
    pub fn put_back(&mut self, number: u32, now: Instant) {
        self.spares.insert(number, Phase::Ready(now));
    }

    /// One that was wanted runs, and is no spare any more. False if it was not wanted.
    pub fn runs(&mut self, number: u32, now: Instant) -> bool {
        let taken = matches!(self.spares.get(&number), Some(Phase::Taken(_)));
        if taken {
            self.spares.remove(&number);
            self.taken += 1;
            self.failures = 0;
            self.quiet_until = Some(now + QUIET);
        }
        taken
    }

    /// One has failed, or ended.
    pub fn ended(&mut self, number: u32, now: Instant) {
        let Some(phase) = self.spares.remove(&number) else { return };
        if matches!(phase, Phase::Ready(since) if now - since >= WELL) {
            self.failures = 0;
        }
        let pause = PAUSE * 2u32.pow(self.failures.min(FAILURES));
        self.failures += 1;
        self.not_before = Some(now + pause);
    }
}

impl Phase {
    fn until(&self) -> Option<Instant> {
        match self {
            Self::Making(since) => Some(*since + MAKING_LIMIT),
            Self::Taken(since) => Some(*since + TAKING_LIMIT),
            Self::Ready(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stock of `size` that is full.
    fn full(size: u32, now: Instant) -> Stock {
        let mut stock = Stock::new(size);
        for number in 0..size {
            assert_eq!(stock.next(now), Next::Make);
            stock.make(number, now);
            assert!(stock.stands(number, now));
        }
        assert!(stock.is_filled() && stock.next(now) == Next::Nothing);
        stock
    }

    #[test]
    fn what_was_taken_is_replaced_one_at_a_time_once_it_is_quiet() {
        let start = Instant::now();
        let mut stock = full(3, start);
        let taken = [stock.take(start).unwrap(), stock.take(start).unwrap()];
        assert_eq!(taken, [0, 1], "the oldest first");
        let later = start + QUIET / 2;
        assert!(taken.iter().all(|number| stock.runs(*number, later)) && !stock.runs(2, later));
        assert_eq!((stock.next(later), stock.taken), (Next::At(later + QUIET), 2));
        let quiet = later + QUIET;
        assert_eq!(stock.next(quiet), Next::Make);
        stock.make(3, quiet);
        assert_eq!(stock.next(quiet), Next::Nothing, "one at a time");
        // Somebody waits for more than there are: no time is lost.
        stock.wanted = 5;
        assert_eq!(stock.next(later), Next::Make);
        stock.make(4, later);
        assert_eq!(stock.next(later), Next::Nothing);
    }

    #[test]
    fn what_fails_is_tried_again_more_and_more_rarely_and_not_for_ever() {
        let mut now = Instant::now();
        let mut stock = full(1, now);
        let mut pauses = Vec::new();
        for number in 1.. {
            stock.ended(number - 1, now);
            let Next::At(at) = stock.next(now) else { break };
            pauses.push((at - now).as_millis());
            now = at;
            assert_eq!(stock.next(now), Next::Make);
            stock.make(number, now);
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600]);
        assert!(stock.gave_up() && stock.next(now + WELL * 100) == Next::Nothing);
        // One that has been ready for long was no failure of its making.
        let mut stock = full(1, now);
        (0..20).for_each(|number| {
            now += WELL;
            stock.ended(number, now);
            now += PAUSE;
            assert_eq!(stock.next(now), Next::Make);
            stock.make(number + 1, now);
            assert!(stock.stands(number + 1, now));
        });
    }

    #[test]
    fn who_takes_too_long_is_named() {
        let start = Instant::now();
        let mut stock = full(2, start);
        assert_eq!(stock.deadline(), None);
        stock.take(start);
        assert_eq!(stock.deadline(), Some(start + TAKING_LIMIT));
        stock.make(7, start);
        assert_eq!(stock.late(start + TAKING_LIMIT), [0]);
        assert_eq!(stock.late(start + MAKING_LIMIT), [0, 7]);
    }
}
