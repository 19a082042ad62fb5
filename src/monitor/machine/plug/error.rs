//! [`PlugError`]: why a device cannot come or go.

use std::borrow::Cow;

use crate::config::Invalid;
use crate::machine::outputs::Clash;
use crate::virtio;

/// Why a device cannot come or go.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// It has virtio-mmio devices.
    #[error("devices come and go on a PCI bus only, and it has none")]
    NoPci,
    /// The vCPUs stand still.
    #[error("it is paused")]
    Paused,
    /// There is no machine, or the next one is being built.
    #[error("it has ended or is starting again")]
    Ended,
    /// The guest knows no more places.
    #[error("no place is free for another device")]
    Full,
    /// There is no such device.
    #[error("it has no device called {0:?}")]
    Unknown(String),
    /// It stays as long as the machine.
    #[error("{0} is there for good")]
    Fixed(String),
    /// The device's settings cannot be.
    #[error(transparent)]
    Config(#[from] Invalid),
    /// A run's output would be its image.
    #[error(transparent)]
    Clash(#[from] Clash),
    /// A descriptor of another process.
    #[error("fd={0} is a descriptor that a VM is started with")]
    Fd(u32),
    /// It would not be in the dump.
    #[error("the network dump has the devices of the start only")]
    Dump,
    /// The jail, which does not grow, has nothing for it.
    #[error("the sandbox of this VM has nothing for such a network")]
    Sandbox,
    /// The process at the other end cannot map guest memory.
    #[error("no vhost-user back end can map this VM's memory")]
    NotShared,
    /// The host has not got what it needs.
    #[error(transparent)]
    Device(#[from] virtio::Error),
    /// It cannot be wired up.
    #[error(transparent)]
    Transport(#[from] virtio::transport::Error),
}

impl PlugError {
    /// What to try.
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::NoPci => "start it with `transport=pci`".into(),
            Self::Paused => "resume it first: vmm resume NAME".into(),
            Self::Full => "remove a device; a guest that reboots finds room for more".into(),
            Self::Unknown(_) => "see what it has: vmm device list NAME".into(),
            Self::Fixed(_) => "disks and network devices can be removed".into(),
            Self::Config(invalid) => invalid.hint.as_str().into(),
            Self::Clash(_) => Clash::HINT.into(),
            Self::Fd(_) => "name a tap, a switch or a socket".into(),
            Self::Dump => "start it without `net_dump=`, or with this device".into(),
            Self::Sandbox => {
                "start it with a network of that kind, which can be removed, or without the sandbox".into()
            }
            Self::NotShared => "start it with `mem=SIZE,backing=memfd`".into(),
            Self::Device(error) => return error.hint().map(Cow::from),
            Self::Ended | Self::Transport(_) => return None,
        })
    }
}
