//! The state of a [`Core`], and what a restore refuses.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{Core, EVENT_IDX, Status, VERSION_1};
use crate::bus::lock;
use crate::state::{StateError, Stateful};
use crate::virtio::queue::{Position, Setup, Virtqueue};

/// [`Core`]'s saved state, the device's included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    features: u128,
    status: u8,
    needs_reset: bool,
    config_generation: u32,
    queues: Vec<(Setup, Position)>,
    device: Vec<u8>,
}

/// Only between [`Core::pause`] and [`Core::resume`]. `restore` leaves the device at rest, too.
impl Stateful for Core {
    type State = State;

    fn save(&self) -> State {
        let parts = lock(&self.parts);
        let needs_reset = self.failed();
        // A broken device stands still until its reset, so nobody can tell where in the rings it was.
        let position = |queue: &Virtqueue| if needs_reset { Position::default() } else { queue.position() };
        State {
            features: self.features,
            status: self.status.bits(),
            needs_reset,
            config_generation: self.config_generation(),
            queues: self.queues.iter().zip(&parts.queues).map(|(s, q)| (*s, position(q))).collect(),
            device: parts.device.save_bytes(),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        let invalid = |what: String| Err(StateError::Invalid(format!("{}: {what}", self.name)));
        let status = Status::from_bits_truncate(state.status);
        if status.bits() != state.status || status.contains(Status::NEEDS_RESET) {
            return invalid(format!("status {:#x}", state.status));
        }
        let chain = [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK];
        if chain.windows(2).any(|step| status.contains(step[1]) && !status.contains(step[0])) {
            return invalid(format!("status {status:?}"));
        }
        let agreed = status.contains(Status::FEATURES_OK);
        let features = state.features as u64;
        let fit = state.features & !u128::from(self.offered()) == 0 && features & VERSION_1 != 0;
        if agreed && !fit {
            return invalid(format!("features {:#x}, but {:#x} are offered", state.features, self.offered()));
        }
        let fits =
            |(setup, max): (&Setup, u16)| !setup.ready || (setup.size.is_power_of_two() && setup.size <= max);
        let setups = state.queues.iter().map(|(setup, _)| setup).zip(self.traits.queues.iter().copied());
        if state.queues.len() != self.queues.len() || !setups.into_iter().all(fits) {
            return invalid(format!("queues {:x?}", state.queues));
        }

        let running = status.contains(Status::DRIVER_OK) && !state.needs_reset;
        let mut parts = lock(&self.parts);
        parts.device.restore_bytes(&state.device)?;
        for (queue, (setup, position)) in parts.queues.iter_mut().zip(&state.queues) {
            queue.disable();
            let event_idx = features & EVENT_IDX != 0;
            if running && setup.ready && !queue.enable(setup, *position, event_idx) {
                return invalid(format!("queue {setup:x?}"));
            }
        }
        parts.config = parts.device.config().to_vec();
        parts.started = running;
        drop(parts);
        self.signals.needs_reset.store(state.needs_reset, Ordering::SeqCst);
        self.signals.config_generation.store(state.config_generation, Ordering::SeqCst);
        self.features = state.features;
        self.status = status;
        self.queues = state.queues.into_iter().map(|(setup, _)| setup).collect();
        Ok(())
    }
}
