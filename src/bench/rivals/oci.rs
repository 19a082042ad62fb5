//! crun and runc: a bundle with the least that the OCI runtime specification asks for, and no cgroup where it can be left out.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use super::command::{found, words};
use super::container::{Container, Maker};
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Setting};

/// crun, which can do without cgroups.
pub fn crun(setting: &Setting, root: &Root) -> Found {
    make("crun", WITHOUT_CGROUPS, Dev::OfRoot, setting, root)
}

/// runc, which cannot.
pub fn runc(setting: &Setting, root: &Root) -> Found {
    make("runc", &[], Dev::OfRoot, setting, root)
}

/// crun for many at once.
pub fn many_by_crun(setting: &Setting, root: &Root) -> Found {
    make("crun", WITHOUT_CGROUPS, Dev::OfEach, setting, root)
}

/// runc for many at once.
pub fn many_by_runc(setting: &Setting, root: &Root) -> Found {
    make("runc", &[], Dev::OfEach, setting, root)
}

const WITHOUT_CGROUPS: &[&str] = &["--cgroup-manager=disabled"];

/// Where a container's device nodes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dev {
    /// In the root file system that all share, once.
    OfRoot,
    /// In a tmpfs of its own: of those that start at the same time, one would find what another is making.
    OfEach,
}

struct Runtime {
    options: Vec<String>,
    /// Where it keeps what it knows of its containers.
    state: PathBuf,
    /// The bundles.
    once: PathBuf,
    idle: PathBuf,
}

fn make(name: &'static str, options: &[&str], dev: Dev, setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, name);
    let folder = setting.scratch.join(name);
    let state = folder.join("state");
    let mut all = words(["--root", &state.to_string_lossy()]);
    all.extend(options.iter().map(|option| (*option).to_owned()));
    let runtime = Runtime { options: all, state, once: folder.join("once"), idle: folder.join("idle") };
    Container::made(name, program, runtime, |runtime, _| {
        there?;
        bundle(&runtime.once, root, dev, &[INIT])?;
        bundle(&runtime.idle, root, dev, &[INIT, WAIT])
    })
}

fn bundle(folder: &PathBuf, root: &Root, dev: Dev, arguments: &[&str]) -> Result<(), String> {
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
    let mut mounts = vec![json!({ "destination": "/proc", "type": "proc", "source": "proc" })];
    if dev == Dev::OfEach {
        let options = ["nosuid", "strictatime", "mode=755", "size=64k"];
        mounts.push(json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": options }));
    }
    let config = json!({
        "ociVersion": "1.0.0",
        "process": { "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": arguments, "cwd": "/" },
        "root": { "path": root.folder, "readonly": true },
        "mounts": mounts,
        "linux": linux,
    });
    let file = folder.join("config.json");
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&file, config.to_string()))
        .map_err(|error| format!("write {}: {error}", file.display()))
}

impl Maker for Runtime {
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

    fn tidy(&self) -> Vec<Vec<String>> {
        let left = fs::read_dir(&self.state).into_iter().flatten().flatten();
        let delete = |name: std::ffi::OsString| {
            let mut arguments = self.options.clone();
            arguments.extend(words(["delete", "--force", &name.to_string_lossy()]));
            arguments
        };
        left.map(|entry| delete(entry.file_name())).collect()
    }
}
