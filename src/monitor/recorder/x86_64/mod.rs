//! What a record has of x86-64: the registers and the clock.

pub mod clock;
pub mod registers;
