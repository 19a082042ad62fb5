//! What a vCPU's thread knows of x86-64: registers, instructions, page tables, and what a triple fault may mean.

pub mod debug;
pub mod linear;
pub mod registers;
pub mod report;
pub mod restart;
