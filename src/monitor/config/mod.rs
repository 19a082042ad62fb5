//! [`VmConfig`]: the one tree that says what a virtual machine is.
//!
//! Command line, configuration file and (later) API and snapshot all fill this tree; the machine is built from
//! it and from nothing else. Field names are the command line's. A part that the command line writes as
//! `--mem 512M,prefault` may be written in JSON as that same string or as an object. Opens no file itself.

mod disk;
mod firmware;
pub mod host_path;
pub(crate) mod kernel;
mod net;
mod net_limits;
mod plug;
mod share;
mod text;
mod user_net;
mod vsock;
mod x86_64;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use disk::{Disk, ImageFormat, Overlay};
pub use firmware::Firmware;
pub use kernel::Kernel;
pub use net::{Mac, Net, NetTarget, dump as net_dump};
pub use net_limits::{Limit, NetLimits};
pub use plug::Plug;
pub use share::{Share, ShareCache, ShareFrom, ShareLocks, ShareOwners};
pub(crate) use text::items;
pub use text::{ParseError, Size, port_number};
pub use user_net::{Allow, Publish, Resolver, UserNet};
pub use vsock::Vsock;
pub use x86_64::cpu::Cpu;
pub use x86_64::{BootProtocol, cpu, cpu_features, msr};

/// A virtual machine, wholly described.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// Name under which the VM is listed; generated if absent.
    pub name: Option<String>,
    /// The kernel: bzImage or ELF vmlinux. Absent: what the disks have installed (see [`VmConfig::to_boot`]).
    #[serde(with = "host_path::optional")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[serde(with = "host_path::optional")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line. Absent: a default that fits the devices.
    pub cmdline: Option<String>,
    /// Boot protocol.
    pub boot: BootProtocol,
    /// What starts at the reset vector and boots the kernel. Absent: the monitor loads the kernel and enters it.
    pub firmware: Option<Firmware>,
    /// Option ROMs for the firmware to run.
    #[serde(with = "host_path::list")]
    pub option_rom: Vec<PathBuf>,
    /// Guest RAM.
    #[serde(deserialize_with = "text::memory")]
    pub mem: Memory,
    /// Virtual CPUs.
    pub cpus: Cpus,
    /// What they can do.
    pub cpu: Cpu,
    /// Disks: /dev/vda, vdb ... in this order.
    #[serde(deserialize_with = "text::list")]
    pub disk: Vec<Disk>,
    /// Network devices: eth0, eth1 ... in this order.
    #[serde(deserialize_with = "text::list")]
    pub net: Vec<Net>,
    /// Where their frames are written to, as pcapng. Full, it becomes PATH.1 and begins anew.
    #[serde(deserialize_with = "net::optional_dump")]
    pub net_dump: Option<OutputFile>,
    /// A socket device.
    #[serde(deserialize_with = "text::optional")]
    pub vsock: Option<Vsock>,
    /// Folders of the host's that the guest has, too.
    #[serde(deserialize_with = "text::list")]
    pub share: Vec<Share>,
    /// Where hvc0 goes.
    pub console: Console,
    /// Further ports of the virtio console: /dev/virtio-ports/NAME.
    #[serde(deserialize_with = "text::list")]
    pub port: Vec<Port>,
    /// Where ttyS0 goes.
    pub serial: CharTarget,
    /// An entropy device.
    #[serde(deserialize_with = "text::flag")]
    pub rng: bool,
    /// I/O port of an isa-debug-exit style device: a write of V ends the run with exit code (V << 1) | 1.
    #[serde(deserialize_with = "text::optional_port")]
    pub debug_exit: Option<u16>,
    /// An 8254 timer and two 8259s in the kernel, for guests that cannot do without (see [`VmConfig::has_pit`]).
    #[serde(deserialize_with = "text::flag")]
    pub pit: bool,
    /// A clock with memory (MC146818), for guests that wait for one. With firmware it is there anyway.
    #[serde(deserialize_with = "text::flag")]
    pub rtc: bool,
    /// The registers of a text screen, for guests that cannot do without; nobody draws it.
    #[serde(deserialize_with = "text::flag")]
    pub text_screen: bool,
    /// The device that kvm-unit-tests drives.
    #[serde(deserialize_with = "text::flag")]
    pub test_device: bool,
    /// Log the guest's writes to port 0x80 (POST codes) with their time.
    #[serde(deserialize_with = "text::flag")]
    pub boot_marks: bool,
    /// How the guest finds virtio devices, and how they interrupt it.
    pub transport: Transport,
    /// What a guest's reboot does.
    pub on_reboot: OnReboot,
    /// What a panic of the guest's kernel does. Absent: as `on_reboot`.
    pub on_panic: Option<OnPanic>,
}

impl VmConfig {
    /// Has its paths not depend on the working directory of whoever named them: for another process. Those that it cannot find out
    /// about stay as they are.
    pub fn make_absolute(&mut self) {
        let Self { kernel, initrd, option_rom, firmware, disk, net, net_dump, vsock, share, .. } = self;
        let firmware = firmware.iter_mut().filter_map(|firmware| match firmware {
            Firmware::File(path) => Some(path),
            Firmware::BuiltIn => None,
        });
        let net = net.iter_mut().filter_map(|net| match &mut net.to {
            NetTarget::Socket(path) | NetTarget::VhostUser(path) => Some(path),
            _ => None,
        });
        let inputs = kernel.iter_mut().chain(initrd).chain(option_rom).chain(firmware);
        let devices = disk.iter_mut().flat_map(Disk::paths).chain(net);
        let devices = devices.chain(vsock.iter_mut().filter_map(|vsock| vsock.path.as_mut()));
        let devices = devices.chain(share.iter_mut().map(|share| share.from.path_mut()));
        let ends = self.console.0.iter_mut().chain([&mut self.serial]);
        let ends = ends.chain(self.port.iter_mut().map(|port| &mut port.to)).filter_map(|end| match end {
            CharTarget::File(file) => Some(&mut file.path),
            CharTarget::Socket(path) => Some(path),
            CharTarget::Stdio | CharTarget::Pty | CharTarget::Off => None,
        });
        let outputs = net_dump.iter_mut().map(|file| &mut file.path);
        for path in inputs.chain(devices).chain(ends).chain(outputs) {
            if let Ok(absolute) = std::path::absolute(&*path) {
                *path = absolute;
            }
        }
    }
}

/// How a guest finds virtio devices, and how they interrupt it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Registers at addresses that the ACPI tables tell, and an interrupt line each.
    #[default]
    Mmio,
    /// Functions on a PCI bus, with message-signalled interrupts.
    Pci,
}

/// What a guest's reboot does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The monitor ends with success.
    #[default]
    Exit,
    /// The VM starts again from its kernel.
    Reset,
}

/// What a panic of the guest's kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPanic {
    /// The monitor ends, and says so.
    Exit,
    /// The VM starts again from its kernel.
    Reset,
    /// The VM is paused, as the panic left it.
    Pause,
}

/// Guest RAM: `SIZE[,backing=anonymous|memfd][,hugepages=2M|1G][,prefault][,thp]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// How much.
    pub size: Size,
    /// What is behind it. Absent: what the devices need ([`VmConfig::memory`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
    /// Page size of the backing; absent: the host's 4 KiB.
    pub hugepages: Option<HugePages>,
    /// Touch every page at start.
    #[serde(deserialize_with = "text::flag")]
    pub prefault: bool,
    /// Ask for transparent huge pages for all of it, and not only where the guest is known to use them whole.
    #[serde(deserialize_with = "text::flag")]
    pub thp: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self { size: Size::mib(256), backing: None, hugepages: None, prefault: false, thp: false }
    }
}

impl Memory {
    /// What is behind it.
    pub fn backing(&self) -> Backing {
        self.backing.unwrap_or_default()
    }

    /// The backing in words, for messages.
    pub fn backing_name(&self) -> String {
        let pages = match self.hugepages {
            None => "",
            Some(HugePages::TwoMiB) => ", 2 MiB huge pages",
            Some(HugePages::OneGiB) => ", 1 GiB huge pages",
        };
        format!("{}{pages}", if self.backing() == Backing::Memfd { "memfd" } else { "anonymous" })
    }
}

/// What is behind guest RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory: its pages cost the host least, and some of them may be huge.
    #[default]
    Anonymous,
    /// A memfd, which other processes can map too.
    Memfd,
}

/// Explicit huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    TwoMiB,
    /// 1 GiB.
    #[serde(rename = "1G")]
    OneGiB,
}

/// Virtual CPUs: their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Cpus(pub u32);

impl Cpus {
    /// The most that the tables and the APIC id layout place.
    pub const MAX: u32 = 254;
}

impl Default for Cpus {
    fn default() -> Self {
        Self(1)
    }
}

/// Where hvc0 goes. Absent: the monitor's own stdin and stdout, unless the serial port took them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Console(pub Option<CharTarget>);

/// A file that a run writes: `PATH[,max=SIZE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFile {
    /// Where.
    pub path: PathBuf,
    /// What it may grow to; absent: whatever the disk has. What happens then is up to who writes it.
    pub max: Option<Size>,
}

impl OutputFile {
    /// The smallest limit: a file's header, or a screenful, fits.
    pub const LEAST: Size = Size::from_bytes(4096);
}

/// The host's end of a character device: `stdio|pty|file=PATH[,max=SIZE]|socket=PATH|off`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CharTarget {
    /// The monitor's stdin and stdout.
    Stdio,
    /// A new pseudo-terminal, whose path is reported.
    Pty,
    /// A file that output is written to; there is no input.
    File(OutputFile),
    /// A listening unix socket; one client at a time.
    Socket(PathBuf),
    /// Nowhere: the device is not there.
    #[default]
    Off,
}

/// A named port of the virtio console: `NAME=WHERE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The guest's name for it: /dev/virtio-ports/NAME.
    pub name: String,
    /// The host's end.
    pub to: CharTarget,
}

/// A configuration that no machine can be built from. Settings in its texts are in backquotes, `` `mem=128M` ``: a front end may
/// write them as its own users do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what}")]
pub struct Invalid {
    pub(crate) what: String,
    /// What to try.
    pub hint: String,
}

impl Port {
    /// The most that a console has: each takes two queues, and Linux gives each queue memory at once.
    pub const MAX: usize = 30;
}

impl VmConfig {
    /// The RAM, with the rule that other processes can map it where one of them serves a device.
    pub fn memory(&self) -> Memory {
        let backing = self.mem.backing.or(self.is_shared().then_some(Backing::Memfd));
        Memory { backing, ..self.mem.clone() }
    }

    /// Whether another process has to map the RAM.
    pub fn is_shared(&self) -> bool {
        self.net.iter().any(|net| matches!(net.to, NetTarget::VhostUser(_)))
            || self.share.iter().any(|share| matches!(share.from, ShareFrom::VhostUser(_)))
    }

    /// The console's end, with the rule that it gives stdio up to a serial port that wants it.
    pub fn console(&self) -> CharTarget {
        match (&self.console.0, &self.serial) {
            (Some(wanted), _) => wanted.clone(),
            (None, CharTarget::Stdio) => CharTarget::Off,
            (None, _) => CharTarget::Stdio,
        }
    }

    /// What a panic of the guest's kernel does.
    pub fn on_panic(&self) -> OnPanic {
        self.on_panic.unwrap_or(match self.on_reboot {
            OnReboot::Exit => OnPanic::Exit,
            OnReboot::Reset => OnPanic::Reset,
        })
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`Invalid`] names the first value that cannot be, and what to try.
    pub fn validate(&self) -> Result<(), Invalid> {
        fn invalid(what: impl Into<String>, hint: impl Into<String>) -> Result<(), Invalid> {
            Err(Invalid { what: what.into(), hint: hint.into() })
        }
        const GUESS: u64 = 1 << 20;
        let (size, mem) = (self.mem.size, self.mem.size.bytes());
        if mem < 2 << 20 {
            let hint = match mem {
                1..GUESS => format!("that is {mem} bytes; for {mem} MiB write `mem={mem}M`"),
                _ => "try `mem=128M`".to_owned(),
            };
            return invalid(format!("`mem={size}`: too little memory for any guest"), hint);
        }
        if !mem.is_multiple_of(4096) {
            let hint = format!("round it up: `mem={}`", Size::from_bytes(mem.next_multiple_of(4096)));
            return invalid(format!("`mem={mem}`: not a multiple of 4096 bytes"), hint);
        }
        if mem > crate::memory::layout::MAX_RAM {
            let most = Size::from_bytes(crate::memory::layout::MAX_RAM);
            return invalid(
                format!("`mem={size}`: more than KVM maps into a guest in one piece"),
                format!("at most `mem={most}`; the host's own memory (free -h) is the limit that matters"),
            );
        }
        if let Some(page) = self.mem.hugepages {
            let page = if page == HugePages::TwoMiB { Size::mib(2) } else { Size::mib(1024) };
            if !mem.is_multiple_of(page.bytes()) {
                let up = Size::from_bytes(mem.next_multiple_of(page.bytes()));
                return invalid(
                    format!("`mem={size}`: not a multiple of the huge page size, {page}"),
                    format!("round it up: `mem={up},hugepages={page}`"),
                );
            }
        }
        if self.is_shared() && self.mem.backing == Some(Backing::Anonymous) {
            return invalid(
                format!("`mem={size},backing=anonymous`: no vhost-user back end can map such memory"),
                format!("drop backing=anonymous: `mem={size}`"),
            );
        }
        if !(1..=Cpus::MAX).contains(&self.cpus.0) {
            return invalid(format!("`cpus={}`: out of range", self.cpus.0), "give 1 to 254 CPUs: `cpus=2`");
        }
        self.name.as_deref().map_or(Ok(()), check_name)?;
        self.disk.iter().try_for_each(Disk::validate)?;
        net::validate(&self.net)?;
        if self.net_dump.is_some()
            && let Some(net) = self.net.iter().find(|net| net.is_served_elsewhere())
        {
            let (what, hint) = if net.vhost {
                (
                    "with vhost=on the host's kernel moves the frames, and a network dump sees none",
                    "drop vhost=on, or look at the tap itself: sudo tcpdump -i tap0",
                )
            } else {
                (
                    "with vhost-user= another process moves the frames, and a network dump sees none",
                    "have the back end write one",
                )
            };
            return invalid(what, hint);
        }
        net::validate_dump(&self.net, self.net_dump.as_ref())?;
        self.vsock.as_ref().map_or(Ok(()), Vsock::validate)?;
        Share::validate(&self.share)?;
        if self.firmware.is_none() && !self.option_rom.is_empty() {
            return invalid("option ROMs need firmware that runs them", "add `firmware=FILE`");
        }
        if self.port.len() > Port::MAX {
            return invalid(
                format!("{} console ports: too many", self.port.len()),
                format!("a virtio console has {} ports at most", Port::MAX),
            );
        }
        for (i, port) in self.port.iter().enumerate() {
            if port.name.is_empty() || port.name.len() > 64 || port.name.contains(['/', '\0']) {
                return invalid(
                    format!("{:?} cannot be the name of a console port", port.name),
                    "use 1 to 64 bytes without '/': `port=log=file=PATH`",
                );
            }
            if self.port[..i].iter().any(|p| p.name == port.name) {
                return invalid(
                    format!("two console ports are named {:?}", port.name),
                    "give each its own name",
                );
            }
        }
        let listed = !self.disk.is_empty() || !self.net.is_empty() || !self.port.is_empty();
        let listed = listed || !self.share.is_empty();
        let virtio = self.console() != CharTarget::Off || self.rng || self.vsock.is_some() || listed;
        if self.test_device && virtio {
            return invalid(
                "the test device's memory lies where virtio devices would be, so a machine cannot have both",
                "use `console=off` or `serial=stdio`, and no disk, network, socket, shared folder, port or entropy device",
            );
        }
        let ends = [self.console(), self.serial.clone()];
        let ends = ends.iter().chain(self.port.iter().map(|p| &p.to));
        if ends.filter(|w| **w == CharTarget::Stdio).count() > 1 {
            return invalid(
                "stdio can serve only one device, and two ask for it",
                "give one of them another place: pty, file=PATH, socket=PATH or off",
            );
        }
        Ok(())
    }
}

/// Whether `name` can be that of a virtual machine.
///
/// # Errors
/// Why not, and what can.
pub fn check_name(name: &str) -> Result<(), Invalid> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(fine) || name.starts_with(['.', '-']) {
        let what = format!("{name:?} cannot be the name of a virtual machine");
        let hint =
            "use 1 to 64 letters, digits, '_', '.' and '-', with a letter, digit or '_' first: `name=web-1`";
        return Err(Invalid { what, hint: hint.to_owned() });
    }
    Ok(())
}
