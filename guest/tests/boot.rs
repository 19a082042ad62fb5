//! Boots what this crate builds, under QEMU's software emulation: slow, but it needs neither KVM nor our monitor, so that a
//! failure here is one of kernel, initramfs, root image or init.

use guest::initramfs::{self, Compression};
use guest::kernel::{Kernel, Kind};
use guest::run::Tool;
use guest::{programs, rootfs, tuned};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A boot takes some 4 s on a quiet machine with the tuned kernel, 20 with the stock one.
const PATIENCE: Duration = Duration::from_secs(300);

/// Says on the real standard error that a test did not run; where CI is set, that is a failure.
fn skip(test: &str, reason: &str) {
    let message = format!("SKIP: {test}: {reason}\n");
    assert!(std::env::var_os("CI").is_none(), "{message}");
    // Not by eprintln!, which the test harness swallows.
    let _ = std::io::stderr().write_all(message.as_bytes());
}

fn has_qemu(test: &str) -> bool {
    let found = Tool::new("qemu-system-x86_64").arg("--version").quiet().is_ok();
    if !found {
        skip(test, "no qemu-system-x86_64 (apt-get install qemu-system-x86)");
    }
    found
}

/// The tuned kernel if it is there: building it takes minutes, which only CI should spend unasked.
fn tuned_kernel(test: &str) -> Option<Kernel> {
    if std::env::var_os("CI").is_some() {
        return Some(Kernel::get(Kind::Tuned, false).expect("build the tuned kernel"));
    }
    let cached = tuned::cached().expect("look into the cache");
    if cached.is_none() {
        skip(test, "the tuned kernel is not built yet (cargo guest -- kernel tuned)");
    }
    cached
}

/// One emulated machine.
struct Boot {
    command: Command,
}

/// How it ended.
struct Ended {
    /// QEMU's: 0 after power-off or reset, `code * 2 + 1` by the debug-exit port.
    status: Option<i32>,
    /// The serial console.
    output: String,
}

impl Boot {
    fn new(kernel: &Path, initramfs: Option<&Path>, command_line: &str) -> Self {
        let mut command = Tool::new("timeout").into_command();
        command.args(["-s", "KILL", &PATIENCE.as_secs().to_string(), "qemu-system-x86_64"]);
        command.args(["-M", "q35", "-accel", "tcg", "-cpu", "max,-la57", "-m", "256", "-smp", "2"]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"]).arg(kernel);
        if let Some(path) = initramfs {
            command.arg("-initrd").arg(path);
        }
        // reboot=t: a reset by triple fault, for a machine whose other ways the tuned kernel does not know.
        command.args(["-append", &format!("console=ttyS0 panic=-1 reboot=t {command_line}")]);
        Self { command }
    }

    fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(args);
        self
    }

    fn spawn(mut self) -> Child {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("start QEMU")
    }

    fn run(self) -> Ended {
        let output = self.spawn().wait_with_output().expect("wait for QEMU");
        Ended { status: output.status.code(), output: String::from_utf8_lossy(&output.stdout).into_owned() }
    }
}

fn busybox_initramfs(folder: &Path, kernel: Kind) -> PathBuf {
    let path = folder.join("initramfs.cpio");
    let recipe = initramfs::Recipe { kernel: Some(kernel), busybox: true, ..Default::default() };
    recipe.write(&path, Compression::None).expect("build an initramfs");
    path
}

/// A root folder with busybox and our init, as an ext4 image.
fn busybox_root(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    for name in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(programs::busybox().unwrap(), root.join("bin/busybox")).unwrap();
    for name in ["sh", "echo", "cat", "sync", "mount", "grep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::copy(programs::init(programs::Init::Full).unwrap(), root.join("sbin/guest-init")).unwrap();
    fs::write(root.join("greeting"), "from the disk\n").unwrap();
    let image = folder.join("root.ext4");
    let recipe = rootfs::Recipe {
        source: rootfs::Source::Folder(root),
        size: "32M".to_owned(),
        label: "test".to_owned(),
    };
    recipe.write(&image).expect("build a root image");
    image
}

fn drive(image: &Path) -> [String; 4] {
    let drive = format!("if=none,id=root,format=raw,file={}", image.display());
    ["-drive".to_owned(), drive, "-device".to_owned(), "virtio-blk-pci,drive=root".to_owned()]
}

fn assert_clean(image: &Path) {
    Tool::new("e2fsck").arg("-fn").arg(image).quiet().expect("a clean file system");
}

#[track_caller]
fn assert_ended(ended: &Ended, status: i32, words: &[&str]) {
    assert_eq!(ended.status, Some(status), "console:\n{}", ended.output);
    let mut rest = ended.output.as_str();
    for word in words {
        let at = rest
            .find(word)
            .unwrap_or_else(|| panic!("no {word:?} in order on the console:\n{}", ended.output));
        rest = &rest[at + word.len()..];
    }
}

#[test]
fn the_tuned_kernel_runs_a_command_and_reports_its_code() {
    let name = "the_tuned_kernel_runs_a_command_and_reports_its_code";
    let (true, Some(kernel)) = (has_qemu(name), tuned_kernel(name)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let initramfs = busybox_initramfs(folder.path(), Kind::Tuned);
    // vmlinux by its PVH entry, bzImage by the Linux boot protocol; orders as a parameter, and after two dashes.
    let command = r#"vmm.marker vmm.exit=ioport:0xf4 vmm.run="echo hello; tty; exit 3""#;
    let ended = Boot::new(&kernel.vmlinux, Some(&initramfs), command).run();
    assert_ended(&ended, 3 * 2 + 1, &["guest: init", "hello", "/dev/ttyS0"]);
    let command =
        r#"vmm.exit=ioport:0xf4 -- test "$(nproc)$(hostname)" = 2guest && ping -c 1 127.0.0.1 && kill -9 $$"#;
    let ended = Boot::new(&kernel.bzimage, Some(&initramfs), command).run();
    // QEMU's own exit code is a byte: of 128 + 9 the highest bit is lost in the doubling.
    assert_ended(&ended, ((128 + 9) * 2 + 1) & 0xff, &["Run /init"]);
    assert!(!ended.output.contains("guest: init"), "no marker was asked for:\n{}", ended.output);
    // The boot mark, at the port that ends QEMU: nothing of init comes after it.
    let command = "vmm.marker vmm.mark=0xf4 -- echo hello";
    let ended = Boot::new(&kernel.vmlinux, Some(&initramfs), command).run();
    assert_ended(&ended, 3, &["Run /init"]);
    assert!(!ended.output.contains("guest: init"), "{}", ended.output);
}

#[test]
fn the_tuned_kernel_starts_init_from_a_disk_alone() {
    let name = "the_tuned_kernel_starts_init_from_a_disk_alone";
    let (true, Some(kernel)) = (has_qemu(name), tuned_kernel(name)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let image = busybox_root(folder.path());
    let command = r#"root=/dev/vda rw init=/sbin/guest-init vmm.run="cat /greeting; echo kept > /new""#;
    let ended =
        Boot::new(&kernel.vmlinux, None, command).args(drive(&image).each_ref().map(String::as_str)).run();
    assert_ended(&ended, 0, &["from the disk", "Power down"]);
    assert_clean(&image);
    let kept = Tool::new("debugfs").args(["-R", "cat /new"]).arg(&image).output().unwrap();
    assert_eq!(kept, "kept\n");
}

#[test]
fn the_tiny_init_says_its_line_and_powers_off() {
    let name = "the_tiny_init_says_its_line_and_powers_off";
    let (true, Some(kernel)) = (has_qemu(name), tuned_kernel(name)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.cpio");
    let recipe = initramfs::Recipe { tiny: true, ..Default::default() };
    recipe.write(&path, Compression::None).unwrap();
    let size = fs::metadata(&path).unwrap().len();
    assert!(size < 2048, "{size} bytes");
    let ended = Boot::new(&kernel.vmlinux, Some(&path), "").run();
    assert_ended(&ended, 0, &["guest: init", "Power down"]);
    let ended = Boot::new(&kernel.vmlinux, Some(&path), "-- reboot").run();
    assert_ended(&ended, 0, &["guest: init", "Restarting system"]);
}

#[test]
fn the_stock_kernel_finds_its_disk_by_modules_and_reports_through_a_console_port() {
    let name = "the_stock_kernel_finds_its_disk_by_modules_and_reports_through_a_console_port";
    if !has_qemu(name) {
        return;
    }
    let kernel = Kernel::get(Kind::Stock, false).expect("fetch the stock kernel");
    let folder = tempfile::tempdir().unwrap();
    let initramfs = busybox_initramfs(folder.path(), Kind::Stock);
    let image = busybox_root(folder.path());
    let report = folder.path().join("report");
    let command = r#"vmm.marker vmm.root=/dev/vda vmm.exit=port:org.vmm.exit vmm.end=reboot vmm.run="cat /greeting; mount; exit 42""#;
    let ended = Boot::new(&kernel.bzimage, Some(&initramfs), command)
        .args(drive(&image).each_ref().map(String::as_str))
        .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=report,name=org.vmm.exit"])
        .args(["-chardev", &format!("file,id=report,path={}", report.display())])
        .run();
    assert_ended(
        &ended,
        0,
        &["guest: init", "from the disk", "/dev/vda on / type ext4 (rw", "Restarting system"],
    );
    assert!(!ended.output.contains("guest-init:"), "complaints:\n{}", ended.output);
    assert_eq!(fs::read_to_string(&report).unwrap(), "42\n");
    assert_clean(&image);
}

#[test]
fn the_power_button_ends_the_command_and_the_machine() {
    let name = "the_power_button_ends_the_command_and_the_machine";
    let (true, Some(kernel)) = (has_qemu(name), tuned_kernel(name)) else {
        return;
    };
    press_power_button(&kernel.vmlinux, Kind::Tuned);
}

#[test]
fn the_power_button_works_by_modules_too() {
    let name = "the_power_button_works_by_modules_too";
    if has_qemu(name) {
        let kernel = Kernel::get(Kind::Stock, false).expect("fetch the stock kernel");
        press_power_button(&kernel.bzimage, Kind::Stock);
    }
}

fn press_power_button(kernel: &Path, kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let initramfs = busybox_initramfs(folder.path(), kind);
    let image = busybox_root(folder.path());
    let socket = folder.path().join("qmp");
    // Busybox's `read` waits for input without an end if the signal comes just before it; `sleep` ends by itself.
    let command = r#"vmm.root=/dev/vda vmm.run="trap 'echo asked to end > /ended; exit 0' TERM; echo waiting; while :; do sleep 1; done""#;
    let mut child = Boot::new(kernel, Some(&initramfs), command)
        .args(drive(&image).each_ref().map(String::as_str))
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .spawn();
    let mut console = BufReader::new(child.stdout.take().unwrap());
    let mut output = String::new();
    while !output.ends_with("waiting\r\n") && !output.ends_with("waiting\n") {
        assert_ne!(console.read_line(&mut output).unwrap(), 0, "the guest ended early:\n{output}");
    }
    let mut qmp = UnixStream::connect(&socket).unwrap();
    qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"system_powerdown\"}").unwrap();
    let pressed = Instant::now();
    let mut rest = Vec::new();
    console.read_to_end(&mut rest).unwrap();
    output.push_str(&String::from_utf8_lossy(&rest));
    let status = child.wait().unwrap();
    assert!(
        status.success() && output.contains("Power down"),
        "{status} after {:?}:\n{output}",
        pressed.elapsed()
    );
    assert_clean(&image);
    let ended = Tool::new("debugfs").args(["-R", "cat /ended"]).arg(&image).output().unwrap();
    assert_eq!(ended, "asked to end\n", "after {:?}:\n{output}", pressed.elapsed());
}
