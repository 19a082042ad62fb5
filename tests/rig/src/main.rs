//! Runs a command where KVM boots real guests.

fn main() {}
