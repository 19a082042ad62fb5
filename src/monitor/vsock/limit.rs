//! How many connections the host has descriptors for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most connections that a guest has, whatever the host would allow.
pub const MAX_CONNECTIONS: usize = 8192;
/// Descriptors for all else that this process has.
const OTHERS: u64 = 512;

/// Raises this process's limit of descriptors as far as it is allowed to and of use; the connections that leaves room for. The limit
/// that processes start with is low only for programs that call select(2).
pub fn raise() -> usize {
    let wanted = MAX_CONNECTIONS as u64 + OTHERS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let goal = wanted.min(maximum.unwrap_or(wanted));
    let mut limit = current.unwrap_or(wanted);
    if limit < goal {
        match setrlimit(Resource::Nofile, Rlimit { current: Some(goal), maximum }) {
            Ok(()) => limit = goal,
            Err(error) => log::warn!("raise the limit of open files from {limit} to {goal}: {error}"),
        }
    }
    // However few there are, a guest has some.
    (limit.saturating_sub(OTHERS) as usize).clamp(16, MAX_CONNECTIONS)
}
