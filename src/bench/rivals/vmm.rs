//! This program: cold boots of Linux, and of a guest that runs wherever KVM opens.

use std::path::{Path, PathBuf};

use super::command::words;
use super::fixed::Fixed;
use super::program::{self, BARE_MARKER, Ending, POWER_OFF, Root, WAIT};
use super::{Found, Life, RAM_MIB, Setting};

/// The kernel command line of every Linux guest. `quiet`: printing costs more than anything else in such a boot. `panic=-1`: a
/// failure ends it at once.
pub fn cmdline(console: &str, reboot: char, words: &str) -> String {
    format!("{console} quiet reboot={reboot} panic=-1 -- {words}")
}

/// What the program is told as PID 1 of a guest that can power itself off.
pub fn end(life: Life) -> &'static str {
    match life {
        Life::Once => POWER_OFF,
        Life::Idle => WAIT,
    }
}

/// The small kernel.
pub fn tuned(setting: &Setting, root: &Root) -> Found {
    let (kernel, check) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    linux("vmm", setting, root, kernel, &[], "console=hvc0").if_possible(check)
}

/// A distribution's kernel. Its virtio drivers are modules, which the root file system of this comparison has no room for: it
/// speaks through the serial port.
pub fn stock(setting: &Setting, root: &Root) -> Found {
    let (kernel, check) = kernel(setting.stock_kernel(), "stock-bzImage");
    let console = ["--console", "off", "--serial", "stdio"];
    linux("vmm, stock kernel", setting, root, kernel, &console, "console=ttyS0").if_possible(check)
}

/// The kernel, or its name and why it is not there.
pub fn kernel(kernel: Result<&Path, String>, name: &str) -> (PathBuf, Result<(), String>) {
    match kernel {
        Ok(path) => (path.to_owned(), Ok(())),
        Err(why) => (name.into(), Err(why)),
    }
}

fn linux(
    name: &'static str,
    setting: &Setting,
    root: &Root,
    kernel: PathBuf,
    console: &[&str],
    word: &'static str,
) -> Fixed {
    let initramfs = root.initramfs.to_string_lossy().into_owned();
    let console: Vec<String> = console.iter().map(|word| (*word).to_owned()).collect();
    let mut rival = Fixed::new(name, setting.vmm.clone(), move |life| {
        let mut arguments = words(["--kernel", &kernel.to_string_lossy(), "--initrd", &initramfs]);
        arguments.extend(words(["--mem", &format!("{RAM_MIB}M")]));
        arguments.extend(console.clone());
        arguments.extend(weighed(life));
        arguments.extend(words(["--cmdline", &cmdline(word, 't', end(life))]));
        arguments
    });
    rival.guest_ram = true;
    rival
}

/// No Linux: the monitor alone, with a guest that does nothing but speak and end, or sleep.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let (kernel, made) = bare_kernel(setting, Ending::DebugExit);
    let mut rival = Fixed::new("vmm, no Linux: 5 instructions", setting.vmm.clone(), move |life| {
        let kernel = kernel(life);
        let mut arguments = words(["--kernel", &kernel.to_string_lossy(), "--mem", &format!("{RAM_MIB}M")]);
        arguments.extend(words(["--console", "off", "--serial", "stdio", "--debug-exit"]));
        arguments.extend(weighed(life));
        arguments
    });
    (rival.good_status, rival.marker, rival.guest_ram) = (1, vec![BARE_MARKER], true);
    rival.if_possible(made.and_then(|()| setting.kvm()))
}

/// What idles is weighed from outside (smaps), which is for root alone unless the monitor allows it.
pub fn weighed(life: Life) -> Vec<String> {
    match life {
        Life::Once => Vec::new(),
        Life::Idle => words(["--dumpable"]),
    }
}

/// The file of that guest for each life, and whether both could be made.
pub fn bare_kernel(
    setting: &Setting,
    ending: Ending,
) -> (impl Fn(Life) -> PathBuf + 'static, Result<(), String>) {
    let scratch = setting.scratch.clone();
    let path = move |life| scratch.join(ending.file(life, "bare-metal"));
    let make = |life| program::bare_metal(life, ending).and_then(|bytes| program::write(&path(life), &bytes));
    let made = make(Life::Once).and_then(|()| make(Life::Idle));
    (path, made)
}
