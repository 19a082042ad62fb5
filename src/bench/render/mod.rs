//! A result for people and programs: a table on the terminal, JSON, CSV, a page.

use super::result::Run;

/// The table for a terminal.
pub fn table(run: &Run) -> String {
    format!("{run:#?}\n")
}
