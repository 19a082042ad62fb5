//! Takes samples that can be trusted: contenders interleaved in random order, warm-up apart, failures kept.

pub mod crowd;
pub mod offspring;
pub mod span;
pub mod stats;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::result::{self, Better, Figure, Series, Unit};

/// Set by Ctrl-C: what is being measured ends after the sample at hand, and what there is is shown.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// One that takes part. It is set up when it is made and tears down what it made when it is dropped.
pub trait Contender {
    /// Short and unique in its suite.
    fn name(&self) -> &str;
    /// The exact command, or what is done in place of one.
    fn command(&self) -> String;
    /// The version that it tells of itself.
    fn version(&self) -> Option<String> {
        None
    }
    /// Takes one sample: a value for each of the suite's [`Quantity`]s, in their order.
    ///
    /// # Errors
    /// What went wrong, for a person. A run that ended badly is an error, however fast it was.
    fn sample(&mut self) -> Result<Vec<f64>, String>;
}

/// What a sample has one value of.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    /// "exec to first output".
    pub name: &'static str,
    /// Of its values.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Samples of each contender.
    pub samples: usize,
    /// Samples before those, which count for nothing.
    pub warm_up: usize,
    /// Seed of the order and of the resampling: chosen anew for each run, and kept in its result by whoever asks. With 0 the
    /// contenders come in the order of their list: what must repeat bit for bit depends on who came before.
    pub seed: u64,
    /// A contender whose samples of a series have taken longer than this, and are [`FEWEST`] or more, is measured no further and
    /// keeps what it has.
    pub limit: Option<Duration>,
}

/// Samples that nobody has fewer of for being slow.
pub const FEWEST: usize = 3;

/// A contender that could not even be set up: its name, what would have been run, and why not.
#[derive(Debug, Clone)]
pub struct Absent {
    /// Its name.
    pub name: String,
    /// The command that was tried, or would have been.
    pub command: String,
    /// Why not.
    pub why: String,
}

/// Takes samples of `contenders` in rounds: each round has each of them once, in an order of its own. The first in the list
/// that yields samples is the baseline of the ratios. One that fails is measured no further, and its samples are thrown
/// away: half a series would be that of its lucky runs.
///
/// `progress` is called before each sample with how far it is (0 to 1) and whose it is.
pub fn series(
    contenders: &mut [Box<dyn Contender + '_>],
    absent: &[Absent],
    quantities: &[Quantity],
    plan: Plan,
    progress: &mut dyn FnMut(f64, &str),
) -> (Vec<result::Contender>, Vec<Figure>) {
    let mut random = Random::new(plan.seed);
    let mut taken: Vec<Result<Vec<Vec<f64>>, String>> = contenders.iter().map(|_| Ok(Vec::new())).collect();
    let mut spent = vec![Duration::ZERO; contenders.len()];
    let rounds = plan.warm_up + plan.samples;
    let all = (rounds * contenders.len()).max(1) as f64;
    let mut done = 0usize;
    'rounds: for round in 0..rounds {
        let order = match plan.seed {
            0 => (0..contenders.len()).collect(),
            _ => random.order(contenders.len()),
        };
        for index in order {
            if INTERRUPTED.load(Ordering::SeqCst) {
                break 'rounds;
            }
            done += 1;
            let contender = &mut contenders[index];
            let Ok(samples) = &mut taken[index] else { continue };
            if samples.len() >= FEWEST && plan.limit.is_some_and(|limit| spent[index] > limit) {
                continue;
            }
            let start = Instant::now();
            progress((done - 1) as f64 / all, contender.name());
            match contender.sample() {
                Ok(values) if values.len() != quantities.len() => {
                    taken[index] = Err(format!("{} values where {} are due", values.len(), quantities.len()));
                }
                Ok(values) if values.iter().any(|value| !value.is_finite()) => {
                    taken[index] = Err(format!("not a measurement: {values:?}"));
                }
                Ok(values) if round >= plan.warm_up => {
                    samples.push(values);
                    spent[index] += start.elapsed();
                }
                Ok(_) => {}
                // What was interrupted did not fail.
                Err(_) if interrupted() => break 'rounds,
                Err(why) => taken[index] = Err(why),
            }
        }
    }
    let entries = contenders.iter().zip(&taken).map(|(contender, taken)| result::Contender {
        name: contender.name().to_owned(),
        command: contender.command(),
        version: contender.version(),
        failure: taken.as_ref().err().cloned(),
    });
    let missing = absent.iter().cloned().map(|Absent { name, command, why }| result::Contender {
        name,
        command,
        version: None,
        failure: Some(why),
    });
    let entries = entries.chain(missing).collect();
    let series = |column: usize| {
        let measured = contenders.iter().zip(&taken).filter_map(|(contender, taken)| {
            let samples: Vec<f64> = taken.as_ref().ok()?.iter().map(|values| values[column]).collect();
            (!samples.is_empty()).then(|| Series { who: contender.name().to_owned(), samples })
        });
        measured.collect::<Vec<_>>()
    };
    let figures = quantities.iter().enumerate().map(|(column, quantity)| {
        let series = series(column);
        Figure {
            name: quantity.name.to_owned(),
            unit: quantity.unit,
            better: quantity.better,
            baseline: series.first().map(|series| series.who.clone()),
            series,
        }
    });
    (entries, figures.collect())
}

/// Whether Ctrl-C was pressed. What it ended may be known to have failed before the signal has come here.
fn interrupted() -> bool {
    std::thread::sleep(Duration::from_millis(20));
    INTERRUPTED.load(Ordering::SeqCst)
}

/// A small generator (xorshift64*): for orders and resampling, where nothing depends on its quality but fairness.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    pub fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed | 1)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((u128::from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)) * limit as u128) >> 64) as usize
    }

    /// 0 to `count`, in a random order.
    pub fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}
