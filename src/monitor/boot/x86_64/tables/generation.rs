//! The VM generation ID ("Virtual Machine Generation ID", Microsoft 2012): random bytes in guest memory that are others in each copy
//! of a machine. `acpi` describes where they are, `legacy::acpi_pm` tells of new ones.
//!
//! A guest whose kernel knows it (Linux from 5.18 on, CONFIG_VMGENID) makes its random generator anew when they change.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::Error;
use crate::memory::GuestRam;

/// Bytes of it.
pub const SIZE: usize = 16;

/// Writes another one, `at` its place in `memory`.
///
/// # Errors
/// The host has no random bytes; there is no memory.
pub fn renew(memory: &GuestRam, at: u64) -> Result<(), Error> {
    let mut bytes = [0; SIZE];
    let got = getrandom(&mut bytes, GetRandomFlags::empty()).map_err(|error| Error::Random(error.into()))?;
    if got != SIZE {
        return Err(Error::Random(io::ErrorKind::UnexpectedEof.into()));
    }
    memory.write_slice(&bytes, GuestAddress(at)).map_err(Error::Write)
}
