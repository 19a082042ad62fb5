//! Every way in which Linux resets a machine, on our kernel and on Debian's: what the monitor sees of it, and
//! that the machine starts again in the monitor's hands. One monitor goes through all ways: its guest takes
//! the next at each boot, and keeps count on a disk.
//!
//! `make reboots` runs all of it and prints the table; some ways on two kernels run with every `make test`.

use std::fmt::Write;
use std::fs;
use std::process::{Command, Stdio};

use crate::guest::{Guest, available, bundle, ticking};

/// A way to end a boot, what the monitor says of it on Debian's kernels, and on ours, which has no EFI, no
/// SysRq, no kexec and no modules.
const WAYS: [(&str, &str, Option<&str>); 14] = [
    // Hardware-reduced ACPI: a kernel with CONFIG_EFI looks for EFI's reset first, and without EFI jumps to
    // the BIOS.
    ("default", I8042, Some(ACPI)),
    ("efi", I8042, Some(I8042)),
    ("bios", I8042, Some(I8042)),
    ("acpi", ACPI, Some(ACPI)),
    ("kbd", I8042, Some(I8042)),
    ("triple", TRIPLE, Some(TRIPLE)),
    ("pci", CHIPSET, Some(CHIPSET)),
    // SysRq B, from the first processor and from the second: nobody is asked, no other processor is stopped.
    ("emergency", I8042, None),
    ("emergency-triple", TRIPLE, None),
    ("elsewhere-pci", CHIPSET, None),
    ("panic", PANIC, None),
    // A panic whose driver is not there: the reboot that follows.
    ("blind", I8042, None),
    // While another processor is busy.
    ("busy", I8042, Some(ACPI)),
    // Another kernel, in the same machine, which powers off: the last.
    ("kexec", "Shutdown by acpi-pm", None),
];

const ACPI: &str = "Reset by acpi-pm";
const I8042: &str = "Reset by i8042";
const CHIPSET: &str = "Reset by reset-control";
const TRIPLE: &str = "Reset by a triple fault";
const PANIC: &str = "Panic by pvpanic";

/// Where on the second disk the second initramfs lies.
const INITRD_AT: usize = 64 << 20;

/// Goes through the `ways` with `kernel` of the bundle, and holds what the monitor said against the table.
fn reboots(kernel: &str, ways: &[&str], arguments: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let [count, second, log] = ["count", "second", "log"].map(|name| dir.path().join(name));
    fs::write(&count, [&b"0\n"[..], &[0; 4094]].concat()).unwrap();
    let (image, initrd) =
        (fs::read(bundle(&format!("{kernel}-bzImage"))).unwrap(), fs::read(bundle("tiny.cpio")).unwrap());
    let mut disk = image.clone();
    disk.resize(INITRD_AT, 0);
    disk.extend(&initrd);
    disk.resize(disk.len().next_multiple_of(4096), 0);
    fs::write(&second, disk).unwrap();

    // stty waits until all is sent that was written: what comes next does not.
    let script = format!(
        "read n </dev/vda; echo $((n+1)) >/dev/vda; sync; set -- {} off; shift $n; [ $1 = off ] && exit; echo way=$1; stty echo; r=/sys/kernel/reboot/type; \
         q=/proc/sysrq-trigger; case $1 in default) ;; emergency) echo b >$q;; emergency-*) echo ${{1#*-}} >$r; echo b >$q;; \
         elsewhere-*) echo ${{1#*-}} >$r; echo b | taskset 2 tee $q;; panic) echo c >$q;; blind) rmmod pvpanic_mmio; echo c >$q;; \
         busy) taskset 2 sh -c 'while :; do :; done' & ;; \
         kexec) head -c {} /dev/vdb >/k; dd if=/dev/vdb bs=1M skip={} 2>/dev/null | head -c {} >/i; guest-kexec /k /i 'quiet console=ttyS0'; exit;; \
         *) echo $1 >$r;; esac; reboot -f",
        ways.join(" "),
        image.len(),
        INITRD_AT >> 20,
        initrd.len(),
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(["run", "-v", "--kernel"]).arg(bundle(&format!("{kernel}-vmlinux")));
    command.arg("--initrd").arg(bundle(&format!("{kernel}.cpio")));
    command.arg("--cmdline").arg(ticking(&format!("console=ttyS0 quiet panic=-1 vmm.run=\"{script}\"")));
    command.args([
        "--mem",
        "512M",
        "--cpus",
        "2",
        "--serial",
        "stdio",
        "--console",
        "off",
        "--on-reboot",
        "reset",
    ]);
    command.arg("--disk").arg(&count).arg("--disk").arg(format!("path={},readonly", second.display()));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .env_remove("RUST_LOG");
    let guest = Guest::start(command);
    for way in ways {
        // What the kernel says may come right behind it.
        guest.wait_for(&format!("way={way}"), 1);
    }
    let ended = guest.finish();
    let log = fs::read_to_string(&log).unwrap();
    let said: Vec<_> = log
        .lines()
        .filter_map(|line| line.split_once(" info vmm_monitor::vcpu")?.1.split_once(": "))
        .map(|(_, what)| what)
        .collect();

    let mut told = String::new();
    let expected: Vec<_> = ways.iter().map(|way| expected(kernel, way)).collect();
    for (at, way) in ways.iter().enumerate() {
        let _ = writeln!(
            told,
            "| {kernel} {} | {way} | {} |",
            arguments.join(" "),
            said.get(at).unwrap_or(&"nothing")
        );
    }
    println!("\n{told}");
    let last = *ways.last().unwrap();
    assert!(ended.code == Some(0), "{:?}\n{}\n{log}", ended.code, ended.text);
    // Each way once, and nothing else: whoever starts the guest again, starts it, and nobody inside.
    for (at, expected) in expected.iter().enumerate() {
        assert!(
            said.get(at).is_some_and(|said| said.starts_with(expected)),
            "{expected}:\n{told}\n{}\n{log}",
            ended.text
        );
    }
    let off = usize::from(last != "kexec");
    let counts = (said.len() - off, ended.text.matches("way=").count());
    assert_eq!(counts, (ways.len(), ways.len()), "{told}\n{}", ended.text);
    assert_eq!(ended.text.contains("guest: init"), last == "kexec", "{}", ended.text);
    // A panic is told, with its driver or without; a reboot is none.
    let panics = ways.iter().filter(|way| ["panic", "blind"].contains(way)).count();
    assert_eq!(log.matches("the guest's kernel panicked").count(), panics, "{log}");
}

/// What the monitor says of `way` on `kernel`.
fn expected(kernel: &str, way: &str) -> &'static str {
    let (_, debians, ours) = WAYS.into_iter().find(|(name, ..)| *name == way).unwrap();
    if kernel == "tuned" { ours.unwrap() } else { debians }
}

/// All ways of `kernel`, entered directly; started by firmware, those that reach what firmware has a part in,
/// and the plain ones.
fn whole(kernel: &str) {
    if !available(&format!("reboots of {kernel}")) {
        return;
    }
    let ways = WAYS.iter().filter(|(_, _, ours)| kernel != "tuned" || ours.is_some());
    let ways: Vec<_> = ways.map(|(way, ..)| *way).collect();
    reboots(kernel, &ways, &[]);
    reboots(kernel, &["default", "bios", "acpi", "kbd", "triple", "pci"], &["--firmware"]);
}

#[test]
fn our_kernel_resets_in_every_way() {
    if available("reboots of the tuned kernel") {
        reboots("tuned", &["default", "bios", "triple", "pci"], &[]);
        reboots("tuned", &["bios", "kbd"], &["--firmware"]);
    }
}

#[test]
fn debians_kernel_resets_by_default_in_an_emergency_and_after_a_panic() {
    if available("reboots of Debian's kernel") {
        reboots("stock", &["default", "triple", "emergency", "panic", "blind", "kexec"], &[]);
    }
}

/// No initrd and no disk, as by an oversight; nothing else is said, so that the console is the virtio one and
/// the panic restarts.
#[test]
fn a_kernel_without_a_root_panics_and_the_message_says_why() {
    if !available("a panic") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .arg("--kernel")
        .arg(bundle("tuned-vmlinux"))
        .stdin(Stdio::null())
        .stderr(fs::File::create(&log).unwrap());
    let ended = Guest::start(command).finish();
    let said = fs::read_to_string(&log).unwrap();
    let words = [
        "vmm: error: the guest's kernel panicked; its console says\n",
        "Kernel panic - not syncing: VFS: Unable to mount root fs",
    ];
    assert!(
        ended.code == Some(14) && words.iter().all(|word| said.contains(word)),
        "{:?} {said}",
        ended.code
    );
}

#[test]
#[ignore = "minutes: make reboots"]
fn whole_tuned() {
    whole("tuned");
}

#[test]
#[ignore = "minutes: make reboots"]
fn whole_stock() {
    whole("stock");
}

#[test]
#[ignore = "minutes, and other kernels: make reboots"]
fn whole_cloud_6_12() {
    whole("cloud-6.12");
}

#[test]
#[ignore = "minutes, and other kernels: make reboots"]
fn whole_generic_6_1() {
    whole("generic-6.1");
}

#[test]
#[ignore = "minutes, and other kernels: make reboots"]
fn whole_generic_6_12() {
    whole("generic-6.12");
}
