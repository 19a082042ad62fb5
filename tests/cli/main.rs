//! The `vmm` command as a user meets it: a table of input that cannot work, and tiny guests from start to end.

mod bad_input;
mod images;
mod lives;
mod place;
