//! What virtualization costs a program that only computes.

use super::super::measure::{Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Setting, Size};
use super::super::work::Step;
use super::places::{self, Measured};

const INTEGER: Quantity = Quantity { name: "integer loop", unit: Unit::Milliseconds, better: Better::Lower };
const FLOAT: Quantity =
    Quantity { name: "floating-point loop", unit: Unit::Milliseconds, better: Better::Lower };

/// The suite.
///
/// # Errors
/// The work cannot even be done natively.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let integers = places::enough(setting, 10_000, &Step::Integer)?;
    // The work grows with the square.
    let side = places::enough(setting, 10_000, &|points| Step::Float(points.isqrt()))?.isqrt().max(1);
    let milliseconds = |_: &Step, seconds: f64| seconds * 1e3;
    let work = || {
        vec![
            Measured { step: Step::Integer(integers), quantity: INTEGER, value: milliseconds },
            Measured { step: Step::Float(side), quantity: FLOAT, value: milliseconds },
        ]
    };
    let method = vec![
        format!(
            "Integers: the Collatz sequences of 1 to {integers}. Floating point: the Mandelbrot set on {side} by {side} points."
        ),
        "The same program with the same amount of work everywhere, on one CPU.".to_owned(),
        places::CLOCK.to_owned(),
    ];
    let titles = ("cpu", "Processor: native, container, VM");
    places::suite(titles, setting, Size { cpus: 1, mib: 256 }, &work, method, plan, progress)
}
