//! Builds what runs inside a VM.

fn main() {}
