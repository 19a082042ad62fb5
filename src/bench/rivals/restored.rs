//! This program: machines that go on from a snapshot. It is made with the contender, of a guest that has started and waits.

use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::command::words;
use super::fixed::Fixed;
use super::idle::wait_for;
use super::program::{self, BARE_HELD, BARE_MARKER, HELD, HOLD, Root};
use super::vmm::{cmdline, end, kernel};
use super::{Found, Life, RAM_MIB, Setting};

/// From being saved to the first that goes on: guests wait for a jump of their clock by two seconds, or of their counter by twice 2^32.
const AGE: Duration = Duration::from_secs(10);
/// Until a guest is ready to be saved.
const LIMIT: Duration = Duration::from_secs(60);
/// What the guest without Linux has written to before it is saved.
const TOUCHED_MIB: u32 = 24;

/// The small kernel with its first program.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    let (kernel, there) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let arguments = |life| {
        let guest = cmdline("console=hvc0", 't', &format!("{HOLD}{}", end(life)));
        let initramfs = root.initramfs.to_string_lossy();
        words(["--kernel", &kernel.to_string_lossy(), "--initrd", &initramfs, "--cmdline", &guest])
    };
    let made = there.and_then(|()| saved(setting, "linux", HELD, arguments));
    restored("vmm, restored", setting, "linux").if_possible(made)
}

/// No Linux: a guest that has written to its memory, speaks and ends.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let path = |life| setting.scratch.join(format!("held-{life:?}.elf"));
    let make = |life| {
        program::bare_metal_held(life, TOUCHED_MIB).and_then(|bytes| program::write(&path(life), &bytes))
    };
    let arguments = |life| {
        let kernel = path(life);
        words([
            "--kernel",
            &kernel.to_string_lossy(),
            "--console",
            "off",
            "--serial",
            "stdio",
            "--debug-exit",
        ])
    };
    let made = setting.kvm().and_then(|()| make(Life::Once)).and_then(|()| make(Life::Idle));
    let made = made.and_then(|()| saved(setting, "bare", &[BARE_HELD], arguments));
    let mut rival = restored("vmm, restored, no Linux", setting, "bare");
    (rival.good_status, rival.marker) = (1, vec![BARE_MARKER]);
    rival.if_possible(made)
}

fn restored(name: &'static str, setting: &Setting, guest: &'static str) -> Fixed {
    let scratch = setting.scratch.clone();
    let mut rival = Fixed::new(name, setting.vmm.clone(), move |life| {
        let mut arguments = words(["restore", &folder(&scratch, guest, life).to_string_lossy()]);
        if life == Life::Idle {
            arguments.push("--dumpable".to_owned());
        }
        arguments
    });
    rival.guest_ram = true;
    rival
}

fn folder(scratch: &Path, guest: &str, life: Life) -> PathBuf {
    scratch.join(format!("{guest}-{life:?}.snap"))
}

/// Starts a guest for each life, and saves it when it has said that it is held.
fn saved(
    setting: &Setting,
    guest: &str,
    held: &[u8],
    arguments: impl Fn(Life) -> Vec<String>,
) -> Result<(), String> {
    let runtime = setting.scratch.join(format!("{guest}-runtime"));
    let made = std::fs::DirBuilder::new().mode(0o700).create(&runtime);
    made.map_err(|error| format!("make {}: {error}", runtime.display()))?;
    for life in [Life::Once, Life::Idle] {
        let vmm = || {
            let mut command = Command::new(&setting.vmm);
            command.env("XDG_RUNTIME_DIR", &runtime).stdin(Stdio::null());
            command
        };
        let mut command = vmm();
        command.args(arguments(life)).args(["--name", "held", "--mem", &format!("{RAM_MIB}M")]);
        let child = command.stdout(Stdio::piped()).spawn();
        let mut child = Saved(child.map_err(|error| format!("start {}: {error}", setting.vmm.display()))?);
        child.await_words(held)?;
        let mut create = vmm();
        create.args(["snapshot", "create", "--stop", "held"]).arg(folder(&setting.scratch, guest, life));
        let created = create.output().map_err(|error| format!("start vmm snapshot: {error}"))?;
        if !created.status.success() {
            return Err(format!("vmm snapshot create: {}", String::from_utf8_lossy(&created.stderr).trim()));
        }
    }
    thread::sleep(AGE);
    Ok(())
}

/// The one that is saved. It ends with this.
struct Saved(Child);

impl Saved {
    fn await_words(&mut self, words: &[u8]) -> Result<(), String> {
        let output = self.0.stdout.as_mut().ok_or("no pipe")?;
        let (end, mut said) = (Instant::now() + LIMIT, Vec::new());
        while !said.windows(words.len()).any(|part| part == words) {
            wait_for(output, end, "a guest that is to be saved")?;
            let mut space = [0; 4096];
            match output.read(&mut space) {
                Ok(0) => return Err(format!("it has ended: {}", String::from_utf8_lossy(&said).trim())),
                Ok(count) => said.extend_from_slice(&space[..count]),
                Err(error) => return Err(format!("read its output: {error}")),
            }
        }
        Ok(())
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
