//! QEMU's microvm machine, as docs/system/i386/microvm.rst tunes it.

use std::path::Path;

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BARE_MARKER, Ending, Root};
use super::vmm::{bare_kernel, cmdline, end, kernel};
use super::{Found, RAM_MIB, Setting};

/// As Debian calls it.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// Where its guest speaks: standard output, with standard input.
pub const STDIO: &str = "stdio,id=c";
/// The same without standard input.
pub const STDOUT: &str = "file,id=c,path=/dev/stdout";

/// What it is given whatever the guest.
fn common(machine: &str, cpu: &str) -> Vec<String> {
    let machine = format!("microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,{machine}");
    let mut arguments = words(["-M", &machine, "-cpu", cpu, "-smp", "1", "-m", &RAM_MIB.to_string()]);
    arguments.extend(words(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]));
    arguments
}

/// A machine with Linux, which speaks through a virtio console.
pub fn linux_machine(kernel: &str, initramfs: &str, cmdline: &str, chardev: &str) -> Vec<String> {
    // With acpi=off Linux cannot power the machine off.
    let mut arguments = common("isa-serial=off,acpi=on", "host");
    arguments.extend(words(["-kernel", kernel, "-initrd", initramfs, "-append", cmdline]));
    // With more ports Linux learns of the console only some time after its start, and a program as quick as this one speaks
    // to nobody.
    arguments.extend(words(["-chardev", chardev, "-device", "virtio-serial-device,max_ports=1"]));
    arguments.extend(words(["-device", "virtconsole,chardev=c"]));
    arguments
}

/// A machine without Linux, which speaks through the serial port.
pub fn bare_machine(kernel: &str, chardev: &str) -> Vec<String> {
    // Where KVM is software, QEMU dies at setting the MSR of this feature.
    let mut arguments = common("isa-serial=on,acpi=off", "host,-arch-capabilities");
    arguments.extend(words(["-kernel", kernel, "-chardev", chardev, "-serial", "chardev:c"]));
    arguments.extend(words(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]));
    arguments
}

/// What such a machine has beside for a folder that virtiofsd serves at `socket`.
pub fn shared(socket: &Path, tag: &str) -> Vec<String> {
    let memory = format!("memory-backend-memfd,id=m,size={RAM_MIB}M,share=on");
    let socket = format!("socket,id=f,path={}", socket.display());
    let device = format!("vhost-user-fs-device,chardev=f,tag={tag},queue-size=1024");
    // virtiofsd ends at a device of before version 1, which is what microvm has unless told.
    let modern = "virtio-mmio.force-legacy=false";
    let mut arguments = words(["-object", &memory, "-machine", "memory-backend=m", "-global", modern]);
    arguments.extend(words(["-chardev", &socket, "-device", &device]));
    arguments
}

/// The same kernel and initramfs as vmm.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, PROGRAM);
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let mut rival = Fixed::new("QEMU microvm", program, move |life| {
        let cmdline = cmdline("console=hvc0", 't', end(life));
        linux_machine(&kernel.to_string_lossy(), &initramfs, &cmdline, STDIO)
    });
    rival.guest_ram = true;
    rival.if_possible(there.and(check))
}

/// No Linux, beside vmm's.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let (program, there) = found(setting, PROGRAM);
    let (kernel, made) = bare_kernel(setting, Ending::DebugExit);
    let mut rival = Fixed::new("QEMU microvm, no Linux: 5 instructions", program, move |life| {
        bare_machine(&kernel(life).to_string_lossy(), STDIO)
    });
    (rival.good_status, rival.marker, rival.guest_ram) = (1, vec![BARE_MARKER], true);
    rival.if_possible(there.and(made).and_then(|()| setting.kvm()))
}
