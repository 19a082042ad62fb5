//! Copies of a running Linux: each goes on from the same moment, alone.

use crate::guest::{Guest, Kernel, available, vmm};
use crate::snapshot::{exec, number, well};

/// Kills what runs in the background, however the test ends: its process is no child of the test.
struct Background<'a>(&'a Guest, Vec<String>);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        let names = self.1.iter().map(String::as_str);
        self.0.control(&["kill"].into_iter().chain(names).collect::<Vec<_>>());
    }
}

#[test]
fn copies_of_a_linux_with_two_cpus_go_on_alone_and_so_do_copies_of_copies() {
    if !available("copies_of_a_linux_with_two_cpus_go_on_alone_and_so_do_copies_of_copies") {
        return;
    }
    let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do echo x >>/tmp/ticks; sleep 0.1; done");
    command.args(["--name", "g", "--vsock", "--rng", "--net", "user", "--cpus", "2", "--transport", "pci"]);
    let parent = Guest::start(command);
    let state = parent.runtime().join("state");
    parent.wait_for("up", 1);
    let nonce = exec(
        &parent,
        "g",
        "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ping -c 1 -W 10 10.0.2.2 >/dev/null; \
         cat /proc/sys/kernel/random/uuid | tee /tmp/nonce",
    );
    let ticks = number(&exec(&parent, "g", "wc -l </tmp/ticks"));
    let fork = |arguments: &[&str]| {
        let output = parent.command(arguments).env("XDG_STATE_HOME", &state).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let children = Background(&parent, fork(&["fork", "g", "--count", "2"]));
    assert_eq!(children.1, ["g-1", "g-2"]);
    let grandchild = Background(&parent, fork(&["fork", "g-1"]));
    let all = || children.1.iter().chain(&grandchild.1).map(String::as_str).chain(["g"]);
    for name in all() {
        // Each has its own memory from then on.
        let script = format!("cat /tmp/nonce; echo {name} >/tmp/nonce; ping -c 1 -W 10 10.0.2.2 >/dev/null");
        assert_eq!(exec(&parent, name, &script), nonce, "the same run");
    }
    for name in all() {
        let told = exec(&parent, name, "cat /tmp/nonce; wc -l </tmp/ticks; sleep 1; wc -l </tmp/ticks");
        let told: Vec<_> = told.lines().collect();
        let (then, later) = (number(told[1]), number(told[2]));
        assert!(told[0] == name && then >= ticks && later > then, "{name}: {ticks}, {told:?}");
        well(&parent, name);
    }
}
