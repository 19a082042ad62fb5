//! virtio: devices, their queues, the core that drives them, and transports.

pub mod device;
pub mod queue;
pub mod testing;
