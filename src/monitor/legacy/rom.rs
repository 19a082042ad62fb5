//! What answers writes to the ROM: reads and fetches never leave the guest, writes do, since its slot is read-only.
//!
//! A write changes nothing, as on a PC; that it happened stands in the log and in a trace.

use crate::bus::{Device, Effect};
use crate::guest_warn;
use crate::state::Stateless;

/// The ROM's writable side.
#[derive(Debug, Default)]
pub struct Rom;

impl Device for Rom {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        guest_warn!("writes {} bytes to ROM, at {offset:#x} from its start: ignored", data.len());
        Effect::None
    }
}

impl Stateless for Rom {}
