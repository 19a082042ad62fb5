//! `vmm exec` and `podman exec` by the same commands: what scripts that use the one expect of the other.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::Guest;
use crate::place::*;

/// A container with busybox, of a folder: nothing is fetched.
struct Container {
    name: String,
    podman: &'static [&'static str],
}

/// How podman is called: as it is set up, or so that it runs in a container, too.
const WAYS: [&[&str]; 2] = [&[], &["--runtime", "/usr/sbin/runc", "--cgroup-manager", "cgroupfs"]];

impl Container {
    fn start(root: &Path) -> Result<Self, String> {
        let mut why = String::new();
        for podman in WAYS {
            let container = Self { name: format!("vmm-test-{}", std::process::id()), podman };
            let mut command = container.command(&["run", "-d", "--rm", "--network", "none", "--name"]);
            command.arg(&container.name).args([
                "--ulimit",
                "nofile=1024:1024",
                "--ulimit",
                "nproc=1024:1024",
            ]);
            command.arg("--rootfs").arg(root).args(["/bin/sleep", "1000"]);
            match command.output() {
                Ok(output) if output.status.success() => return Ok(container),
                Ok(output) => why = text(&output.stderr),
                Err(error) => why = error.to_string(),
            }
        }
        Err(why)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        // What runs these tests may have had them ignore signals.
        let mut command = Command::new("env");
        command.args(["--default-signal", "podman"]).args(self.podman).args(arguments).stdin(Stdio::null());
        command
    }

    fn exec(&self, arguments: &[&str]) -> Output {
        self.command(&["exec", &self.name]).args(arguments).output().unwrap()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.command(&["rm", "-f", "-t", "0", &self.name]).output();
    }
}

#[test]
fn codes_and_output_are_those_of_podman() {
    let guest = Guest::new();
    let root = guest.place.path("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    for folder in ["dev", "proc", "sys", "tmp", "etc", "run"] {
        std::fs::create_dir(root.join(folder)).unwrap();
    }
    std::fs::copy(guest::programs::busybox().unwrap(), root.join("bin/busybox")).unwrap();
    for name in ["sh", "sleep", "true", "false", "cat", "printf"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("bin/locked"), "#!/bin/sh\n").unwrap();
    let container = match Container::start(&root) {
        Ok(container) => container,
        Err(why) => {
            return eprintln!(
                "SKIP: codes_and_output_are_those_of_podman: no podman that runs here: {}",
                why.trim()
            );
        }
    };
    let mut commands: Vec<Vec<String>> = ["true", "false", "nosuchprogram", "/no/such/program", "/etc"]
        .map(|program| vec![program.to_owned()])
        .into();
    let mut scripts = vec![
        "echo out; echo err >&2".to_owned(),
        "exit 255".to_owned(),
        "exit 256".to_owned(),
        "cat".to_owned(),
        "printf 'a\\000b\\377'".to_owned(),
        "nosuchprogram".to_owned(),
        "sh -c 'kill -9 $$'".to_owned(),
    ];
    // Each signal that ends a process, but SIGSTOP and its like.
    scripts.extend(
        [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 31].map(|signal| format!("kill -{signal} $$")),
    );
    commands.extend(scripts.into_iter().map(|script| vec!["sh".to_owned(), "-c".to_owned(), script]));
    for command in &commands {
        let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        let theirs = container.exec(&arguments);
        // The same shell and programs: shells differ in which signals they heed.
        let path = format!("PATH={}", root.join("bin").display());
        let mut ours = guest.command("exec -e");
        let ours = finish(ours.arg(path).arg("web").args(&arguments).spawn().unwrap());
        assert_eq!(ours.status.code(), theirs.status.code(), "{command:?}: {}", text(&theirs.stderr));
        assert_eq!(ours.stdout, theirs.stdout, "{command:?}");
    }
    let ours = finish(guest.command("exec web").arg(root.join("bin/locked")).spawn().unwrap());
    assert_eq!(ours.status.code(), container.exec(&["/bin/locked"]).status.code(), "no permission");
}
