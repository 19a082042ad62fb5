//! What the transports have in common beside the core: why one cannot put a device on the bus.

use std::io;

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor gave no interrupt.
    #[error("cannot get interrupt {gsi} for {name}")]
    Interrupt {
        /// The device.
        name: String,
        /// The interrupt line.
        gsi: u32,
        /// What the hypervisor said.
        #[source]
        source: io::Error,
    },
    /// The host is out of descriptors.
    #[error("cannot create the queue events of {name}")]
    Events {
        /// The device.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
