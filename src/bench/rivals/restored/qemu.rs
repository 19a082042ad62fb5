//! QEMU's microvm, by migration into a file and out of it: the form that every version has, a stream of pages on a descriptor.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;

use super::super::command::{found, words};
use super::super::launch::{Found, Launch};
use super::super::program::{Ending, HOLD, Root};
use super::super::qemu::{PROGRAM, STDOUT, bare_machine, linux_machine};
use super::super::vmm::{cmdline, end};
use super::super::{Life, Setting};
use super::client::Qmp;
use super::source::{LIMIT, Source};
use super::{Guest, Monitor, Restored, launcher, line};

/// The small kernel with its first program.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    restored("QEMU microvm, restored", setting, Guest::linux(setting, root))
}

/// No Linux.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    restored("QEMU microvm, restored, no Linux", setting, Guest::bare(setting, Ending::DebugExit))
}

fn restored(name: &'static str, setting: &Setting, (guest, check): (Guest, Result<(), String>)) -> Found {
    let (program, there) = found(setting, PROGRAM);
    let monitor = Qemu { program: program.clone(), guest: guest.clone() };
    launcher(Restored::found(name, &program, monitor, (guest, there.and(check)), setting))
}

struct Qemu {
    program: PathBuf,
    guest: Guest,
}

impl Qemu {
    /// The machine that is saved, and the one that goes on: QEMU wants both alike, kernel and all.
    fn machine(&self, guest: &Guest, life: Life) -> Result<Vec<String>, String> {
        let kernel = guest.kernel(life)?;
        Ok(match guest {
            Guest::Bare { .. } => bare_machine(&kernel, STDOUT),
            Guest::Linux { initramfs, .. } => {
                let line = cmdline("console=hvc0", 't', &format!("{HOLD}{}", end(life)));
                linux_machine(&kernel, &initramfs.to_string_lossy(), &line, STDOUT)
            }
        })
    }

    /// The stream is its standard input, of which the guest sees nothing.
    fn arguments(&self, life: Life) -> Result<Vec<String>, String> {
        let mut arguments = self.machine(&self.guest, life)?;
        arguments.extend(words(["-incoming", "fd:0"]));
        Ok(arguments)
    }
}

impl Monitor for Qemu {
    const MEMORY: &'static str = "stream";

    fn save(&self, guest: &Guest, life: Life, folder: &Path) -> Result<(), String> {
        let socket = folder.join("qmp");
        let mut command = Command::new(&self.program);
        command.args(self.machine(guest, life)?);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        let _source = Source::start(command, guest.held())?;
        let mut qmp = Qmp::connect(&socket)?;
        let file = folder.join(Self::MEMORY);
        qmp.ask("migrate", json!({ "uri": format!("exec:cat >'{}'", file.display()) }))?;
        let end = Instant::now() + LIMIT;
        loop {
            let about = qmp.ask("query-migrate", json!({}))?;
            match about["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(format!("its migration failed: {about}")),
                _ if Instant::now() > end => return Err("its migration takes too long".to_owned()),
                _ => sleep(Duration::from_millis(20)),
            }
        }
    }

    fn launches(&self, life: Life, folder: &Path, count: usize) -> Result<Vec<Launch>, String> {
        let arguments = self.arguments(life)?;
        let launch = |_| {
            let file = folder.join(Self::MEMORY);
            let stream = File::open(&file).map_err(|error| format!("open {}: {error}", file.display()))?;
            let mut command = Command::new(&self.program);
            command.args(&arguments);
            Ok(Launch { input: Some(Stdio::from(stream)), ..Launch::of(command) })
        };
        (0..count).map(launch).collect()
    }

    fn shown(&self, folder: &Path) -> String {
        let arguments = self.arguments(Life::Once).unwrap_or_default();
        format!("{} <{}", line(&self.program, &arguments), folder.join(Self::MEMORY).display())
    }
}
