//! The agent for longer: a gigabyte each way, a thousand commands, and a stock ssh server. `make agent-whole` runs it; no part of
//! `make test`.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use vmm_agent::client::{Patience, dial};

use crate::guest::{Guest, Kernel, available, bare, bundle, vmm};

const GIGABYTE: u64 = 1 << 30;

/// All of one guest's work, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(1500);

fn start(mut command: Command) -> Guest {
    command.args(["--name", "web", "--vsock", "--rng", "--mem", "512M"]);
    let mut guest = Guest::start(command);
    guest.patience = PATIENCE;
    guest.wait_for("up", 1);
    guest
}

fn tuned() -> Guest {
    start(vmm(Kernel::TunedPvh, "echo up; while :; do sleep 1; done"))
}

/// Writes a gigabyte that repeats nowhere, and says its sum.
fn write_gigabyte(mut to: impl Write) -> Vec<u8> {
    let (mut sum, mut state, mut piece) = (Sha256::new(), 1u64, vec![0; 64 << 10]);
    for _ in 0..GIGABYTE / piece.len() as u64 {
        for word in piece.chunks_exact_mut(8) {
            // Marsaglia's xorshift.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        sum.update(&piece);
        to.write_all(&piece).unwrap();
    }
    sum.finalize().to_vec()
}

#[test]
#[ignore = "minutes: make agent-whole"]
fn whole_gigabyte() {
    assert!(available("whole_gigabyte"));
    let guest = tuned();
    let begin = Instant::now();
    let mut command = guest.command(&["exec", "-i", "web", "cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let writer = thread::spawn(move || write_gigabyte(stdin));
    let (mut sum, mut count, mut piece) = (Sha256::new(), 0, vec![0; 64 << 10]);
    loop {
        match stdout.read(&mut piece).unwrap() {
            0 => break,
            read => {
                sum.update(&piece[..read]);
                count += read as u64;
            }
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(count, GIGABYTE);
    assert_eq!(sum.finalize().to_vec(), writer.join().unwrap());
    println!("== a gigabyte in and out: {:.1} s", begin.elapsed().as_secs_f64());
}

/// Processor time of the monitor's threads that are no vCPUs.
fn time_of_devices(guest: &Guest) -> Duration {
    let threads = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    let time = |thread: fs::DirEntry| {
        let read = |file| fs::read_to_string(thread.path().join(file)).unwrap();
        // "NANOSECONDS ...", of the processor.
        let schedstat = read("schedstat");
        let spent: u64 = schedstat.split(' ').next().unwrap().parse().unwrap();
        if read("comm").starts_with("vcpu") { 0 } else { spent }
    };
    Duration::from_nanos(threads.flatten().map(time).sum())
}

#[test]
#[ignore = "minutes: make agent-whole"]
fn whole_thousand() {
    assert!(available("whole_thousand"));
    let guest = tuned();
    let (begin, before) = (Instant::now(), time_of_devices(&guest));
    for number in 0..1000 {
        let number = number.to_string();
        assert_eq!(guest.control(&["exec", "web", "echo", &number]), (Some(0), format!("{number}\n")));
    }
    println!("== a thousand commands, one after another: {:.1} s", begin.elapsed().as_secs_f64());
    let spent = time_of_devices(&guest) - before;
    println!("== of that in the monitor, beside its vCPUs: {:.2} ms a command", spent.as_secs_f64());
    let begin = Instant::now();
    let all: Vec<_> = (0..100)
        .map(|number| {
            let script = format!("read line; echo $line; exit {number}");
            let mut command = guest.command(&["exec", "-i", "web", "sh", "-c", &script]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            (number, child.stdin.take().unwrap(), child)
        })
        .collect();
    // None of them ends before all have started.
    let sessions = || guest.control(&["exec", "web", "sh", "-c", "pidof sh | wc -w"]).1;
    let end = Instant::now() + PATIENCE;
    while sessions().trim().parse::<u32>().unwrap() < 100 {
        assert!(Instant::now() < end, "{} run", sessions());
    }
    for (number, mut stdin, child) in all {
        writeln!(stdin, "line {number}").unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("line {number}\n"));
        assert_eq!(output.status.code(), Some(number));
    }
    println!("== a hundred commands at once: {:.1} s", begin.elapsed().as_secs_f64());
    let (_, left) = guest.control(&["exec", "web", "sh", "-c", "ls /proc/$(pidof vmm-agent)/fd | wc -l"]);
    assert!(left.trim().parse::<u32>().unwrap() < 20, "files that the agent still has: {left}");
}

/// A server and a client as Debian has them; the guest has no network.
#[test]
#[ignore = "minutes: make agent-whole"]
fn whole_ssh() {
    assert!(available("whole_ssh"));
    let dir = tempfile::tempdir().unwrap();
    let (disk, key) = (dir.path().join("disk"), dir.path().join("key"));
    let copied = Command::new("cp").arg("--sparse=always").arg(bundle("ssh.ext4")).arg(&disk).status();
    assert!(copied.unwrap().success(), "no disk to copy: make agent-whole makes it");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.unwrap().success());

    let cmdline = "console=hvc0 quiet panic=-1 vmm.root=/dev/vda vmm.rootflags=rw \
                   vmm.run=\"echo up; while :; do sleep 1; done\"";
    let mut command = bare(Kernel::TunedPvh, cmdline);
    command.arg("--initrd").arg(Kernel::TunedPvh.initramfs()).arg("--disk").arg(&disk);
    let guest = start(command);
    let told = |script: &str| {
        let (code, said) = guest.control(&["exec", "web", "sh", "-c", script]);
        assert_eq!(code, Some(0), "{script}: {said}");
        said
    };
    told("mkdir -p /root/.ssh /run/sshd && chmod 700 /root/.ssh");
    let public = key.with_extension("pub");
    assert_eq!(guest.control(&["cp", public.to_str().unwrap(), "web:/root/.ssh/authorized_keys"]).0, Some(0));
    told("chown -R 0:0 /root/.ssh; chmod 600 /root/.ssh/authorized_keys");

    let runtime = guest.command(&[]);
    let runtime = runtime.get_envs().find(|(name, _)| *name == "XDG_RUNTIME_DIR").unwrap().1.unwrap();
    let ours = format!("{} ssh-proxy web", env!("CARGO_BIN_EXE_vmm"));
    let log_in = |way: &str, proxy: &str| {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null", "-o", &format!("ProxyCommand={proxy}"), "-i"])
            .arg(&key)
            .args(["root@web", "cat; echo $SSH_CONNECTION | wc -w; exit 42"])
            .env("XDG_RUNTIME_DIR", runtime)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = ssh.spawn().expect("ssh: apt-get install openssh-client");
        child.stdin.take().unwrap().write_all(b"by ssh\n").unwrap();
        let output = child.wait_with_output().unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(42), "{way}: {said}{complained}");
        assert!(said.starts_with("by ssh\n"), "{way}: {said}");
        println!("== ssh {way}");
    };
    // Over TCP on the guest's own loopback, by the agent.
    told("/usr/sbin/sshd -o ListenAddress=127.0.0.1");
    log_in("by vmm ssh-proxy and TCP", &ours);
    // Over vsock: sshd for each connection, as systemd's socket unit for it has it. Nothing listens elsewhere.
    told("kill $(cat /run/sshd.pid)");
    told("setsid socat VSOCK-LISTEN:22,fork EXEC:'/usr/sbin/sshd -i' >/dev/null 2>&1 </dev/null &");
    let status: serde_json::Value =
        serde_json::from_str(&guest.control(&["status", "web", "--json"]).1).unwrap();
    let socket = Path::new(status["vsock"].as_str().unwrap());
    let later = Instant::now() + Duration::from_secs(60);
    drop(dial(socket, 22, Patience { boot: later, answer: later }).unwrap());
    log_in("by vmm ssh-proxy and vsock", &ours);
    // And by what systemd's ssh-proxy says to a `vsock-mux` socket.
    let mux = format!("sh -c '(echo CONNECT 22; cat) | socat - UNIX-CONNECT:{}'", socket.display());
    log_in("by CONNECT 22 and socat", &mux);
}
