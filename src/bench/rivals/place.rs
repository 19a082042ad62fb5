//! The same workload in three places: this program as `vmm bench-work`, natively, in a container, in a Linux guest.

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Setting;
use super::elf;
use crate::boot::cpio::{Archive, Entry};
use crate::sandbox::container::Container;

/// The host's device nodes that a container's workload finds.
const NODES: [&str; 3] = ["null", "zero", "urandom"];

/// Where a workload runs: the same program, with the same arguments, natively, in a container, in a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// As a process.
    Native,
    /// In namespaces of our own.
    Container,
    /// In a Linux guest of vmm.
    Vm,
}

/// The size of a VM.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub mib: u64,
}

impl Place {
    /// All of them, the baseline first.
    pub const ALL: [Self; 3] = [Self::Native, Self::Container, Self::Vm];

    /// The command that runs `vmm bench-work ARGUMENTS` there, its output on standard output. `size` is the VM's.
    ///
    /// A disk: natively and in the container the workload is given a path below [`Setting::scratch`], which is the same inside;
    /// for the VM `--disk FILE` is added to what this returns, and the workload finds it at /dev/vda. In the VM the workload is
    /// PID 1 with nothing mounted, and powers the machine off when it is done.
    ///
    /// # Errors
    /// Why it cannot run there.
    pub fn command(self, setting: &Setting, arguments: &[&str], size: Size) -> Result<Command, String> {
        let mut command = match self {
            Self::Native => Command::new(&setting.vmm),
            Self::Container => container(setting)?
                .command("/vmm")
                .map_err(|error| format!("a container for {}: {error}", setting.vmm.display()))?,
            Self::Vm => return vm(setting, arguments, size),
        };
        command.arg("bench-work").args(arguments);
        Ok(command)
    }
}

fn container(setting: &Setting) -> Result<Container, String> {
    elf::must_be_static(&setting.vmm)?;
    let root = setting.scratch.join("work-root");
    let failed = |path: &Path, error: std::io::Error| format!("make {}: {error}", path.display());
    let file = |path: PathBuf| {
        fs::create_dir_all(path.parent().unwrap_or(&root)).map_err(|error| failed(&path, error))?;
        fs::OpenOptions::new().create(true).append(true).open(&path).map_err(|error| failed(&path, error))
    };
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    file(root.join("vmm"))?;
    // Its own scratch folder at its own path, so that a file there has one name everywhere.
    for folder in [root.join("proc"), inside(&setting.scratch)] {
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
    }
    let mut container = Container::new(&root).bind(&setting.vmm, "/vmm", false).bind(
        &setting.scratch,
        &setting.scratch,
        true,
    );
    for node in NODES.map(|name| Path::new("/dev").join(name)) {
        file(inside(&node))?;
        container = container.bind(&node, &node, true);
    }
    Ok(container)
}

fn vm(setting: &Setting, arguments: &[&str], size: Size) -> Result<Command, String> {
    let kernel = setting.tuned_kernel()?;
    if let Some(argument) =
        arguments.iter().find(|argument| argument.contains(|c: char| c.is_whitespace() || c == '"'))
    {
        return Err(format!("a kernel command line cannot carry the argument {argument:?}"));
    }
    let initramfs = setting.scratch.join("work.cpio");
    if !initramfs.exists() {
        pack(&setting.vmm, &initramfs)?;
    }
    let cmdline = format!(
        "console=hvc0 quiet reboot=t panic=-1 rdinit=/vmm -- bench-work --guest {}",
        arguments.join(" ")
    );
    let mut command = Command::new(&setting.vmm);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initramfs);
    command.args(["--cpus", &size.cpus.to_string(), "--mem", &format!("{}M", size.mib)]);
    command.args(["--cmdline", cmdline.trim_end()]);
    Ok(command)
}

/// Writes an initramfs with `program` as /vmm.
fn pack(program: &Path, to: &Path) -> Result<(), String> {
    elf::must_be_static(program)?;
    let bytes = fs::read(program).map_err(|error| format!("read {}: {error}", program.display()))?;
    let data = elf::loaded_part(&bytes)
        .ok_or_else(|| format!("{} is not an x86-64 ELF program", program.display()))?;
    let mut archive = Archive::new();
    let console = Entry::CharDevice { mode: 0o600, major: 5, minor: 1 };
    let entries = [("vmm", Entry::File { mode: 0o755, data }), ("dev/console", console)];
    let folders = ["proc", "sys", "tmp"].map(|path| (path, Entry::Directory { mode: 0o755 }));
    for (path, entry) in entries.into_iter().chain(folders) {
        archive.add(path, entry).map_err(|error| format!("make an initramfs: {error}"))?;
    }
    // Under its name only when it is whole.
    let part = to.with_extension("part");
    let written = fs::File::create(&part)
        .and_then(|file| archive.write(BufWriter::new(file)))
        .and_then(|()| fs::rename(&part, to));
    written.map_err(|error| format!("write {}: {error}", to.display()))
}
