//! [`PlugError`]: why a device cannot come or go. Its text says what to try: a control socket's clients get nothing else.

use crate::config::Invalid;
use crate::error_chain;
use crate::machine::outputs::Clash;
use crate::virtio;

/// Why a device cannot come or go.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// It has virtio-mmio devices.
    #[error("devices come and go on a PCI bus only, and it has none: start it with `transport=pci`")]
    NoPci,
    /// The vCPUs stand still.
    #[error("it is paused: resume it first")]
    Paused,
    /// There is no machine, or the next one is being built.
    #[error("it has ended or is starting again")]
    Ended,
    /// The guest knows no more places.
    #[error("no place is free for another device: remove one; a guest that reboots finds room for more")]
    Full,
    /// There is no such device.
    #[error("it has no device called {0:?}: vmm device list shows what it has")]
    Unknown(String),
    /// It stays as long as the machine.
    #[error("{0} is there for good: disks and network devices can be removed")]
    Fixed(String),
    /// The device's settings cannot be.
    #[error("{0}; {hint}", hint = .0.hint)]
    Config(#[from] Invalid),
    /// A run's output would be its image.
    #[error("{0}; {hint}", hint = Clash::HINT)]
    Clash(#[from] Clash),
    /// A descriptor of another process.
    #[error("fd={0} is a descriptor that a VM is started with: name a tap, a switch or a socket")]
    Fd(u32),
    /// It would not be in the dump.
    #[error(
        "the network dump has the devices of the start only: start it without `net_dump=`, or with this device"
    )]
    Dump,
    /// The process at the other end cannot map guest memory.
    #[error("no vhost-user back end can map this VM's memory: start it with `mem=SIZE,backing=memfd`")]
    NotShared,
    /// The host has not got what it needs.
    #[error("{chain}{hint}", chain = error_chain(.0), hint = .0.hint().map(|hint| format!("; {hint}")).unwrap_or_default())]
    Device(#[from] virtio::Error),
    /// It cannot be wired up.
    #[error("{}", error_chain(.0))]
    Transport(#[from] virtio::transport::Error),
}
