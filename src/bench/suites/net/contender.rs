//! Who does the traffic: this program in a network namespace, or as PID 1 of a monitor's guest.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

use super::network::{Kind, Network};
use super::peer::Peer;
use crate::measure::{Contender, INTERRUPTED};
use crate::rivals::command::{shown, version};
use crate::rivals::{Place, Setting};
use crate::work::net::Traffic;

/// Memory of each guest.
const MIB: u64 = 256;
/// All of one sample.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the process may take to end when the traffic is over. Not all guests can end their machine.
const END: Duration = Duration::from_secs(5);

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// None: a process in a namespace.
    Process,
    /// This one.
    Vmm,
    /// QEMU's microvm.
    Qemu,
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

impl Monitor {
    fn program(self) -> &'static str {
        match self {
            Self::Process => "ip",
            Self::Vmm => "vmm",
            Self::Qemu => "qemu-system-x86_64",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }
}

/// One that takes part.
pub struct Networked<'a> {
    name: &'static str,
    monitor: Monitor,
    program: PathBuf,
    kind: Kind,
    /// The host's kernel serves the queues.
    vhost: bool,
    network: Network,
    setting: &'a Setting,
}

impl<'a> Networked<'a> {
    /// The `number`th.
    ///
    /// # Errors
    /// What it lacks here.
    pub fn new(
        (name, monitor, kind, vhost): (&'static str, Monitor, Kind, bool),
        number: u8,
        setting: &'a Setting,
    ) -> Result<Self, String> {
        let program = match monitor {
            Monitor::Vmm => setting.vmm.clone(),
            other => setting.find(other.program())?,
        };
        if monitor != Monitor::Process {
            setting.tuned_kernel()?;
        }
        if kind == Kind::Passt {
            setting.find("passt")?;
        }
        if vhost && !Path::new("/dev/vhost-net").exists() {
            return Err("this host has no /dev/vhost-net (modprobe vhost_net)".to_owned());
        }
        let network = Network::make(kind, number, setting)?;
        Ok(Self { name, monitor, program, kind, vhost, network, setting })
    }

    /// The work, for a host that listens at `port`.
    fn work(&self, port: u16) -> Vec<String> {
        let peer = self.network.peer();
        Traffic::ALL.iter().map(|(_, name)| format!("{name}={peer}:{port}")).collect()
    }

    fn start(&self, port: u16) -> Result<Command, String> {
        let work = self.work(port);
        let mut command = Command::new(&self.program);
        if self.monitor == Monitor::Process {
            command
                .args(["netns", "exec", self.network.name()])
                .arg(&self.setting.own)
                .arg("work")
                .args(work);
            return Ok(command);
        }
        let (kernel, initramfs) = Place::guest(self.setting)?;
        let (kernel, initramfs) = (kernel.as_os_str(), initramfs.as_os_str());
        let ip = self.network.ip();
        let mut arguments = vec!["--ip", &ip];
        arguments.extend(work.iter().map(String::as_str));
        let cmdline = |console: &str, reboot: char| Place::cmdline_with(console, reboot, &arguments);
        let name = self.network.name();
        match self.monitor {
            Monitor::Process => {}
            Monitor::Vmm => {
                command.arg("--kernel").arg(kernel).arg("--initrd").arg(initramfs);
                command.args([
                    "--mem",
                    &format!("{MIB}M"),
                    "--cmdline",
                    &cmdline("console=hvc0", 't'),
                    "--net",
                ]);
                command.arg(match self.kind {
                    Kind::User => format!("user,allow=127.0.0.1:{port}"),
                    Kind::Passt => format!("socket={}", self.network.socket().display()),
                    Kind::Tap | Kind::Veth => {
                        format!("tap={name}{}", if self.vhost { ",vhost=on" } else { "" })
                    }
                });
            }
            Monitor::Qemu => {
                let machine =
                    "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=off,acpi=on";
                command.args(["-M", machine, "-cpu", "host", "-m", &MIB.to_string()]);
                command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
                command.args(["-append", &cmdline("console=hvc0", 't')]);
                command.args(["-chardev", "stdio,id=c", "-device", "virtio-serial-device,max_ports=1"]);
                command.args(["-device", "virtconsole,chardev=c", "-netdev"]);
                command.arg(match self.kind {
                    Kind::User => "user,id=n".to_owned(),
                    Kind::Passt => {
                        let path = self.network.socket().display();
                        format!("stream,id=n,server=off,addr.type=unix,addr.path={path}")
                    }
                    Kind::Tap | Kind::Veth => {
                        let vhost = if self.vhost { "on" } else { "off" };
                        format!("tap,id=n,ifname={name},script=no,downscript=no,vhost={vhost}")
                    }
                });
                command.args(["-device", "virtio-net-device,netdev=n"]);
            }
            Monitor::Firecracker => {
                let config = json!({
                    "boot-source": {
                        "kernel_image_path": kernel.to_string_lossy(),
                        "initrd_path": initramfs.to_string_lossy(),
                        "boot_args": cmdline("console=ttyS0 i8042.noaux i8042.nomux i8042.dumbkbd pci=off", 'k'),
                    },
                    "drives": [],
                    "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": name }],
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": MIB },
                });
                let path = self.setting.scratch.join(format!("{name}.json"));
                fs::write(&path, config.to_string())
                    .map_err(|error| format!("write {}: {error}", path.display()))?;
                command.args(["--no-api", "--level", "Error", "--config-file"]).arg(path);
            }
            Monitor::CloudHypervisor => {
                command.arg("--kernel").arg(kernel).arg("--initramfs").arg(initramfs);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={MIB}M")]);
                command.args(["--console", "off", "--serial", "tty", "--net", &format!("tap={name}")]);
                command.args(["--cmdline", &cmdline("console=ttyS0", 't')]);
            }
        }
        Ok(command)
    }
}

impl Contender for Networked<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn command(&self) -> String {
        self.start(0).map_or_else(
            |why| why,
            |command| {
                let words: Vec<_> =
                    command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
                shown(command.get_program(), &words)
            },
        )
    }

    fn version(&self) -> Option<String> {
        match self.monitor {
            Monitor::Process => None,
            _ => version(&self.program, &["--version"]),
        }
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let peer = Peer::listen(self.network.listens())?;
        let _helper = self.network.start(self.setting)?;
        let complaint = self.setting.scratch.join(format!("{}.err", self.network.name()));
        let errors = File::create(&complaint).map_err(|error| error.to_string())?;
        let mut command = self.start(peer.port()?)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).process_group(0);
        let child = command.spawn().map_err(|error| format!("start {}: {error}", self.program.display()))?;
        let mut running = Running(child);
        let deadline = Instant::now() + LIMIT;
        let mut alive = || match running.0.try_wait() {
            Ok(Some(status)) => Err(format!("it ended with {status}")),
            _ if Instant::now() > deadline => Err(format!("nobody came for {LIMIT:?}")),
            _ if INTERRUPTED.load(Ordering::SeqCst) => Err("interrupted".to_owned()),
            _ => Ok(()),
        };
        let values = match self.setting.repeatable_clock {
            true => peer.count(&mut alive).map(|counts| counts.to_vec()),
            false => peer.serve(&mut alive).map(|values| values.to_vec()),
        };
        running.end();
        values.map_err(|why| {
            let said = fs::read_to_string(&complaint).unwrap_or_default();
            format!("{why}: {}", said.trim())
        })
    }
}

/// The contender's process, and those that it started.
struct Running(Child);

impl Running {
    /// Waits for its end, for a while.
    fn end(&mut self) {
        let deadline = Instant::now() + END;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // Not waited for yet, so the number is still its own.
            if let Some(group) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = self.0.wait();
        }
    }
}
