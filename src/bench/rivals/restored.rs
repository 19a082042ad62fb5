//! This program: machines that go on from a snapshot. It is made before the first sample, of a guest that has started and waits.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::command::words;
use super::fixed::Fixed;
use super::idle::wait_for;
use super::program::{self, BARE_HELD, BARE_MARKER, HELD, HOLD, Root};
use super::vmm::{cmdline, end, kernel, weighed};
use super::{Found, Life, RAM_MIB, Rival, Setting};
use crate::measure::{Absent, INTERRUPTED};

/// From being saved to the first that goes on: guests wait for a jump of their clock by two seconds, or of their counter by twice 2^32.
const AGE: Duration = Duration::from_secs(10);
/// How soon Ctrl-C is seen.
const GLANCE: Duration = Duration::from_millis(50);
/// Until a guest is ready to be saved.
const LIMIT: Duration = Duration::from_secs(60);
/// What the guest without Linux has written to before it is saved.
const TOUCHED_MIB: u32 = 24;

/// The small kernel with its first program.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    let (kernel, there) = kernel(setting.tuned_kernel(), "tuned-vmlinux");
    let initramfs = root.initramfs.clone();
    let start = move |life| {
        let guest = cmdline("console=hvc0", 't', &format!("{HOLD}{}", end(life)));
        let (kernel, initramfs) = (kernel.to_string_lossy(), initramfs.to_string_lossy());
        Ok(words(["--kernel", &kernel, "--initrd", &initramfs, "--cmdline", &guest]))
    };
    Restored::found("vmm, restored", setting, HELD, start, there)
}

/// No Linux: a guest that has written to its memory, speaks and ends.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    let scratch = setting.scratch.clone();
    let start = move |life| {
        let kernel = scratch.join("held.elf");
        program::write(&kernel, &program::bare_metal_held(life, TOUCHED_MIB)?)?;
        let kernel = kernel.to_string_lossy();
        Ok(words(["--kernel", &kernel, "--console", "off", "--serial", "stdio", "--debug-exit"]))
    };
    Restored::found("vmm, restored, no Linux", setting, &[BARE_HELD], start, setting.kvm())
}

/// One that goes on from a snapshot for each life.
struct Restored {
    fixed: Fixed,
    setting: Setting,
    /// What the guest says when it can be saved.
    held: &'static [u8],
    /// The options that start the guest to be saved.
    start: Box<dyn Fn(Life) -> Result<Vec<String>, String>>,
    /// Of those that are made: when they are old enough.
    made: Vec<(Life, Instant)>,
}

impl Restored {
    fn found(
        name: &'static str,
        setting: &Setting,
        held: &'static [u8],
        start: impl Fn(Life) -> Result<Vec<String>, String> + 'static,
        check: Result<(), String>,
    ) -> Found {
        let scratch = setting.scratch.clone();
        let mut fixed = Fixed::new(name, setting.vmm.clone(), move |life| {
            let mut arguments = words(["restore", &folder(&scratch, name, life).to_string_lossy()]);
            arguments.extend(weighed(life));
            arguments
        });
        fixed.guest_ram = true;
        if held == [BARE_HELD] {
            (fixed.good_status, fixed.marker) = (1, vec![BARE_MARKER]);
        }
        match check {
            Ok(()) => {
                let (setting, start) = (setting.clone(), Box::new(start));
                Ok(Box::new(Self { fixed, setting, held, start, made: Vec::new() }))
            }
            Err(why) => Err(Absent { name: name.to_owned(), command: fixed.shown(), why }),
        }
    }
}

impl Rival for Restored {
    fn name(&self) -> &str {
        self.fixed.name()
    }

    fn shown(&self) -> String {
        self.fixed.shown()
    }

    fn version(&self) -> Option<String> {
        self.fixed.version()
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        if !self.made.iter().any(|(made, _)| *made == life) {
            let to = folder(&self.setting.scratch, self.fixed.name, life);
            save(&self.setting, (self.start)(life)?, self.held, &to)?;
            self.made.push((life, Instant::now() + AGE));
        }
        let due = self.made.iter().find(|(made, _)| *made == life).map(|(_, due)| *due);
        while due.is_some_and(|due| Instant::now() < due) {
            if INTERRUPTED.load(Ordering::SeqCst) {
                return Err("interrupted".to_owned());
            }
            thread::sleep(GLANCE);
        }
        self.fixed.command(life)
    }

    fn marker(&self) -> &[u8] {
        self.fixed.marker()
    }

    fn good_status(&self) -> i32 {
        self.fixed.good_status()
    }

    fn guest_ram(&self) -> bool {
        self.fixed.guest_ram()
    }

    fn limit(&self) -> Duration {
        self.fixed.limit()
    }
}

fn folder(scratch: &Path, name: &str, life: Life) -> PathBuf {
    scratch.join(format!("{}-{life:?}.snap", name.replace([' ', ','], "")))
}

/// Starts the guest that `arguments` tell of, and saves it in the folder `to` when it says that it is `held`.
fn save(setting: &Setting, arguments: Vec<String>, held: &[u8], to: &Path) -> Result<(), String> {
    let runtime = setting.scratch.join("held-runtime");
    match std::fs::DirBuilder::new().mode(0o700).create(&runtime) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(format!("make {}: {error}", runtime.display()));
        }
        _ => {}
    }
    let vmm = || {
        let mut command = Command::new(&setting.vmm);
        command.env("XDG_RUNTIME_DIR", &runtime).stdin(Stdio::null());
        command
    };
    let mut command = vmm();
    command.args(arguments).args(["--name", "held", "--mem", &format!("{RAM_MIB}M")]);
    let child = command.stdout(Stdio::piped()).spawn();
    let mut child = Saved(child.map_err(|error| format!("start {}: {error}", setting.vmm.display()))?);
    child.await_words(held)?;
    let created = vmm().args(["snapshot", "create", "--stop", "held"]).arg(to).output();
    let created = created.map_err(|error| format!("start vmm snapshot: {error}"))?;
    match created.status.success() {
        true => Ok(()),
        false => Err(format!("vmm snapshot create: {}", String::from_utf8_lossy(&created.stderr).trim())),
    }
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
