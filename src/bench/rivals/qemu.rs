//! QEMU's microvm machine, as docs/system/i386/microvm.rst tunes it.

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{BARE_MARKER, Ending, Root};
use super::vmm::{bare_kernel, cmdline, end, kernel};
use super::{Found, RAM_MIB, Setting};

const PROGRAM: &str = "qemu-system-x86_64";

/// What it is given whatever the guest.
fn common(machine: &str, cpu: &str) -> Vec<String> {
    let machine = format!("microvm,accel=kvm,x-option-roms=off,pit=off,pic=off,rtc=off,{machine}");
    let mut arguments = words(["-M", &machine, "-cpu", cpu, "-smp", "1", "-m", &RAM_MIB.to_string()]);
    arguments.extend(words(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]));
    arguments
}

/// The same kernel and initramfs as vmm, through a virtio console.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, PROGRAM);
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let mut rival = Fixed::new("QEMU microvm", program, move |life| {
        // With acpi=off Linux cannot power the machine off.
        let mut arguments = common("isa-serial=off,acpi=on", "host");
        arguments.extend(words(["-kernel", &kernel.to_string_lossy(), "-initrd", &initramfs]));
        arguments.extend(words(["-append", &cmdline("console=hvc0", 't', end(life))]));
        // With more ports Linux learns of the console only some time after its start, and a program as quick as this one speaks
        // to nobody.
        arguments.extend(words(["-chardev", "stdio,id=c", "-device", "virtio-serial-device,max_ports=1"]));
        arguments.extend(words(["-device", "virtconsole,chardev=c"]));
        arguments
    });
    rival.guest_ram = true;
    rival.if_possible(there.and(check))
}

/// No Linux, beside vmm's.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let (program, there) = found(setting, PROGRAM);
    let (kernel, made) = bare_kernel(setting, Ending::DebugExit);
    // Where KVM is software, QEMU dies at setting the MSR of this feature.
    let mut rival = Fixed::new("QEMU microvm, no Linux: 5 instructions", program, move |life| {
        let kernel = kernel(life);
        let mut arguments = common("isa-serial=on,acpi=off", "host,-arch-capabilities");
        arguments.extend(words(["-kernel", &kernel.to_string_lossy(), "-serial", "stdio"]));
        arguments.extend(words(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]));
        arguments
    });
    (rival.good_status, rival.marker, rival.guest_ram) = (1, vec![BARE_MARKER], true);
    rival.if_possible(there.and(made).and_then(|()| setting.kvm()))
}
