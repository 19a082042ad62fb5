//! Cloud Hypervisor, which can fetch a page of its guest's memory when that is touched first (userfaultfd).

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::super::command::{found, words};
use super::super::launch::{Found, Launch};
use super::super::program::{BY_NODE, Ending, HOLD, Root};
use super::super::vmm::{cmdline, end};
use super::super::{Life, RAM_MIB, Setting};
use super::client::http;
use super::source::Source;
use super::{Guest, Monitor, Restored, launcher, line};

/// The small kernel with its first program.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    restored("Cloud Hypervisor, restored", setting, Guest::linux(setting, root))
}

/// No Linux.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    restored("Cloud Hypervisor, restored, no Linux", setting, Guest::bare(setting, Ending::SleepControl))
}

fn restored(name: &'static str, setting: &Setting, (guest, check): (Guest, Result<(), String>)) -> Found {
    let (program, there) = found(setting, "cloud-hypervisor");
    let monitor = CloudHypervisor { program: program.clone() };
    launcher(Restored::found(name, &program, monitor, (guest, there.and(check)), setting))
}

struct CloudHypervisor {
    program: PathBuf,
}

impl CloudHypervisor {
    fn arguments(folder: &Path) -> Vec<String> {
        let from = format!("source_url=file://{},memory_restore_mode=ondemand,resume=true", folder.display());
        words(["--restore", &from])
    }
}

impl Monitor for CloudHypervisor {
    const MEMORY: &'static str = "memory-ranges";

    fn save(&self, guest: &Guest, life: Life, folder: &Path) -> Result<(), String> {
        let socket = folder.with_extension("api");
        let mut command = Command::new(&self.program);
        command.arg("--api-socket").arg(&socket).args(["--kernel", &guest.kernel(life)?]);
        command.args(["--cpus", "boot=1", "--memory", &format!("size={RAM_MIB}M")]);
        command.args(["--console", "off", "--serial", "tty"]);
        if let Guest::Linux { initramfs, .. } = guest {
            let words = cmdline("8250.nr_uarts=0", 't', &format!("{HOLD}{BY_NODE}{}", end(life)));
            command.arg("--initramfs").arg(initramfs).args(["--cmdline", &words]);
        }
        let _source = Source::start(command, guest.held())?;
        http(&socket, "PUT", "/api/v1/vm.pause", None)?;
        let to = json!({ "destination_url": format!("file://{}", folder.display()) });
        http(&socket, "PUT", "/api/v1/vm.snapshot", Some(&to))
    }

    fn launches(&self, _: Life, folder: &Path, count: usize) -> Result<Vec<Launch>, String> {
        let launch = |_| {
            let mut command = Command::new(&self.program);
            command.args(Self::arguments(folder));
            Launch::of(command)
        };
        Ok((0..count).map(launch).collect())
    }

    fn shown(&self, folder: &Path) -> String {
        line(&self.program, &Self::arguments(folder))
    }
}
