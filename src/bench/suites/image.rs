//! Not there yet.

use crate::bench::measure::Plan;
use crate::bench::result::Suite;
use crate::bench::rivals::Setting;

/// Runs the suite.
///
/// # Errors
/// Always.
pub fn run(_: &Setting, _: Plan, _: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    Err("image: not there yet".to_owned())
}
