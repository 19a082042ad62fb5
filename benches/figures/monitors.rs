//! The monitors, and the command line that each starts the same guest by: the leanest that its documentation gives.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guests::{Guest, RAM_MIB};
use crate::options::Options;

/// The same for all. `quiet`: printing costs more than anything else in such a boot. `reboot=t panic=-1`: a failure ends it.
const CMDLINE: &str = "console=hvc0 quiet reboot=t panic=-1";

pub struct Monitor {
    pub name: &'static str,
    program: PathBuf,
}

impl Monitor {
    /// Those that are there; what is missing is told.
    pub fn all(options: &Options) -> Vec<Self> {
        let vmm = options.vmm.clone().unwrap_or(env!("CARGO_BIN_EXE_vmm").into());
        let qemu = options.qemu.clone().or_else(|| find("qemu-system-x86_64"));
        if qemu.is_none() {
            eprintln!("figures: SKIPPED: QEMU: no qemu-system-x86_64 in PATH");
        }
        let monitor = |name, program: PathBuf| Self { name, program };
        let mut all = vec![monitor("vmm", vmm)];
        all.extend(qemu.map(|qemu| monitor("QEMU microvm", qemu)));
        all.retain(|m| options.only.as_ref().is_none_or(|name| m.name == name));
        all
    }

    /// Starts `guest`, its console or serial port being standard input and output.
    pub fn command(&self, guest: &Guest) -> Command {
        let mut command = Command::new(&self.program);
        match self.name {
            "vmm" => {
                command.arg("--kernel").arg(&guest.kernel).args(["--mem", &format!("{RAM_MIB}M")]);
                match &guest.initrd {
                    Some(initrd) => command.arg("--initrd").arg(initrd).args(["--cmdline", CMDLINE]),
                    None => command.args(["--console", "off", "--serial", "stdio", "--debug-exit"]),
                };
            }
            _ => {
                let serial = if guest.initrd.is_some() { "off" } else { "on" };
                let acpi = if guest.initrd.is_some() { "on" } else { "off" };
                // With acpi=off Linux cannot power the machine off.
                let machine = format!(
                    "microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial={serial},acpi={acpi}"
                );
                // Where KVM is software, QEMU dies at setting this MSR.
                let cpu = if guest.initrd.is_some() { "host" } else { "host,-arch-capabilities" };
                command.args(["-M", &machine, "-cpu", cpu, "-smp", "1", "-m", &format!("{RAM_MIB}M")]);
                command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
                command.arg("-kernel").arg(&guest.kernel);
                match &guest.initrd {
                    Some(initrd) => {
                        // With more ports Linux learns of the console only some time after its start, and an init as
                        // quick as this one speaks to nobody.
                        command.arg("-initrd").arg(initrd).args(["-append", CMDLINE]);
                        command.args([
                            "-chardev",
                            "stdio,id=c",
                            "-device",
                            "virtio-serial-device,max_ports=1",
                        ]);
                        command.args(["-device", "virtconsole,chardev=c"])
                    }
                    None => {
                        command.args(["-serial", "stdio"]);
                        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
                    }
                };
            }
        }
        command
    }

    /// The status of a run that went well: debug-exit makes 2n + 1 of n, power-off 0.
    pub fn good_end(&self, guest: &Guest) -> i32 {
        i32::from(guest.initrd.is_none())
    }

    /// Its version, in one line.
    pub fn version(&self) -> String {
        let output = Command::new(&self.program).arg("--version").output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
        text.lines().next().unwrap_or("unknown version").to_owned()
    }

    /// What it reads besides its program and libraries. For QEMU: the firmware, without which it does not start.
    pub fn files(&self) -> Vec<PathBuf> {
        let firmware = Path::new("/usr/share/qemu/bios-microvm.bin");
        let needed = self.name != "vmm" && firmware.exists();
        if needed { vec![firmware.to_owned()] } else { Vec::new() }
    }

    pub fn program(&self) -> &Path {
        &self.program
    }
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
