//! The same kernels started by firmware, to the same shell: the built-in one; those that Debian packages for QEMU's microvm;
//! and the built-in one in QEMU, which knows nothing of us.

use std::process::{Command, Stdio};

use crate::guest::{Guest, Kernel, available, bundle, run};
use crate::kernels::{LOOK, complaints};

pub const QBOOT: &str = "/usr/share/qemu/qboot.rom";
const SEABIOS: &str = "/usr/share/seabios/bios-microvm.bin";
const SEABIOS_PC: &str = "/usr/share/seabios/bios.bin";
const QEMU: &str = "/usr/share/qemu";

/// Boots with `arguments`, and as if there were no firmware: both must see and complain of the same.
fn as_directly(kernel: Kernel, arguments: &[&str]) {
    as_directly_over("mmio", kernel, arguments);
}

fn as_directly_over(transport: &str, kernel: Kernel, arguments: &[&str]) {
    let machine = ["--mem", "512M", "--cpus", "2", "--transport", transport];
    let (direct, by_firmware) =
        (run(kernel, &machine, LOOK), run(kernel, &[&machine, arguments].concat(), LOOK));
    let (direct, body) = (direct.body(), by_firmware.body());
    assert_eq!(body[0], "2", "{kernel:?} {arguments:?}: nproc");
    assert!(body[1].starts_with("MemTotal"), "{body:?}");
    let (expected, found) = (complaints(&direct), complaints(&body));
    let new: Vec<_> = found.difference(&expected).collect();
    assert!(new.is_empty(), "{kernel:?} {arguments:?} over {transport}: {new:#?}");
    let acpi =
        |lines: &[&str]| lines.iter().filter(|line| line.contains("ACPI: ") && line.contains("VMM ")).count();
    assert_eq!(acpi(&body), acpi(&direct), "the tables: {body:#?}");
}

/// Whether there is that file; says so if not, and fails if it must be.
pub fn packaged(test: &str, file: &str, package: &str) -> bool {
    if std::path::Path::new(file).exists() {
        return available(test);
    }
    assert!(
        std::env::var_os("VMM_REQUIRE_LINUX_GUESTS").is_none(),
        "{test}: no {file}: apt-get install {package}"
    );
    eprintln!("SKIP: {test}: no {file}: apt-get install {package}");
    false
}

#[test]
fn built_in_stock_bzimage() {
    if available("firmware, stock bzImage") {
        as_directly(Kernel::Stock, &["--firmware"]);
    }
}

#[test]
fn built_in_tuned_bzimage_and_pvh() {
    if available("firmware, tuned kernels") {
        as_directly(Kernel::TunedBzImage, &["--firmware"]);
        as_directly(Kernel::TunedPvh, &["--firmware"]);
    }
}

#[test]
fn qboot() {
    if packaged("qboot", QBOOT, "qemu-system-data") {
        as_directly(Kernel::TunedBzImage, &["--firmware", QBOOT]);
        as_directly(Kernel::TunedPvh, &["--firmware", QBOOT]);
    }
}

#[test]
fn seabios_with_qemus_option_roms() {
    if packaged("SeaBIOS", SEABIOS, "seabios") && packaged("SeaBIOS", QBOOT, "qemu-system-data") {
        for (kernel, rom) in [(Kernel::TunedBzImage, "linuxboot_dma.bin"), (Kernel::TunedPvh, "pvh.bin")] {
            as_directly(kernel, &["--firmware", SEABIOS, "--option-rom", &format!("{QEMU}/{rom}")]);
        }
    }
}

#[test]
fn each_firmware_starts_a_kernel_whose_devices_are_on_the_pci_bus() {
    let linuxboot = format!("{QEMU}/linuxboot_dma.bin");
    if packaged("firmware, PCI", SEABIOS, "seabios") && packaged("firmware, PCI", QBOOT, "qemu-system-data") {
        for arguments in [
            &["--firmware"][..],
            &["--firmware", QBOOT],
            &["--firmware", SEABIOS, "--option-rom", &linuxboot],
            &["--firmware", SEABIOS_PC, "--option-rom", &linuxboot],
        ] {
            as_directly_over("pci", Kernel::TunedBzImage, arguments);
        }
    }
}

/// It moves the disk's memory to where it thinks that there is room, and has a driver of its own.
#[test]
fn seabios_boots_from_a_disk_on_the_pci_bus() {
    if !packaged("SeaBIOS, disk on PCI", SEABIOS, "seabios") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    // 16-bit code: "k" to the serial port, and the end; and what makes it a boot sector.
    let mut image = vec![0; 1 << 20];
    image[..11].copy_from_slice(&[0xb0, b'k', 0xba, 0xf8, 0x03, 0xee, 0xb0, 0, 0xe6, 0xf4, 0xf4]);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&disk, image).unwrap();
    for bios in [SEABIOS, SEABIOS_PC] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(["--firmware", bios, "--transport", "pci", "--mem", "64M", "--debug-exit=0xf4"]);
        command
            .args(["--serial", "stdio", "--console", "off", "--disk"])
            .arg(format!("path={}", disk.display()));
        let ended = Guest::start(command).finish();
        assert!(ended.code == Some(1) && ended.text.ends_with('k'), "{bios}: {ended:?}");
    }
}

/// QEMU takes ROMs of whole 64 KiB.
#[test]
fn built_in_under_qemu() {
    if !available("the built-in firmware in QEMU") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rom = dir.path().join("rom");
    let own = vmm_monitor::boot::firmware::BUILT_IN;
    std::fs::write(&rom, [&vec![0xff; (64 << 10) - own.len()][..], own].concat()).unwrap();
    for kernel in [Kernel::TunedBzImage, Kernel::TunedPvh] {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(
            "-M microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=off -enable-kvm -cpu host".split(' '),
        );
        command.args(
            "-m 512 -smp 1 -nodefaults -no-user-config -display none -no-reboot -chardev stdio,id=c"
                .split(' '),
        );
        command
            .args(["-device", "virtio-serial-device", "-device", "virtconsole,chardev=c", "-bios"])
            .arg(&rom);
        command.arg("-kernel").arg(kernel.file()).arg("-initrd").arg(bundle("tuned.cpio"));
        command
            .args(["-append", &format!("console=hvc0 quiet panic=-1 vmm.run=\"{LOOK}\"")])
            .stdin(Stdio::null());
        let ended = Guest::start(command).finish();
        assert_eq!(ended.body()[0], "1", "{kernel:?}: nproc");
    }
}
