//! The emulated machine: QEMU's command line, its memory, its ports and the file server for its
//! root. Called by `session` and `snapshot`; knows nothing of what the machine runs.

use crate::boot_files::{BootFiles, FixedRun};
use crate::options::Options;
use crate::packages::{QEMU, VIRTIOFSD};
use crate::process::Process;
use anyhow::{Context, Result};
use rig_init::{CONTROL_PORT, NO_NPT, ROOT_TAG, STDIN_PORT};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

/// The bus that the file server's device is plugged into.
pub const SLOT: &str = "files-slot";
/// The character device that leads to the file server.
pub const FILE_SERVER: &str = "files";

/// What machine is to be emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Memory in MiB.
    pub mem: u32,
    /// Number of processors.
    pub smp: u8,
    /// Whether kvm_amd uses nested paging.
    pub npt: bool,
    /// What the random numbers begin with, where the clock counts instructions.
    pub icount: Option<u32>,
}

impl Shape {
    /// The machine that the user asked for.
    pub fn of(options: &Options) -> Shape {
        Shape {
            mem: options.mem,
            smp: if options.icount { 1 } else { options.smp },
            npt: !options.no_npt,
            icount: options.icount.then_some(options.seed),
        }
    }

    /// QEMU's arguments that a saved machine's state depends on.
    pub fn arguments(&self) -> Vec<String> {
        let accelerator = if self.icount.is_some() { "tcg,thread=single" } else { "tcg,thread=multi" };
        let mut arguments = [
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-cpu",
            "max,+svm,-la57",
            "-M",
            "q35,memory-backend=ram",
            "-accel",
            accelerator,
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.extend(["-smp".into(), self.smp.to_string()]);
        arguments.extend(["-m".into(), self.mem.to_string()]);
        if let Some(seed) = self.icount {
            arguments.extend(
                ["-icount", "shift=0,sleep=off", "-rtc", "base=2026-01-01T00:00:00,clock=vm", "-seed"]
                    .map(str::to_owned),
            );
            arguments.push(seed.to_string());
        }
        arguments
    }

    /// The kernel's command line.
    pub fn command_line(&self) -> String {
        let mut line = "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=1".to_owned();
        if self.icount.is_some() {
            line += " nokaslr norandmaps";
        }
        if !self.npt {
            line += " ";
            line += NO_NPT;
        }
        line
    }
}

/// How a machine begins.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// Boot, with the host's root as a file server's device.
    Boot,
    /// Boot with everything in memory.
    BootFixed(&'a FixedRun),
    /// Boot without a file server, to be saved.
    BootToSave,
    /// Wait for a saved state.
    Restore,
}

/// A running machine; it ends when this value is dropped.
#[derive(Debug)]
pub struct Machine {
    /// The port for every frame but standard input.
    pub control: UnixStream,
    /// The port for standard input.
    pub stdin: UnixStream,
    /// QEMU's own control.
    pub qmp: UnixStream,
    /// The machine's memory.
    pub memory: File,
    _qemu: Process,
    _file_server: Option<Process>,
}

impl Machine {
    /// Starts QEMU, and the file server if the machine needs it.
    pub fn start(shape: Shape, files: &BootFiles, start: Start, console: &Console) -> Result<Machine> {
        let mut inherited = Vec::new();
        let mut pass = |fd: &dyn AsRawFd| {
            inherited.push(fd.as_raw_fd());
            fd.as_raw_fd()
        };
        let mut qemu = Command::new(QEMU);
        qemu.args(shape.arguments());

        let memory = File::from(memory(u64::from(shape.mem) << 20)?);
        qemu.arg("-object").arg(format!(
            "memory-backend-file,id=ram,size={}M,mem-path=/dev/fd/{},share=on",
            shape.mem,
            pass(&memory)
        ));
        let log = console.file.try_clone()?;
        qemu.arg("-chardev").arg(format!("file,id=console,path=/dev/fd/{},append=on", pass(&log)));
        qemu.args(["-serial", "chardev:console"]);

        // Both ends of every connection are made here: no names, no races, nothing to clean up.
        let (control, control_end) = UnixStream::pair()?;
        let (stdin, stdin_end) = UnixStream::pair()?;
        let (qmp, qmp_end) = UnixStream::pair()?;
        // With a repeatable clock a kick is carried out at once: from another thread it would
        // arrive at a time of the host's.
        let kick = if shape.icount.is_some() { "off" } else { "on" };
        let ports = format!("virtio-serial-pci,ioeventfd={kick}");
        qemu.args(["-device", &ports]);
        for (id, end, port) in [("control", &control_end, CONTROL_PORT), ("stdin", &stdin_end, STDIN_PORT)] {
            qemu.arg("-chardev").arg(format!("socket,id={id},fd={}", pass(end)));
            qemu.arg("-device").arg(format!("virtserialport,chardev={id},name={port}"));
        }
        qemu.arg("-chardev").arg(format!("socket,id=qmp,fd={}", pass(&qmp_end)));
        qemu.args(["-mon", "chardev=qmp,mode=control"]);
        qemu.args(["-device", &format!("pcie-root-port,id={SLOT},chassis=1")]);

        let mut file_server = None;
        let connection;
        if matches!(start, Start::Boot | Start::Restore) {
            let (server, stream) = start_file_server(console)?;
            file_server = Some(server);
            connection = stream;
            qemu.arg("-chardev").arg(format!("socket,id={FILE_SERVER},fd={}", pass(&connection)));
        }
        if let Start::Boot = start {
            qemu.arg("-device").arg(file_device_argument());
        }
        let initramfs;
        if let Start::Restore = start {
            qemu.args(["-incoming", "defer"]);
        } else {
            let fixed = match start {
                Start::BootFixed(fixed) => Some(fixed),
                _ => None,
            };
            initramfs = in_memory(&files.initramfs(fixed)?)?;
            qemu.arg("-kernel").arg(&files.kernel);
            qemu.arg("-initrd").arg(format!("/dev/fd/{}", pass(&initramfs)));
            qemu.args(["-append", &shape.command_line()]);
        }
        qemu.stdin(Stdio::null());
        qemu.stdout(console.file.try_clone()?);
        qemu.stderr(console.file.try_clone()?);
        Ok(Machine {
            _qemu: Process::start(qemu, inherited)?,
            _file_server: file_server,
            control,
            stdin,
            qmp,
            memory,
        })
    }
}

/// The file server's device as QMP's `device_add` takes it.
pub fn file_device() -> serde_json::Value {
    serde_json::json!({
        "driver": "vhost-user-fs-pci", "chardev": FILE_SERVER, "tag": ROOT_TAG,
        "queue-size": 1024, "bus": SLOT,
    })
}

fn file_device_argument() -> String {
    format!("vhost-user-fs-pci,chardev={FILE_SERVER},tag={ROOT_TAG},queue-size=1024,bus={SLOT}")
}

/// Starts the file server for the host's root, and connects to it.
fn start_file_server(console: &Console) -> Result<(Process, UnixStream)> {
    // virtiofsd takes a listening socket. An address of our own choice in the abstract name
    // space leaves no file behind.
    let mut token = [0; 16];
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    let name = format!("vmm-rig-{:032x}", u128::from_le_bytes(token));
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let listener = UnixListener::bind_addr(&address)?;
    let stream = UnixStream::connect_addr(&address)?;
    let mut server = Command::new(VIRTIOFSD);
    server
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .args(["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"])
        .args(["-o", "log_level=warn", "--thread-pool-size=0", "-f"])
        .stdin(Stdio::null())
        .stdout(console.file.try_clone()?)
        .stderr(console.file.try_clone()?);
    let server = Process::start(server, vec![listener.as_raw_fd()])?;
    Ok((server, stream))
}

/// Where the machine's console, QEMU and the file server write their messages.
#[derive(Debug)]
pub struct Console {
    file: File,
    kept: bool,
    reported: Cell<u64>,
}

impl Console {
    /// A log in the file `path`, or in memory.
    pub fn new(path: Option<&Path>) -> Result<Console> {
        let file = match path {
            Some(path) => File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .with_context(|| format!("create {}", path.display()))?,
            None => memory(0)?.into(),
        };
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::APPEND)?;
        Ok(Console { file, kept: path.is_some(), reported: Cell::new(0) })
    }

    /// The last lines since the last report, for another; none when the user keeps the whole.
    pub fn tail(&self) -> String {
        const LINES: usize = 25;
        if self.kept {
            return String::new();
        }
        let mut bytes = Vec::new();
        if let Ok(mut file) = self.file.try_clone() {
            let _ = file.seek(SeekFrom::Start(self.reported.get()));
            let _ = file.read_to_end(&mut bytes);
            self.reported.set(self.reported.get() + bytes.len() as u64);
        }
        let text = String::from_utf8_lossy(&bytes);
        let mut lines: Vec<_> = text.lines().rev().take(LINES).collect();
        lines.reverse();
        lines.iter().map(|line| format!("  | {}\n", line.trim_end())).collect()
    }
}

/// A file in memory of `size` bytes.
fn memory(size: u64) -> Result<OwnedFd> {
    let fd = memfd_create("rig", MemfdFlags::CLOEXEC)?;
    ftruncate(fd.as_fd(), size)?;
    Ok(fd)
}

/// A file in memory that holds `bytes`.
pub fn in_memory(bytes: &[u8]) -> Result<File> {
    let mut file = File::from(memory(0)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}
