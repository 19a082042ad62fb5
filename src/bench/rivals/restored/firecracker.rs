//! Firecracker: a process for each machine, which is asked over its API to load the snapshot, with memory mapped from its file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::super::command::{found, words};
use super::super::firecracker::SPARED;
use super::super::launch::{Found, Launch};
use super::super::program::{BY_NODE, Ending, HOLD, RESET, Root, WAIT};
use super::super::vmm::cmdline;
use super::super::{Life, RAM_MIB, Setting};
use super::client::{Arrival, http};
use super::source::Source;
use super::{Guest, Monitor, Restored, launcher, line};

/// The small kernel with its first program.
pub fn linux(setting: &Setting, root: &Root) -> Found {
    restored("Firecracker, restored", setting, Guest::linux(setting, root))
}

/// No Linux.
pub fn bare_metal(setting: &Setting, _: &Root) -> Found {
    restored("Firecracker, restored, no Linux", setting, Guest::bare(setting, Ending::Reset))
}

fn restored(name: &'static str, setting: &Setting, (guest, check): (Guest, Result<(), String>)) -> Found {
    let (program, there) = found(setting, "firecracker");
    let own = setting.scratch.join(name.replace([' ', ','], ""));
    let monitor = Firecracker { program: program.clone(), own, count: AtomicUsize::new(0) };
    launcher(Restored::found(name, &program, monitor, (guest, there.and(check)), setting))
}

struct Firecracker {
    program: PathBuf,
    /// Where each has a folder for its socket.
    own: PathBuf,
    count: AtomicUsize,
}

/// The socket in the folder of each.
const SOCKET: &str = "api";
const STATE: &str = "state";

impl Firecracker {
    /// A folder for one more.
    fn folder(&self) -> Result<PathBuf, String> {
        let folder = self.own.join(self.count.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir_all(&folder).map_err(|error| format!("make {}: {error}", folder.display()))?;
        Ok(folder)
    }

    fn arguments(socket: &Path) -> Vec<String> {
        words(["--api-sock", &socket.to_string_lossy(), "--level", "Error"])
    }

    fn load(folder: &Path) -> Value {
        json!({
            "snapshot_path": folder.join(STATE),
            "mem_backend": { "backend_type": "File", "backend_path": folder.join(Self::MEMORY) },
            "resume_vm": true,
        })
    }
}

impl Monitor for Firecracker {
    const MEMORY: &'static str = "memory";

    fn save(&self, guest: &Guest, life: Life, folder: &Path) -> Result<(), String> {
        let own = self.folder()?;
        let end = if life == Life::Idle { WAIT } else { RESET };
        let mut boot = json!({
            "kernel_image_path": guest.kernel(life)?,
            "boot_args": cmdline(SPARED, 'k', &format!("{HOLD}{BY_NODE}{end}")),
        });
        if let Guest::Linux { initramfs, .. } = guest {
            boot["initrd_path"] = json!(initramfs);
        }
        let config = json!({
            "boot-source": boot,
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": RAM_MIB },
        });
        let (file, socket) = (own.join("config"), own.join(SOCKET));
        fs::write(&file, config.to_string()).map_err(|error| format!("write {}: {error}", file.display()))?;
        let mut command = Command::new(&self.program);
        command.args(Self::arguments(&socket)).arg("--config-file").arg(file);
        let _source = Source::start(command, guest.held())?;
        http(&socket, "PATCH", "/vm", Some(&json!({ "state": "Paused" })))?;
        let to = json!({ "snapshot_path": folder.join(STATE), "mem_file_path": folder.join(Self::MEMORY) });
        http(&socket, "PUT", "/snapshot/create", Some(&to))
    }

    fn launches(&self, _: Life, folder: &Path, count: usize) -> Result<Vec<Launch>, String> {
        // Of those of an earlier sample nobody is left.
        let _ = fs::remove_dir_all(&self.own);
        let launches = (0..count).map(|_| {
            let own = self.folder()?;
            let (arrival, socket, load) = (Arrival::into(&own)?, own.join(SOCKET), Self::load(folder));
            let mut command = Command::new(&self.program);
            command.args(Self::arguments(&socket));
            let request = Box::new(move || {
                arrival.wait()?;
                http(&socket, "PUT", "/snapshot/load", Some(&load))
            });
            Ok(Launch { request: Some(request), ..Launch::of(command) })
        });
        launches.collect()
    }

    fn shown(&self, folder: &Path) -> String {
        let command = line(&self.program, &Self::arguments(&self.own.join("0").join(SOCKET)));
        format!("{command}; PUT /snapshot/load {}", Self::load(folder))
    }
}
