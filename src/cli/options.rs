//! The options of `vmm run`, and how they and a configuration file become one [`VmConfig`].

// The doc comments are the text of --help, where brackets mark what may be left out.
#![allow(rustdoc::broken_intra_doc_links)]

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args};
use rustix::fs::OFlags;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;

use super::agent::renewal::CopyOptions;
use super::limits;
use vmm_command::{Code, Failure};
use vmm_monitor::boot;
use vmm_monitor::config::{
    BootProtocol, CharTarget, Console, Cpu, Cpus, Disk, Firmware, Memory, Net, NetTarget, OnPanic, OnReboot,
    OutputFile, Port, Publish, Share, Transport, UserNet, VmConfig, Vsock, net_dump, port_number,
};
use vmm_monitor::machine::outputs;
use vmm_monitor::planted;
use vmm_monitor::pool::Spare;
use vmm_monitor::sandbox;
use vmm_monitor::snapshot::Snapshot;
use vmm_trace::debug::gdb::Place;

/// The largest configuration file that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// All options of `vmm run`. Those absent leave the configuration file's value, or the default.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Kernel: a bzImage or an ELF vmlinux [default: the one installed on a disk]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line [default: one that fits the devices]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Guest memory: SIZE[,prefault][,thp][,hugepages=2M|1G][,backing=anonymous|memfd]; SIZE takes K, M, G or T [default: 256M]
    #[arg(long, value_name = "SIZE")]
    mem: Option<Memory>,
    /// Number of CPUs, up to 254 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// CPU model: host, x86-64-v1, x86-64-v2 or x86-64-v3, then any of ,+FEATURE ,-FEATURE (as in /proc/cpuinfo), ,+hyperv (for
    /// Windows), ,nested=on (VT-x or AMD-V), ,msr-deny=MSR[-MSR] (raises #GP), ,vendor=intel|amd [default: host]
    #[arg(long, value_name = "MODEL", allow_hyphen_values = true)]
    cpu: Option<Cpu>,
    /// Disk: path=FILE[,readonly][,overlay[=FILE]][,lower=FILE][,format=raw][,serial=TEXT][,block-size=512|4096], where a comma in
    /// FILE is written twice; repeat it for /dev/vdb and so on. With overlay the image stays as it is: what is written is thrown
    /// away at the end, or kept in FILE; a snapshot's overlay can be its lower one. Without --kernel, boots the system installed on it
    #[arg(long, value_name = "path=FILE", value_parser = os_text::<Disk, _>())]
    disk: Vec<Disk>,
    /// Network device: user (needs nothing: DHCP, names, TCP, UDP, ping; then any of ,ipv6=off ,restrict=on ,dns=ADDR
    /// ,allow=ADDR[/BITS][:PORT] ,publish=HOST:GUEST), switch=NAME (one segment with your other VMs that name it; ,dhcp=off), tap=NAME (yours,
    /// or made if that is allowed), macvtap=NAME (yours), fd=N (a tap or unix socket that was passed), socket=PATH (QEMU's stream:
    /// passt, gvproxy, another VM) or vhost-user=PATH (a process that serves the guest's queues itself), then any of ,mac=XX:XX:XX:XX:XX:XX ,mtu=N ,queues=N (of a tap or a vhost-user back end) ,vhost=on (a tap
    /// that the host's kernel serves) ,bw=RATE[/BURST] (bytes a second, each way) ,pps=RATE[/BURST] (frames); repeatable
    #[arg(long, value_name = "user|tap=NAME", value_parser = os_text::<Net, _>())]
    net: Vec<Net>,
    /// Publish ports of the user network's guest: [ADDR:]HOST:GUEST[/udp], ranges as 8000-8009:80-89; ADDR is the host's [default:
    /// 127.0.0.1; 0.0.0.0 for all]. Without --net it stands for --net user as well; repeatable
    #[arg(short, long, value_name = "HOST:GUEST")]
    publish: Vec<Publish>,
    /// Write every frame of the network devices to a file for Wireshark (pcapng): FILE[,max=SIZE]; at that size it becomes FILE.1
    /// and starts afresh
    #[arg(long, value_name = "FILE", value_parser = OsStringValueParser::new().try_map(|text| net_dump(&text)))]
    net_dump: Option<OutputFile>,
    /// Socket device (vsock): the host's programs reach the guest on unix socket PATH, by CONNECT PORT, and the guest those that
    /// listen on PATH_PORT; then ,cid=N for the guest's address, from 3 on [default: beside the control socket, as vmm status
    /// tells; cid=3]. vhost=on,cid=N: by AF_VSOCK, of the host's kernel, in place of PATH
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "cid=3", value_parser = os_text::<Vsock, _>())]
    vsock: Option<Vsock>,
    /// Share a folder or a file: PATH[:TO][:ro], where TO is what init or agent mount it at in the guest; others do by mount -t virtiofs share0
    /// TO (share1 for the second). Then any of ,uid=N ,gid=N (the guest's user whom your files belong to) [default: root], ,tag=NAME (for
    /// share0), ,cache=auto|always|never (changes on the host are seen within a second, never, at once) [default: auto], ,owners=xattr (chown, set-user-ID bits and device nodes
    /// of the guest's are kept in an extended attribute), ,locks=shared (the host and other guests see locks). Or vhost-user=SOCKET,to=TO: one that virtiofsd serves; repeatable
    #[arg(long, value_name = "PATH:TO", value_parser = os_text::<Share, _>())]
    share: Vec<Share>,
    /// Where the console hvc0 goes: stdio, pty, file=PATH[,max=SIZE], socket=PATH or off; a comma in PATH is written twice
    /// [default: stdio, unless --serial has it]
    #[arg(long, value_name = "WHERE", value_parser = os_text::<Console, _>())]
    console: Option<Console>,
    /// Named console port, /dev/virtio-ports/NAME in the guest; WHERE is as for --console; repeatable
    #[arg(long, value_name = "NAME=WHERE", value_parser = os_text::<Port, _>())]
    port: Vec<Port>,
    /// Where the serial port ttyS0 goes, as for --console; stdio is then taken from the console [default: stdio for a bzImage
    /// and for what a disk boots, or as the command line's console= says; off for a vmlinux]
    #[arg(long, value_name = "WHERE", value_parser = os_text::<CharTarget, _>())]
    serial: Option<CharTarget>,
    /// Add an entropy device
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    rng: Option<bool>,
    /// Name for vmm list, vmm stop and so on [default: generated]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Read the configuration from a JSON file; options on the command line override it, lists as a whole
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Boot protocol: auto, linux64, pvh or multiboot [default: auto, which is PVH if the kernel offers it]
    #[arg(long, value_name = "PROTOCOL", value_parser = keyword::<BootProtocol>)]
    boot: Option<BootProtocol>,
    /// Start at the reset vector, in firmware that boots the kernel [without FILE: the built-in firmware]
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = Firmware::BUILT_IN, value_parser = os_text::<Firmware, _>())]
    firmware: Option<Firmware>,
    /// Option ROM for the firmware to run (SeaBIOS needs QEMU's linuxboot_dma.bin to boot a kernel); repeatable
    #[arg(long, value_name = "FILE")]
    option_rom: Vec<PathBuf>,
    /// How the guest finds virtio devices: mmio or pci, with message-signalled interrupts [default: mmio]
    #[arg(long, value_name = "mmio|pci", value_parser = keyword::<Transport>)]
    transport: Option<Transport>,
    /// What to do when the guest reboots: exit or reset [default: exit]
    #[arg(long, value_name = "WHAT", value_parser = keyword::<OnReboot>)]
    on_reboot: Option<OnReboot>,
    /// What a panic of the guest's kernel does: exit, reset or pause [default: as --on-reboot]
    #[arg(long, value_name = "WHAT", value_parser = keyword::<OnPanic>)]
    on_panic: Option<OnPanic>,
    /// Add an I/O port that ends the run: writing V to it makes the exit code 2V+1 [without PORT: 0xf4]
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true, default_missing_value = "0xf4", value_parser = port_number)]
    debug_exit: Option<u16>,
    /// Add an 8254 timer (PIT) and two 8259s (PICs), for kernels older than about 2010; Linux gets one with acpi=off, noapic, nolapic or no-kvmclock
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    pit: Option<bool>,
    /// Add a clock (RTC) at ports 0x70 and 0x71; --firmware implies it
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    rtc: Option<bool>,
    /// Add the registers of a text screen, for kernels that insist on one; nothing is displayed
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    text_screen: Option<bool>,
    /// Add the device that kvm-unit-tests drives (QEMU's pc-testdev)
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    test_device: Option<bool>,
    /// Log the guest's writes to port 0x80, with their time
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_parser = switch)]
    boot_marks: Option<bool>,
    /// Record every exit to a file, for vmm trace report: FILE[,max=SIZE]; at that size the record ends, and the guest runs on
    #[arg(long, value_name = "FILE", value_parser = output_file())]
    pub trace: Option<OutputFile>,
    /// Record the registers at every exit, not just at the first from each place
    #[arg(long)]
    pub trace_registers: bool,
    /// Wait for gdb before the first instruction, on unix:PATH (for you alone) or tcp:[HOST:]PORT (for every user of this
    /// machine; with ,public for other machines, too)
    #[arg(long, value_name = "WHERE", value_parser = os_text::<Place, _>())]
    pub gdb: Option<Place>,
    /// Further files that will be written.
    #[arg(skip)]
    pub outputs: Vec<PathBuf>,
    /// A further file that will be read.
    #[arg(skip)]
    pub symbols: Option<PathBuf>,
    /// The snapshot that it goes on from.
    #[arg(skip)]
    pub snapshot: Option<Snapshot>,
    /// The pool that it stands ready for.
    #[arg(skip)]
    pub spare: Option<Spare>,
    /// What the agent of a guest that goes on is to do.
    #[arg(skip)]
    pub renewal: Option<CopyOptions>,
    /// Seconds that the guest has to power off after SIGTERM, SIGINT or vmm stop, before it is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub stop_timeout: u64,
    /// Leave the monitor open to debuggers, perf and core dumps of this user (a core never has the guest's memory)
    #[arg(long)]
    pub dumpable: bool,
    /// Confine the monitor before the guest runs: auto uses everything that this host offers, strict refuses to run with less, off does
    /// not confine it (docs/sandbox.md)
    #[arg(long, value_name = "auto|strict|off", default_value = "auto")]
    pub sandbox: sandbox::Mode,
    /// Started by root, the user that the sandbox runs as [default: one whose number nobody else has]. What the run makes anew, such as
    /// an output with max=, is made by that user
    #[arg(long, value_name = "UID[:GID]")]
    pub sandbox_user: Option<sandbox::User>,
    /// Report system calls that the sandbox refuses and fail them with EPERM, instead of ending the machine
    #[arg(long)]
    pub sandbox_log: bool,
    #[command(flatten)]
    pub limits: limits::Options,
    /// Run in the background: print the name as soon as the guest runs. What it writes to its console is kept for vmm logs (the last
    /// 1 MiB, and up to as much before), its exit code for vmm wait, until vmm rm or a new one of this name
    #[arg(short, long, conflicts_with_all = ["dry_run", "gdb"])]
    pub detach: bool,
    /// With -d: keep nothing when it has ended
    #[arg(long, requires = "detach")]
    pub rm: bool,
    /// This is the process in the background.
    #[arg(long, hide = true)]
    pub detached: bool,
    /// Print the resolved configuration and the guest's memory map as JSON, without running anything
    #[arg(long)]
    pub dry_run: bool,
    /// Log more: -v events, -vv details (RUST_LOG chooses by module, in env_logger's syntax)
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

impl Options {
    /// The virtual machine that is asked for, checked as far as that goes without opening what it names, but
    /// for a look at what kind of kernel it is.
    ///
    /// # Errors
    /// The configuration file cannot be read, or no machine can be as described.
    pub fn resolve(self) -> Result<VmConfig, Failure> {
        let (config, serial) = match &self.config {
            Some(path) => read(path).map_err(|error| {
                let hint =
                    "its keys are the names of the options: {\"kernel\": \"vmlinux\", \"mem\": \"512M\"}";
                Failure::new(Code::BadArgument, error).hint(Some(hint))
            })?,
            None => (VmConfig::default(), false),
        };
        self.complete(config, serial)
    }

    /// The same for a machine that goes on from one that had `saved`.
    ///
    /// # Errors
    /// No machine can be as described, or it would have to start anew.
    pub fn resolve_saved(self, saved: &VmConfig) -> Result<VmConfig, Failure> {
        self.check_goes_on()?;
        // The name is that of the machine that was saved, which may run still.
        self.complete(VmConfig { name: None, ..saved.clone() }, true)
    }

    fn complete(mut self, mut config: VmConfig, has_serial: bool) -> Result<VmConfig, Failure> {
        let decided = has_serial || self.serial.is_some();
        let (file, trace) = (self.config.take(), self.trace.take());
        let (reports, symbols) = (std::mem::take(&mut self.outputs), self.symbols.take());
        self.apply(&mut config)?;
        config.validate()?;
        config.to_boot()?;
        if !decided {
            boot::console::settle(&mut config);
        }
        let inputs = file.iter().map(|path| ("configuration", path.as_path()));
        let inputs: Vec<_> = inputs.chain(symbols.iter().map(|path| ("symbols", path.as_path()))).collect();
        let outputs = trace.iter().map(|file| ("the trace", file.path.as_path()));
        let outputs: Vec<_> =
            outputs.chain(reports.iter().map(|path| ("the report", path.as_path()))).collect();
        outputs::check(&config, &inputs, &outputs)
            .map_err(|clash| Failure::new(Code::BadArgument, clash).hint(Some(outputs::Clash::HINT)))?;
        Ok(config)
    }

    /// What is given of that which one machine at a time can have.
    pub fn of_one(&self) -> Option<&'static str> {
        let given = [
            ("--publish", !self.publish.is_empty()),
            ("--net-dump", self.net_dump.is_some()),
            ("--trace", self.trace.is_some()),
            ("--gdb", self.gdb.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }

    /// Whether it asks for networks.
    pub fn has_networks(&self) -> bool {
        !self.net.is_empty()
    }

    /// That nothing is asked for which a machine has had its use of before it was saved.
    fn check_goes_on(&self) -> Result<(), Failure> {
        let given = [
            ("--config", self.config.is_some()),
            ("--kernel", self.kernel.is_some()),
            ("--initrd", self.initrd.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--boot", self.boot.is_some()),
            ("--firmware", self.firmware.is_some()),
            ("--option-rom", !self.option_rom.is_empty()),
            ("--cpu", self.cpu.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((option, _)) => {
                let error =
                    anyhow!("{option} is for a start, and this machine goes on from where it was saved");
                Err(Failure::new(Code::BadArgument, error).hint(Some(format!("leave {option} out"))))
            }
        }
    }

    fn apply(self, config: &mut VmConfig) -> Result<(), Failure> {
        fn set<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        let some = |list: bool| list.then_some(());
        config.name = self.name.or(config.name.take());
        config.kernel = self.kernel.or(config.kernel.take());
        config.initrd = self.initrd.or(config.initrd.take());
        config.cmdline = self.cmdline.or(config.cmdline.take());
        config.debug_exit = self.debug_exit.or(config.debug_exit);
        config.firmware = self.firmware.or(config.firmware.take());
        set(&mut config.option_rom, some(!self.option_rom.is_empty()).map(|()| self.option_rom));
        set(&mut config.boot, self.boot);
        set(&mut config.mem, self.mem);
        set(&mut config.cpus, self.cpus);
        set(&mut config.cpu, self.cpu);
        set(&mut config.disk, some(!self.disk.is_empty()).map(|()| self.disk));
        set(&mut config.net, some(!self.net.is_empty()).map(|()| self.net));
        config.net_dump = self.net_dump.or(config.net_dump.take());
        config.vsock = self.vsock.or(config.vsock.take());
        set(&mut config.share, some(!self.share.is_empty()).map(|()| self.share));
        set(&mut config.console, self.console);
        set(&mut config.port, some(!self.port.is_empty()).map(|()| self.port));
        set(&mut config.serial, self.serial);
        set(&mut config.rng, self.rng);
        set(&mut config.pit, self.pit);
        set(&mut config.rtc, self.rtc);
        set(&mut config.text_screen, self.text_screen);
        set(&mut config.test_device, self.test_device);
        set(&mut config.boot_marks, self.boot_marks);
        set(&mut config.transport, self.transport);
        set(&mut config.on_reboot, self.on_reboot);
        config.on_panic = self.on_panic.or(config.on_panic);
        publish(self.publish, &mut config.net)
    }
}

/// Adds published ports to the user network among `list`, which is made if there is no network at all.
fn publish(ports: Vec<Publish>, list: &mut Vec<Net>) -> Result<(), Failure> {
    if ports.is_empty() {
        return Ok(());
    }
    if list.is_empty() {
        list.push(Net::user(UserNet::default()));
    }
    let network = list.iter_mut().find_map(|net| match &mut net.to {
        NetTarget::User(network) => Some(network),
        _ => None,
    });
    let Some(network) = network else {
        let error = anyhow!("ports can be published of a user network alone, and this machine has none");
        return Err(Failure::new(Code::BadArgument, error).hint(Some("add --net user")));
    };
    network.publish.extend(ports);
    Ok(())
}

/// The configuration, and whether it says anything of the serial port.
fn read(path: &Path) -> anyhow::Result<(VmConfig, bool)> {
    let context = || format!("cannot read configuration file {}", path.display());
    let mut text = Vec::new();
    planted::open(path, OFlags::RDONLY)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut text))
        .with_context(context)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(anyhow!("larger than {MAX_CONFIG} bytes")).with_context(context);
    }
    let config = serde_json::from_slice(&text).with_context(context)?;
    let keys: serde_json::Value = serde_json::from_slice(&text).with_context(context)?;
    Ok((config, keys.get("serial").is_some()))
}

/// A keyword, parsed by its serde implementation.
fn keyword<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, ValueError> {
    T::deserialize(text.into_deserializer())
}

/// Of any name, also of one that is no text.
pub fn output_file() -> impl TypedValueParser<Value = OutputFile> {
    os_text::<OutputFile, _>()
}

fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off"),
    }
}

/// A text that has a path in it, which need not be UTF-8.
pub fn os_text<T, E>() -> impl TypedValueParser<Value = T>
where
    T: for<'a> TryFrom<&'a OsStr, Error = E> + Clone + Send + Sync + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    OsStringValueParser::new().try_map(|text| T::try_from(&text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        options: Options,
    }

    fn resolve(arguments: &str) -> VmConfig {
        let arguments = ["vmm"].into_iter().chain(arguments.split_whitespace());
        Only::try_parse_from(arguments).unwrap().options.resolve().unwrap()
    }

    #[test]
    fn options_fill_the_same_tree_as_a_file_and_win_over_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let json = r#"{"kernel": "k", "mem": "1G,thp", "cpus": 2, "disk": ["a", "b,readonly"], "rng": true,
            "on_reboot": "reset", "boot": "pvh", "port": ["p=off"], "debug_exit": 244,
            "firmware": "built-in", "option_rom": ["o"]}"#;
        std::fs::write(file.path(), json).unwrap();
        let from_file = format!("--config {}", file.path().display());
        let options = "--kernel k --mem 1G,thp --cpus 2 --disk a --disk b,readonly --rng --on-reboot reset \
            --boot pvh --port p=off --option-rom o --debug-exit --firmware";
        assert_eq!(resolve(&from_file), resolve(options));
        let both = resolve(&format!("{from_file} --mem 2G --disk c --rng=off --boot auto --cmdline -x"));
        assert_eq!((both.mem.size.bytes(), both.mem.thp), (2 << 30, false));
        assert_eq!(both.disk.len(), 1);
        assert_eq!((both.rng, both.boot, both.cpus.0), (false, BootProtocol::Auto, 2));
        assert_eq!(both.cmdline.as_deref(), Some("-x"));
    }

    #[test]
    fn every_key_of_a_file_has_its_option() {
        // What a file can say and the command line cannot would be a configuration that only one of them reaches.
        let tree = serde_json::to_value(VmConfig::default()).unwrap();
        let command = <Only as clap::CommandFactory>::command();
        for key in tree.as_object().unwrap().keys() {
            let option = key.replace('_', "-");
            assert!(command.get_arguments().any(|a| a.get_long() == Some(&option)), "--{option}");
        }
    }
}
