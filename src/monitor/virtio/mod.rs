//! virtio: devices, their queues, the core that drives them, and transports.
//!
//! [`Device`] lists what there is. To add a device: its file, and an arm of that list, which names what of
//! the configuration it is for. Nothing else knows one device from another.

pub mod block;
pub mod console;
pub mod core;
pub mod device;
pub mod doorbells;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod testing;
pub mod transport;
pub mod vsock;

use std::sync::Arc;

use crate::backends::{Added, Backends, Pluggable};
use crate::bus::lock;
use crate::chardev;
use crate::config::{self, CharTarget, Mac, Plug, VmConfig};
use crate::disk;
use crate::net::{self as links, traffic::Network};
use crate::recorder::Recorder;
use crate::share;
use crate::vsock as sockets;
use device::VirtioDevice;

/// A device that a configuration asks for.
#[derive(Debug, Clone, Copy)]
pub enum Device<'a> {
    /// A disk, the `usize`th.
    Block(usize, &'a config::Disk),
    /// The entropy device.
    Rng,
    /// A network device, the `usize`th, of the machine of that name.
    Net(usize, &'a config::Net, Option<&'a str>),
    /// A socket device.
    Vsock(&'a config::Vsock),
    /// A shared folder, the `usize`th of so many.
    Fs(usize, usize, &'a config::Share),
    /// The console: where hvc0 goes, and the named ports.
    Console(&'a VmConfig),
}

/// Why a device could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its disk image.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Its links.
    #[error(transparent)]
    Net(#[from] links::Error),
    /// Its sockets.
    #[error(transparent)]
    Vsock(#[from] sockets::Error),
    /// Its folder.
    #[error(transparent)]
    Share(#[from] share::Error),
    /// A host end of its.
    #[error(transparent)]
    Chardev(#[from] chardev::Error),
    /// A timer of its.
    #[error("cannot make a timer for a device")]
    Timer(#[source] std::io::Error),
}

impl Error {
    /// What to try.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Disk(error) => error.hint(),
            Self::Net(error) => Some(error.hint()),
            Self::Vsock(error) => Some(error.hint()),
            Self::Share(error) => Some(error.hint()),
            Self::Chardev(error) => error.hint().map(|hint| hint.into_owned()),
            Self::Timer(_) => None,
        }
    }

    /// Whether the caller's request was wrong (and not the host lacking something).
    pub fn is_bad_argument(&self) -> bool {
        match self {
            Self::Disk(_) => true,
            Self::Share(error) => error.is_bad_argument(),
            Self::Net(error) => error.is_bad_argument(),
            Self::Vsock(error) => error.is_bad_argument(),
            Self::Chardev(error) => error.is_bad_argument(),
            Self::Timer(_) => false,
        }
    }
}

impl<'a> Device<'a> {
    /// All that `config` asks for, in the order in which the guest finds them.
    pub fn list(config: &'a VmConfig) -> Vec<Self> {
        let mut list: Vec<_> = config.disk.iter().enumerate().map(|(i, disk)| Self::Block(i, disk)).collect();
        if config.rng {
            list.push(Self::Rng);
        }
        list.extend(config.net.iter().enumerate().map(|(i, net)| Self::Net(i, net, config.name.as_deref())));
        list.extend(config.vsock.iter().map(Self::Vsock));
        let shares = config.share.iter().enumerate();
        list.extend(shares.map(|(index, share)| Self::Fs(index, config.share.len(), share)));
        // Last, because opening a host end may change it (a file is truncated), and disks may still be refused.
        if config.console() != CharTarget::Off || !config.port.is_empty() {
            list.push(Self::Console(config));
        }
        list
    }

    /// A device that was added to the machine that is called `machine`.
    pub fn added(added: &'a Added, machine: Option<&'a str>) -> Self {
        match &added.plug {
            Plug::Disk(disk) => Self::Block(added.index, disk),
            Plug::Net(net) => Self::Net(added.index, net, machine),
        }
    }

    /// Opens what a device that [was added](Self::added) to that machine needs of the host, and builds it.
    ///
    /// # Errors
    /// As for [`Device::build`].
    pub fn build_added(
        added: &Added,
        machine: Option<&str>,
        host: &mut Pluggable,
        recorder: &Arc<Recorder>,
    ) -> Result<Box<dyn VirtioDevice>, Error> {
        match &added.plug {
            Plug::Disk(disk) => disk_device(&mut host.images, added.index, disk),
            Plug::Net(net) => net_device(&mut host.ports, added.index, net, machine, recorder),
        }
    }

    /// What it is, if it is of a kind that may come and go.
    pub fn plug(&self) -> Option<Plug> {
        match *self {
            Self::Block(_, disk) => Some(Plug::Disk(disk.clone())),
            Self::Net(_, net, _) => Some(Plug::Net(net.clone())),
            Self::Rng | Self::Vsock(_) | Self::Fs(..) | Self::Console(_) => None,
        }
    }

    /// A name of its own in the machine, and its worker thread's (at most 15 bytes).
    pub fn name(&self) -> String {
        match self {
            Self::Block(index, _) => format!("virtio-blk{index}"),
            Self::Rng => "virtio-rng".to_owned(),
            Self::Net(index, ..) => format!("virtio-net{index}"),
            Self::Vsock(_) => "virtio-vsock".to_owned(),
            Self::Fs(index, ..) => format!("virtio-fs{index}"),
            Self::Console(_) => "virtio-console".to_owned(),
        }
    }

    /// What those who look may know of it, if it is a network device.
    ///
    /// # Errors
    /// [`Error`]: it is not built, and the host has not got what the configuration names.
    pub fn network(&self, ports: &mut links::Ports) -> Result<Option<Network>, Error> {
        let Self::Net(index, config, name) = self else { return Ok(None) };
        let links::Port { mac, traffic, .. } = ports.get(*index, config, *name)?;
        Ok(Some(Network { device: self.name(), to: config.to.clone(), mac: Mac(mac), traffic }))
    }

    /// Opens what it needs of the host, and builds it; what must outlive it there is in `backends`. What the core does not see of
    /// its work it tells `recorder`.
    ///
    /// # Errors
    /// [`Error`]: the host has not got what the configuration names.
    pub fn build(
        &self,
        backends: &mut Backends,
        recorder: &Arc<Recorder>,
    ) -> Result<Box<dyn VirtioDevice>, Error> {
        let Backends { ends, pluggable, doors, folders } = backends;
        Ok(match self {
            Self::Block(index, disk) => disk_device(&mut lock(pluggable).images, *index, disk)?,
            Self::Rng => Box::new(rng::Rng),
            Self::Net(index, net, name) => {
                net_device(&mut lock(pluggable).ports, *index, net, *name, recorder)?
            }
            Self::Vsock(config) if config.vhost => {
                Box::new(vsock::Served::new(doors.kernel(config)?, config.cid()))
            }
            Self::Vsock(config) => Box::new(vsock::Vsock::new(doors.get(config)?, config.cid())),
            Self::Fs(index, count, share) => match &share.from {
                config::ShareFrom::Path(_) => {
                    let server = folders.server(*index, *count, share)?;
                    Box::new(fs::Fs::new(server, &share.tag(*index)).map_err(Error::Timer)?)
                }
                config::ShareFrom::VhostUser(path) => {
                    Box::new(fs::Served::new(folders.back_end(path, *index)?, &share.tag(*index)))
                }
            },
            Self::Console(config) => {
                let main = ends.get("console", &config.console())?;
                let mut named = Vec::new();
                for port in &config.port {
                    named.push((port.name.clone(), ends.get(&format!("port {}", port.name), &port.to)?));
                }
                Box::new(console::Console::new(main, named).map_err(Error::Timer)?)
            }
        })
    }
}

fn disk_device(
    images: &mut disk::Images,
    index: usize,
    config: &config::Disk,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let id = config.serial.clone().unwrap_or_else(|| format!("disk{index}"));
    Ok(Box::new(block::Block::new(Box::new(images.disk(index, config)?), &id)))
}

fn net_device(
    ports: &mut links::Ports,
    index: usize,
    config: &config::Net,
    machine: Option<&str>,
    recorder: &Arc<Recorder>,
) -> Result<Box<dyn VirtioDevice>, Error> {
    let device = net::Net::new(ports.get(index, config, machine)?, config.mtu());
    let device = device.limited(&config.limits).map_err(links::Error::Host)?;
    Ok(Box::new(device.recorded(recorder.clone())))
}
