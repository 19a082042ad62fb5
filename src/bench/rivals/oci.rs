//! crun and runc: a bundle with the least that the OCI runtime specification asks for, and no cgroup where it can be left out.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use super::command::{found, prepare, shown, version, words};
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Rival, Setting};
use crate::bench::measure::Absent;

/// crun, which can do without cgroups.
pub fn crun(setting: &Setting, root: &Root) -> Found {
    make("crun", &["--cgroup-manager=disabled"], setting, root)
}

/// runc, which cannot.
pub fn runc(setting: &Setting, root: &Root) -> Found {
    make("runc", &[], setting, root)
}

struct Runtime {
    name: &'static str,
    program: PathBuf,
    options: Vec<String>,
    /// Where it keeps what it knows of its containers.
    state: PathBuf,
    /// The bundles.
    once: PathBuf,
    idle: PathBuf,
    count: usize,
}

fn make(name: &'static str, options: &[&str], setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, name);
    let folder = setting.scratch.join(name);
    let state = folder.join("state");
    let mut all = words(["--root", &state.to_string_lossy()]);
    all.extend(options.iter().map(|option| (*option).to_owned()));
    let (once, idle) = (folder.join("once"), folder.join("idle"));
    let runtime = Runtime { name, program, options: all, state, once, idle, count: 0 };
    let made = there
        .and_then(|()| bundle(&runtime.once, root, &[INIT]))
        .and_then(|()| bundle(&runtime.idle, root, &[INIT, WAIT]));
    match made {
        Ok(()) => Ok(Box::new(runtime)),
        Err(why) => Err(Absent { name: name.to_owned(), command: runtime.shown(), why }),
    }
}

fn bundle(folder: &PathBuf, root: &Root, arguments: &[&str]) -> Result<(), String> {
    let mut namespaces: Vec<_> = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
        .into_iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    let mut linux = json!({});
    let user = rustix::process::geteuid();
    if !user.is_root() {
        namespaces.push(json!({ "type": "user" }));
        let group = rustix::process::getegid();
        linux["uidMappings"] = json!([{ "containerID": 0, "hostID": user.as_raw(), "size": 1 }]);
        linux["gidMappings"] = json!([{ "containerID": 0, "hostID": group.as_raw(), "size": 1 }]);
    }
    linux["namespaces"] = json!(namespaces);
    let config = json!({
        "ociVersion": "1.0.0",
        "process": { "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": arguments, "cwd": "/" },
        "root": { "path": root.folder, "readonly": true },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": linux,
    });
    let file = folder.join("config.json");
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&file, config.to_string()))
        .map_err(|error| format!("write {}: {error}", file.display()))
}

impl Runtime {
    fn arguments(&self, life: Life, name: &str) -> Vec<String> {
        let mut arguments = self.options.clone();
        arguments.push("run".to_owned());
        let bundle = if life == Life::Idle {
            arguments.push("--detach".to_owned());
            &self.idle
        } else {
            &self.once
        };
        arguments.extend(words(["--bundle", &bundle.to_string_lossy(), name]));
        arguments
    }
}

impl Rival for Runtime {
    fn name(&self) -> &str {
        self.name
    }

    fn shown(&self) -> String {
        shown(self.program.as_os_str(), &self.arguments(Life::Once, "ID"))
    }

    fn version(&self) -> Option<String> {
        version(&self.program, &["--version"])
    }

    fn command(&mut self, life: Life) -> Result<Command, String> {
        self.count += 1;
        let name = format!("vmm-bench-{}-{}", std::process::id(), self.count);
        let mut command = Command::new(&self.program);
        command.args(self.arguments(life, &name));
        Ok(command)
    }

    fn detaches(&self) -> bool {
        true
    }

    fn tidy(&mut self) {
        for entry in fs::read_dir(&self.state).into_iter().flatten().flatten() {
            let mut command = Command::new(&self.program);
            command.args(&self.options).args(["delete", "--force"]).arg(entry.file_name());
            if let Err(why) = prepare(command) {
                log::warn!("a container of {} is left: {why}", self.name);
            }
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // What was interrupted.
        self.tidy();
    }
}
