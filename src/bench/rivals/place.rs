//! The same workload in three places: this program as `vmm-bench work`, natively, in a container, in a Linux guest.

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use super::Setting;
use crate::elf;
use crate::sandbox::container::Container;
use cpio::{Archive, Entry};

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

    /// The command that runs `vmm-bench work ARGUMENTS` there, its output on standard output. `size` is the VM's.
    ///
    /// A disk: natively and in the container the workload is given a path below [`Setting::scratch`], which is the same inside;
    /// for the VM `--disk FILE` is added to what this returns, and the workload finds it at /dev/vda. In the VM the workload is
    /// PID 1 with nothing mounted, and powers the machine off when it is done.
    ///
    /// # Errors
    /// Why it cannot run there.
    pub fn command(self, setting: &Setting, arguments: &[&str], size: Size) -> Result<Command, String> {
        let mut command = match self {
            Self::Native => Command::new(&setting.own),
            Self::Container => start(&container(setting)?, setting)?,
            Self::Vm => return vm(setting, arguments, size),
        };
        command.arg("work").args(arguments);
        Ok(command)
    }

    /// The same in a container that is in the cgroup at `path`.
    ///
    /// # Errors
    /// Why it cannot run there.
    pub fn container_in(setting: &Setting, arguments: &[&str], cgroup: &Path) -> Result<Command, String> {
        let mut command = start(&container(setting)?.in_cgroup(cgroup), setting)?;
        command.arg("work").args(arguments);
        Ok(command)
    }
}

fn start(container: &Container, setting: &Setting) -> Result<Command, String> {
    let command = container.command("/vmm-bench");
    command.map_err(|error| format!("a container for {}: {error}", setting.own.display()))
}

fn container(setting: &Setting) -> Result<Container, String> {
    elf::must_be_static(&setting.own)?;
    let root = setting.scratch.join("work-root");
    let failed = |path: &Path, error: std::io::Error| format!("make {}: {error}", path.display());
    let file = |path: PathBuf| {
        fs::create_dir_all(path.parent().unwrap_or(&root)).map_err(|error| failed(&path, error))?;
        fs::OpenOptions::new().create(true).append(true).open(&path).map_err(|error| failed(&path, error))
    };
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    file(root.join("vmm-bench"))?;
    // Its own scratch folder at its own path, so that a file there has one name everywhere.
    for folder in [root.join("proc"), inside(&setting.scratch)] {
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
    }
    let mut container = Container::new(&root).bind(&setting.own, "/vmm-bench", false).bind(
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

/// Where QEMU emulates AMD-V, an idle guest without a tick may sleep through what should wake it, for good (tests/rig/README.md, "QEMU's VMRUN
/// forgets the interrupt shadow"): everybody's guests keep theirs there.
static TICK: LazyLock<&str> = LazyLock::new(|| {
    let is_emulated = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"));
    if is_emulated { "nohz=off " } else { "" }
});

impl Place {
    /// The command line of that kernel, for a console of virtio's.
    pub fn cmdline(arguments: &[&str]) -> String {
        Self::cmdline_with("console=hvc0", 't', arguments)
    }

    /// The same for another `console=`, and another `reboot=`.
    pub fn cmdline_with(console: &str, reboot: char, arguments: &[&str]) -> String {
        let (tick, arguments) = (*TICK, arguments.join(" "));
        format!(
            "{tick}{console} quiet reboot={reboot} panic=-1 rdinit=/vmm-bench -- work --guest {arguments}"
        )
    }

    /// What a suite's method says of it, if there is something to say.
    pub fn tick() -> Option<String> {
        (!TICK.is_empty()).then(|| {
            format!("QEMU emulates the processor: guests keep their tick when idle ({}).", TICK.trim())
        })
    }

    /// The kernel and the initramfs of a guest whose PID 1 is this program.
    ///
    /// # Errors
    /// There is no such kernel, or the initramfs cannot be made.
    pub fn guest(setting: &Setting) -> Result<(&Path, PathBuf), String> {
        let kernel = setting.tuned_kernel()?;
        let initramfs = setting.scratch.join("work.cpio");
        if !initramfs.exists() {
            pack(&setting.own, &initramfs)?;
        }
        Ok((kernel, initramfs))
    }
}

fn vm(setting: &Setting, arguments: &[&str], size: Size) -> Result<Command, String> {
    if let Some(argument) =
        arguments.iter().find(|argument| argument.contains(|c: char| c.is_whitespace() || c == '"'))
    {
        return Err(format!("a kernel command line cannot carry the argument {argument:?}"));
    }
    let (kernel, initramfs) = Place::guest(setting)?;
    let cmdline = Place::cmdline(arguments);
    let mut command = Command::new(&setting.vmm);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initramfs);
    command.args(["--cpus", &size.cpus.to_string(), "--mem", &format!("{}M", size.mib)]);
    command.args(["--cmdline", cmdline.trim_end()]);
    Ok(command)
}

/// Writes an initramfs with `program` as /vmm-bench.
fn pack(program: &Path, to: &Path) -> Result<(), String> {
    elf::must_be_static(program)?;
    let bytes = fs::read(program).map_err(|error| format!("read {}: {error}", program.display()))?;
    let data = elf::loaded_part(&bytes)
        .ok_or_else(|| format!("{} is not an x86-64 ELF program", program.display()))?;
    let mut archive = Archive::new();
    let console = Entry::CharDevice { mode: 0o600, major: 5, minor: 1 };
    let entries = [("vmm-bench", Entry::File { mode: 0o755, data }), ("dev/console", console)];
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rivals::program;

    fn setting(scratch: &Path, own: PathBuf) -> Setting {
        let (with, scratch) = (Default::default(), scratch.to_owned());
        Setting {
            vmm: "vmm".into(),
            own,
            with,
            kernel: None,
            bzimage: None,
            stock: None,
            agent: None,
            scratch,
            instances: 1,
            repeatable_clock: false,
        }
    }

    const SIZE: Size = Size { cpus: 1, mib: 128 };

    #[test]
    fn shared_libraries_are_refused_where_there_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let setting = setting(folder.path(), "/bin/sh".into());
        let error = Place::Container.command(&setting, &["x"], SIZE).unwrap_err();
        assert!(error.contains("/bin/sh") && error.contains("cargo static"), "{error}");
        let error = pack(Path::new("/bin/sh"), &folder.path().join("work.cpio")).unwrap_err();
        assert!(error.contains("cargo static"), "{error}");
        assert_eq!(Place::Native.command(&setting, &["x"], SIZE).unwrap().get_program(), "/bin/sh");
    }

    #[test]
    fn the_container_runs_this_program_and_sees_the_scratch_folder() {
        let folder = tempfile::tempdir().unwrap();
        let vmm = folder.path().join("vmm");
        program::write(&vmm, &program::image().unwrap()).unwrap();
        // The stand-in waits if that is the last word.
        let mut command =
            Place::Container.command(&setting(folder.path(), vmm), &[program::WAIT], SIZE).unwrap();
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = vec![0; program::MARKER.len()];
        let read = std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said);
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        if output.stderr.starts_with(b"container: clone3: errno 001") {
            eprintln!("SKIP: the_container_runs_this_program: this user may make no namespaces");
            return;
        }
        assert!(read.is_ok(), "{output:?}");
        assert_eq!(said, program::MARKER);
        assert!(folder.path().join("work-root").join(folder.path().strip_prefix("/").unwrap()).is_dir());
    }

    #[test]
    fn the_initramfs_has_the_program() {
        let folder = tempfile::tempdir().unwrap();
        let (vmm, initramfs) = (folder.path().join("vmm"), folder.path().join("work.cpio"));
        let image = program::image().unwrap();
        program::write(&vmm, &image).unwrap();
        pack(&vmm, &initramfs).unwrap();
        let bytes = fs::read(&initramfs).unwrap();
        let has = |what: &[u8]| bytes.windows(what.len()).any(|window| window == what);
        assert!(has(b"vmm-bench\0") && has(b"dev/console\0") && has(&image[..]), "{} bytes", bytes.len());
    }
}
