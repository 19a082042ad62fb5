//! Renders a result for people and programs: a table on the terminal, JSON, CSV, a page.

pub mod csv;
pub mod facts;
pub mod html;
pub mod number;
pub mod rows;
pub mod strip;
pub mod table;

use super::result::Run;

/// The result itself as JSON.
pub fn json(run: &Run) -> String {
    // Its keys are strings, so it cannot fail.
    serde_json::to_string_pretty(run).unwrap_or_default() + "\n"
}

/// A small result for the tests of this and of what reads it.
#[cfg(test)]
pub mod sample {
    use crate::result::Run;

    /// The result that tests/bench uses too.
    pub fn run() -> Run {
        serde_json::from_str(include_str!("../../../tests/bench/small.json")).unwrap()
    }
}
