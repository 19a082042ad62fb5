//! The agent where it belongs: in a guest, reached over its socket device. What it does with commands is tested by tests/cli/agent.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use vmm_agent::client::{self, Patience, Session, dial};
use vmm_agent::protocol::{PORT, Reason, Request};

use crate::guest::{Guest, Kernel, available, bundle, copy_of_disk, vmm};

fn start(kernel: Kernel) -> Guest {
    let mut command = vmm(kernel, "echo up; while :; do sleep 1; done");
    command.args(["--name", "web", "--vsock", "--rng", "--net", "user"]);
    let guest = Guest::start(command);
    guest.wait_for("up", 1);
    guest
}

fn works(kernel: Kernel) {
    let guest = start(kernel);
    let (code, said) = guest.control(&["exec", "web", "sh", "-c", "uname -s; id -u; tty; hostname; exit 42"]);
    assert_eq!((code, &*said), (Some(42), "Linux\n0\nnot a tty\nguest\n"));
    assert_eq!(guest.control(&["exec", "web", "nosuch"]).0, Some(127));
    assert_eq!(guest.control(&["exec", "web", "sh", "-c", "kill -9 $$"]).0, Some(137));
    let (code, said) = guest.control(&["exec", "-t", "web", "stty", "size"]);
    assert_eq!((code, &*said), (Some(0), "24 80\r\n"));

    // Binary, both ways, and more than any window.
    let bytes: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
    let mut command = guest.command(&["exec", "-i", "web", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), bytes.clone());
    let writer = thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());

    // Several at once.
    let all: Vec<_> = (0..20)
        .map(|number| {
            let number = number.to_string();
            let mut command =
                guest.command(&["exec", "web", "sh", "-c", &format!("sleep 0.3; echo {number}")]);
            (number, command.stdout(Stdio::piped()).spawn().unwrap())
        })
        .collect();
    for (number, child) in all {
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{number}\n"));
    }
    // Files, there and back.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, &bytes).unwrap();
    let (file, back) = (file.to_str().unwrap(), dir.path().join("back"));
    assert_eq!(guest.control(&["cp", file, "web:/tmp"]).0, Some(0));
    assert_eq!(guest.control(&["cp", "web:/tmp/file", back.to_str().unwrap()]).0, Some(0));
    assert!(std::fs::read(back).unwrap() == bytes);

    // A server in it, without a network.
    let script = "echo through | nc -l -p 4711 >/tmp/got & sleep 1000";
    let mut server = guest.command(&["exec", "web", "sh", "-c", script]).spawn().unwrap();
    let (mut said, end) = (String::new(), Instant::now() + Duration::from_secs(60));
    while said.is_empty() {
        assert!(Instant::now() < end, "no server");
        said = guest.control(&["ssh-proxy", "web", "4711"]).1;
    }
    assert_eq!(said, "through\n");
    server.kill().unwrap();
    server.wait().unwrap();

    no_part_is_left(&guest);
    orders(&guest);
    comes_back(&guest);
    // PID 1 reaps what they left.
    let left = "sleep 0.2 & exit 0";
    assert_eq!(guest.control(&["exec", "web", "sh", "-c", left]).0, Some(0));
    let zombies = "sleep 0.5; grep -l '^State:.*zombie' /proc/[0-9]*/status | wc -l";
    assert_eq!(guest.control(&["exec", "web", "sh", "-c", zombies]).1, "0\n");
    assert_eq!(guest.control(&["kill", "web"]).0, Some(0));
}

/// A copy that is interrupted leaves nothing: here in the file system of the build folder, which has files without a name or, like the
/// rig's, has none.
fn no_part_is_left(guest: &Guest) {
    let make = "head -c 48000000 /dev/urandom >/tmp/big";
    assert_eq!(guest.control(&["exec", "web", "sh", "-c", make]).0, Some(0));
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let names = || -> Vec<_> {
        std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect()
    };
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut copy = guest.command(&["cp", "web:/tmp/big", dir.path().to_str().unwrap()]).spawn().unwrap();
        let mut runs = true;
        while names().is_empty() && runs {
            runs = copy.try_wait().unwrap().is_none();
            thread::yield_now();
        }
        if runs {
            kill_process(Pid::from_child(&copy), signal).unwrap();
        }
        match copy.wait().unwrap().code() {
            // It was whole before.
            Some(0) => std::fs::remove_file(dir.path().join("big")).unwrap(),
            code => assert_eq!(code, Some(128 + signal.as_raw())),
        }
        assert!(names().is_empty(), "{:?}", names());
    }
    assert_eq!(guest.control(&["exec", "web", "rm", "/tmp/big"]).0, Some(0));
}

/// An agent that is killed is not the guest's last.
fn comes_back(guest: &Guest) {
    let agent = |options: &[&str], script: &str| {
        guest.control(&[&["exec"], options, &["web", "sh", "-c", script]].concat())
    };
    let pid = || agent(&["--timeout", "60"], "echo $PPID").1;
    for _ in 0..3 {
        let before = pid();
        assert_eq!(agent(&[], "kill -9 $PPID; sleep 60").0, Some(125), "the connection is lost");
        assert_ne!(pid(), before);
    }
}

/// What the host says to a guest that was copied while it ran.
fn orders(guest: &Guest) {
    let told = |arguments: &[&str]| assert_eq!(guest.control(arguments).0, Some(0), "{arguments:?}");
    let said = |script: &str| guest.control(&["exec", "web", "sh", "-c", script]).1;
    said("date -s @1234567890");
    told(&["agent", "time", "web"]);
    let seconds: u64 = said("date +%s").trim().parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!((now.saturating_sub(60)..=now + 1).contains(&seconds), "{seconds}, and here {now}");
    told(&["agent", "hostname", "web", "copy"]);
    told(&["agent", "reseed", "web"]);
    for (address, gateway) in [("10.9.8.7/24", "10.9.8.1"), ("10.9.7.7/16", "10.9.0.1")] {
        told(&["agent", "network", "web", address, "--gateway", gateway, "--dns", "10.9.8.3"]);
        let (plain, bits) = address.split_once('/').unwrap();
        let mask = if bits == "24" { "255.255.255.0" } else { "255.255.0.0" };
        let shown = said("ifconfig eth0; route -n; cat /etc/resolv.conf");
        for part in [&*format!("addr:{plain}"), &format!("Mask:{mask}"), gateway, "nameserver 10.9.8.3\n"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert_eq!(shown.matches("UG").count(), 1, "one way to all others: {shown}");
    }
    let missing = ["agent", "network", "web", "10.9.8.7/24", "--device", "nosuch0"];
    assert_eq!(guest.control(&missing).0, Some(4));

    let status: serde_json::Value =
        serde_json::from_str(&guest.control(&["status", "web", "--json"]).1).unwrap();
    let path = Path::new(status["vsock"].as_str().unwrap()).to_owned();
    let later = Instant::now() + Duration::from_secs(60);
    let dial = || dial(&path, PORT, Patience { boot: later, answer: later }).unwrap();
    let error = Session::order(dial(), Request::Reseed(vec![7; 513]), later).unwrap_err();
    assert!(matches!(error, client::Error::Failed { reason: Reason::Refused, .. }), "{error}");
    let facts = Session::facts(dial(), later).unwrap();
    assert_eq!(facts.hostname, b"copy");
    assert!(facts.kernel.starts_with(b"6.1.") && facts.sessions >= 1, "{facts:?}");
}

#[test]
fn commands_run_in_a_tuned_guest() {
    if available("commands_run_in_a_tuned_guest") {
        works(Kernel::TunedPvh);
    }
}

#[test]
fn commands_run_in_a_stock_guest() {
    if available("commands_run_in_a_stock_guest") {
        works(Kernel::Stock);
    }
}

#[test]
fn a_guest_that_is_killed_ends_the_commands_in_it() {
    if !available("a_guest_that_is_killed_ends_the_commands_in_it") {
        return;
    }
    let guest = start(Kernel::TunedPvh);
    let mut command: Command = guest.command(&["exec", "web", "sh", "-c", "echo ready; sleep 1000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    assert_eq!(guest.control(&["kill", "web"]).0, Some(0));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("lost"));
}

/// Debian as debootstrap makes it, with its own kernel and modules: nothing was prepared for the agent.
#[test]
fn an_agent_that_was_installed_serves_a_stock_debian() {
    if !available("an_agent_that_was_installed_serves_a_stock_debian") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = copy_of_disk("debian-stock.img", dir.path());
    let vmm = || Command::new(env!("CARGO_BIN_EXE_vmm"));
    let mut install = vmm();
    install.args(["agent", "install", "--disk"]).arg(&disk).arg("--agent").arg(bundle("vmm-agent"));
    let output = install.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let mut command = vmm();
    command.arg("--disk").arg(&disk).args(["--mem", "1G", "--name", "debian", "--vsock"]);
    let mut guest = Guest::start({
        command.stdin(Stdio::null());
        command
    });
    // 75 seconds on an idle machine.
    guest.patience = Duration::from_secs(500);
    guest.wait_for("login: ", 1);
    let (code, said) =
        guest.control(&["exec", "--timeout", "200", "debian", "sh", "-c", "id -u; cat /etc/issue"]);
    assert!(code == Some(0) && said.starts_with("0\nDebian"), "{code:?}: {said}");
    let (_, said) = guest.control(&["exec", "debian", "systemctl", "is-active", "vmm-agent"]);
    assert_eq!(said, "active\n");
    // Nothing in this Debian heeds a power button.
    assert_eq!(guest.control(&["stop", "--timeout", "200", "debian"]).0, Some(0));
    assert_eq!(guest.finish().code, Some(0), "by the agent");
    // It was shut down cleanly, so that a newer one could be put in.
    let mut again = vmm();
    again.args(["agent", "install", "--disk"]).arg(&disk).arg("--agent").arg(bundle("vmm-agent"));
    let output = again.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A screen of 80 columns and 24 lines, with what runs on it.
struct Tmux(tempfile::TempDir);

impl Tmux {
    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(self.0.path().join("socket")).args(["-f", "/dev/null"]).args(arguments);
        let output = command.env("TERM", "xterm").env("LC_ALL", "C.UTF-8").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let screen = self.run(&["capture-pane", "-p"]);
            if screen.contains(text) {
                return;
            }
            assert!(Instant::now() < end, "no {text:?} on:\n{screen}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}

#[test]
fn programs_with_a_screen_are_usable() {
    let test = "programs_with_a_screen_are_usable";
    if !available(test) {
        return;
    }
    if Command::new("tmux").arg("-V").output().is_err() {
        eprintln!("SKIP: {test}: no tmux");
        return;
    }
    let guest = start(Kernel::TunedPvh);
    let tmux = Tmux(tempfile::tempdir().unwrap());
    let command = guest.command(&[]);
    let runtime = command.get_envs().find(|(name, _)| *name == "XDG_RUNTIME_DIR").unwrap().1.unwrap();
    let line = format!(
        "XDG_RUNTIME_DIR={} {} exec -it web sh; echo ended",
        runtime.display(),
        env!("CARGO_BIN_EXE_vmm")
    );
    tmux.run(&["new-session", "-d", "-x", "80", "-y", "24", "sh"]);
    let press = |keys: &[&str]| tmux.run(&[&["send-keys"][..], keys].concat());
    press(&[&line, "Enter"]);
    tmux.wait_for("/ #");
    press(&["top", "Enter"]);
    tmux.wait_for("PPID");
    press(&["q"]);
    press(&["vi /tmp/file", "Enter"]);
    tmux.wait_for("/tmp/file");
    press(&["iwritten in vi", "Escape"]);
    // Its mode is in its last line. What follows at once would belong to the escape.
    tmux.wait_for("- /tmp/file [Modified]");
    press(&[":wq", "Enter"]);
    tmux.wait_for("/ #");
    press(&["clear; cat /tmp/file; stty size", "Enter"]);
    tmux.wait_for("written in vi\n24 80");
    tmux.run(&["resize-window", "-x", "100", "-y", "30"]);
    press(&["clear; sleep 1; stty size", "Enter"]);
    tmux.wait_for("30 100");
    // Ctrl-C ends what runs, and Ctrl-D the shell; then the terminal is as it was.
    press(&["cat", "Enter"]);
    let end = Instant::now() + Duration::from_secs(60);
    while guest.control(&["exec", "web", "pidof", "cat"]).0 != Some(0) {
        assert!(Instant::now() < end, "the command does not run");
    }
    press(&["C-c"]);
    press(&["echo still", "Enter"]);
    tmux.wait_for("\nstill");
    press(&["C-d"]);
    tmux.wait_for("ended");
    press(&["stty -a | grep -c -- ' -icanon'", "Enter"]);
    tmux.wait_for("\n0\n");
}

/// A guest without vsock, over whose console port one command runs at a time.
fn works_by_a_port(kernel: Kernel) {
    let dir = tempfile::tempdir().unwrap();
    let mut command = vmm(kernel, "echo up; while :; do sleep 1; done");
    let port = format!("vmm.agent=socket={}", dir.path().join("agent").display());
    let guest = Guest::start({
        command.args(["--name", "web", "--port", &port]);
        command
    });
    guest.wait_for("up", 1);
    let exec = |script: &str| guest.command(&["exec", "--timeout", "60", "-i", "web", "sh", "-c", script]);
    let output = exec("id -u; exit 42").stdin(Stdio::null()).output().unwrap();
    assert_eq!((output.status.code(), &*output.stdout), (Some(42), &b"0\n"[..]), "{output:?}");

    // Every byte, both ways, and more than any window.
    let bytes: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).collect();
    let mut child = exec("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, input) = (child.stdin.take().unwrap(), bytes.clone());
    let writer = thread::spawn(move || stdin.write_all(&input).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());

    // Clients that are killed while both sides talk.
    for _ in 0..5 {
        let mut child = exec("cat /dev/zero").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 100_000]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let output = exec("echo next").stdin(Stdio::null()).output().unwrap();
        assert_eq!(&*output.stdout, b"next\n", "{output:?}");
    }
    // Each waits for its turn.
    let all: Vec<_> = (0..5)
        .map(|number| {
            let mut command = exec(&format!("sleep 0.2; echo {number}"));
            (number, command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
        })
        .collect();
    for (number, child) in all {
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{number}\n"));
    }
    let mut long =
        exec("echo ready; sleep 1000").stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Read::read_exact(long.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let output = guest.command(&["exec", "--timeout", "1", "web", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use by another command"), "{output:?}");
    long.kill().unwrap();
    long.wait().unwrap();
    // Nothing of those that were killed is left.
    let mut left = exec(
        "for i in 1 2 3 4 5 6 7 8 9; do grep -aqs '[c]at./dev/zero\\|[s]leep.1000' /proc/[0-9]*/cmdline || exit 0; sleep 1; done; exit 1",
    );
    assert_eq!(left.stdin(Stdio::null()).status().unwrap().code(), Some(0));
}

#[test]
fn commands_run_by_a_console_port_in_a_tuned_guest_without_vsock() {
    if available("commands_run_by_a_console_port_in_a_tuned_guest_without_vsock") {
        works_by_a_port(Kernel::TunedPvh);
    }
}

#[test]
fn commands_run_by_a_console_port_in_a_stock_guest_without_vsock() {
    if available("commands_run_by_a_console_port_in_a_stock_guest_without_vsock") {
        works_by_a_port(Kernel::Stock);
    }
}
