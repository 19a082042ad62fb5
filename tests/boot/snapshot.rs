//! Linux saved and restored: what was in its memory is, its clocks are right, its devices work, and the original goes on.

use std::fs;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::guest::{Guest, Kernel, available, vmm};
use crate::net;

/// Runs a command in the guest `name` by its agent.
#[track_caller]
pub fn exec(guest: &Guest, name: &str, script: &str) -> String {
    let output = guest.command(&["exec", name, "sh", "-c", script]).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{name}: {script}: {said}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

#[track_caller]
pub fn well(guest: &Guest, name: &str) {
    let log = exec(guest, name, "dmesg");
    // A "read-back delay" is how long the guest was held up between two looks at clocks, which it does not compare then: that is the
    // host's affair, and an emulated one is slow at times.
    for word in ["soft lockup", "stalls on", "blocked for more than", "Marking clocksource", "BUG:"] {
        assert!(!log.contains(word), "{name}: {log}");
    }
}

/// Until the machine `name` of the process `guest`, which `any` can reach, runs.
#[track_caller]
pub fn await_running(any: &Guest, guest: &Guest, name: &str) {
    let deadline = Instant::now() + guest.patience;
    while !any.control(&["status", name]).1.contains("running") {
        assert!(Instant::now() < deadline, "{name} does not run");
        thread::sleep(Duration::from_millis(20));
    }
}

pub fn number(text: &str) -> f64 {
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// Three generations: a guest, one restored of it, and one restored of that.
fn goes_on(kernel: Kernel, options: &[&str]) {
    let mut command = vmm(kernel, "echo up; while :; do echo x >>/tmp/ticks; sleep 0.1; done");
    command.args(["--name", "gen0", "--vsock", "--rng", "--net", "user"]).args(options);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    let nonce = exec(&first, "gen0", "cat /proc/sys/kernel/random/uuid | tee /tmp/nonce");
    exec(&first, "gen0", "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ping -c 1 -W 10 10.0.2.2");
    let folder = tempfile::tempdir().unwrap();
    let mut generations = vec![first];
    for generation in 0..2 {
        let (name, next) = (format!("gen{generation}"), format!("gen{}", generation + 1));
        let guest = &generations[0];
        let uptime = number(&exec(guest, &name, "cat /proc/uptime"));
        let ticks = number(&exec(guest, &name, "wc -l </tmp/ticks"));
        let saved = folder.path().join(&name);
        let saved = saved.to_str().unwrap();
        assert_eq!(guest.control(&["snapshot", "create", &name, saved]).0, Some(0));
        assert_eq!(guest.control(&["snapshot", "verify", saved]).0, Some(0));

        let mut command = guest.command(&["restore", saved, "--name", &next]);
        command.stdin(Stdio::null());
        let runtime = guest.runtime().to_owned();
        let restored = Guest::start_in(command, &runtime);
        await_running(guest, &restored, &next);
        // The agent hears of the reset of its connections, and new ones reach it.
        assert_eq!(exec(guest, &next, "cat /tmp/nonce"), nonce, "the same run");
        assert!(number(&exec(guest, &next, "cat /proc/uptime")) >= uptime);
        let then = number(&exec(guest, &next, "wc -l </tmp/ticks"));
        let later = number(&exec(guest, &next, "sleep 1; wc -l </tmp/ticks"));
        assert!(then >= ticks && later > then, "{ticks}, {then}, {later}");
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let clock = number(&exec(guest, &next, "date +%s")) as u64;
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!((before.saturating_sub(1)..=after + 1).contains(&clock), "{before}, {clock}, {after}");
        assert_ne!(exec(guest, &next, "head -c 16 /dev/hwrng | od -An -tx1"), "");
        exec(guest, &next, "ping -c 1 -W 10 10.0.2.2");
        // The one that was saved goes on as well.
        assert!(number(&exec(guest, &name, "sleep 1; wc -l </tmp/ticks")) > ticks);
        well(guest, &next);
        well(guest, &name);
        generations.push(restored);
    }
    assert!(generations.iter().all(|guest| !guest.text().contains("panic")));
}

#[test]
fn our_kernel_goes_on_where_it_was_saved() {
    if !available("our_kernel_goes_on_where_it_was_saved") {
        return;
    }
    goes_on(Kernel::TunedPvh, &[]);
}

#[test]
fn our_kernel_with_four_cpus_and_pci_goes_on_where_it_was_saved() {
    if !available("our_kernel_with_four_cpus_and_pci_goes_on_where_it_was_saved") {
        return;
    }
    goes_on(Kernel::TunedPvh, &["--cpus", "4", "--transport", "pci"]);
}

#[test]
fn debians_kernel_goes_on_where_it_was_saved() {
    if !available("debians_kernel_goes_on_where_it_was_saved") {
        return;
    }
    goes_on(Kernel::Stock, &["--cpus", "2", "--mem", "512M"]);
}

/// Each of the three has huge pages of its own.
#[test]
fn a_guest_of_huge_pages_goes_on_where_it_was_saved() {
    let name = "a_guest_of_huge_pages_goes_on_where_it_was_saved";
    if !available(name) {
        return;
    }
    let pool = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    let pages = || fs::read_to_string(pool).unwrap_or_default().trim().parse::<u64>().unwrap_or(0);
    let before = pages();
    let set = fs::write(pool, (before + 3 * 128).to_string());
    if pages() == before + 3 * 128 {
        goes_on(Kernel::TunedPvh, &["--mem", "256M,hugepages=2M"]);
    } else {
        eprintln!("SKIP: {name}: wants root's right to reserve huge pages, 384 of them: {set:?}");
    }
    let _ = fs::write(pool, before.to_string());
}

#[test]
fn a_guest_that_firmware_booted_goes_on_where_it_was_saved() {
    if !available("a_guest_that_firmware_booted_goes_on_where_it_was_saved") {
        return;
    }
    goes_on(Kernel::TunedBzImage, &["--firmware", "--cpus", "2"]);
}

/// Firmware has moved the tables with the generation ID's device.
#[test]
fn a_copy_of_a_guest_that_firmware_booted_hears_that_it_is_one() {
    if !available("a_copy_of_a_guest_that_firmware_booted_hears_that_it_is_one") {
        return;
    }
    let first = Guest::start({
        let mut command = vmm(Kernel::TunedBzImage, "echo up; while :; do sleep 1; done");
        command.args(["--name", "one", "--vsock", "--firmware"]);
        command
    });
    first.wait_for("up", 1);
    assert_eq!(first.control(&["fork", "one"]).0, Some(0));
    let heard =
        "until dmesg | grep -q 'crng reseeded due to virtual machine [f]ork'; do sleep 0.1; done; echo heard";
    assert_eq!(exec(&first, "one-1", heard), "heard");
    assert_eq!(first.control(&["kill", "one-1", "one"]).0, Some(0));
}

/// With network and sockets that the host's kernel serves: it has the guest's frames and connections of before and after.
#[test]
fn queues_that_the_hosts_kernel_serves_go_on_where_they_were_saved() {
    if !available("queues_that_the_hosts_kernel_serves_go_on_where_they_were_saved") {
        return;
    }
    let (tap, cid) = ("vmmtest14", "78");
    net::tap(tap, 14);
    for transport in ["mmio", "pci"] {
        let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do sleep 1; done");
        command.args(["--name", "one", "--cpus", "2", "--transport", transport]);
        command.args([
            "--net",
            &format!("tap={tap},queues=2,vhost=on"),
            "--vsock",
            &format!("vhost=on,cid={cid}"),
        ]);
        let first = Guest::start(command);
        first.wait_for("up", 1);
        exec(&first, "one", "ip addr add 10.98.14.2/24 dev eth0; ip link set eth0 up; echo kept >/tmp/kept");
        let ping = "ping -q -i 0.01 -c 300 -W 10 10.98.14.1 | grep -o '[0-9]* packets received'";
        let reaches =
            |name: &str| assert_eq!(exec(&first, name, ping), "300 packets received", "{name}, {transport}");
        reaches("one");
        let folder = tempfile::tempdir().unwrap();
        let saved = folder.path().join("saved");
        let saved = saved.to_str().unwrap();
        // Frames are under way.
        exec(&first, "one", "ping -q -i 0.002 -w 60 10.98.14.1 >/dev/null 2>&1 &");
        assert_eq!(first.control(&["snapshot", "create", "--stop", "one", saved]).0, Some(0));
        let mut command = first.command(&["restore", saved, "--name", "two"]);
        command.stdin(Stdio::null());
        let runtime = first.runtime().to_owned();
        let restored = Guest::start_in(command, &runtime);
        await_running(&first, &restored, "two");
        assert_eq!(exec(&first, "two", "cat /tmp/kept"), "kept");
        exec(&first, "two", "killall ping; until ping -q -c 1 -W 1 10.98.14.1 >/dev/null; do :; done");
        reaches("two");
        assert_eq!(first.control(&["kill", "two"]).0, Some(0));
        restored.finish();
    }
    net::ip(&format!("link delete {tap}"));
}

/// Counts the lines of the next who connects and sends them back, as long as they are 1, 2, 3 and so on.
fn count_lines(listener: TcpListener) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    thread::spawn(move || {
        let (guest, _) = listener.accept().unwrap();
        let mut back = BufWriter::new(guest.try_clone().unwrap());
        for (line, number) in BufReader::new(guest).lines().zip(1u64..) {
            let line = line.unwrap();
            assert_eq!(line, number.to_string());
            writeln!(back, "{line}").unwrap();
            counted.store(number, Ordering::Relaxed);
        }
    });
    count
}

/// What the host and the guest `name` see of the network, now and a while later: sockets, frames, interrupts, and what is queued or lost.
fn both_ends(guest: &Guest, name: &str) -> String {
    let here = "cat /proc/net/tcp /proc/net/arp; ip -s -s link; tc -s qdisc; ip neigh";
    let there =
        "cat /proc/net/tcp /proc/net/arp /proc/net/dev /proc/interrupts /proc/net/snmp; ps; wc -l /tmp/back";
    let look = || {
        let host = Command::new("sh").args(["-c", here]).output();
        // A guest that is stuck does not answer.
        let mut vmm = Command::new("timeout");
        vmm.args(["60", env!("CARGO_BIN_EXE_vmm"), "exec", name, "sh", "-c", there]);
        let guest = vmm.env("XDG_RUNTIME_DIR", guest.runtime()).stdin(Stdio::null()).output();
        let said = |output: io::Result<Output>| match output {
            Ok(Output { status, stdout, .. }) => format!("{}\n{status}\n", String::from_utf8_lossy(&stdout)),
            Err(error) => error.to_string(),
        };
        format!("here:\n{}there:\n{}", said(host), said(guest))
    };
    let before = look();
    thread::sleep(Duration::from_secs(5));
    before + &look()
}

/// A stream in both directions to a program on the host, which notices nothing but a pause.
#[test]
fn a_connection_over_a_tap_goes_on_where_it_was_saved() {
    if !available("a_connection_over_a_tap_goes_on_where_it_was_saved") {
        return;
    }
    let tap = "vmmtest15";
    net::tap(tap, 15);
    for (transport, vhost, port) in [("mmio", "off", 7000), ("pci", "on", 7001)] {
        let count = count_lines(TcpListener::bind(("10.98.15.1", port)).unwrap());
        let await_count = |guest: &Guest, name: &str, least: u64| {
            let deadline = Instant::now() + guest.patience;
            while count.load(Ordering::Relaxed) < least {
                assert!(
                    Instant::now() < deadline,
                    "{transport}, vhost={vhost}: stopped at {count:?} of {least}\n{}\n{}",
                    both_ends(guest, name),
                    guest.state()
                );
                thread::sleep(Duration::from_millis(20));
            }
        };
        let mut command = vmm(Kernel::TunedPvh, "echo up; while :; do sleep 1; done");
        command.args(["--name", "gen0", "--vsock", "--cpus", "2", "--transport", transport]);
        command.args(["--net", &format!("tap={tap},queues=2,vhost={vhost}")]);
        let first = Guest::start(command);
        first.wait_for("up", 1);
        exec(&first, "gen0", "ip addr add 10.98.15.2/24 dev eth0; ip link set eth0 up");
        let numbers = "i=0; while :; do i=$((i + 1)); echo $i; done";
        exec(&first, "gen0", &format!("({numbers}) 2>&1 | nc 10.98.15.1 {port} >/tmp/back 2>&1 &"));
        await_count(&first, "gen0", 1000);
        let folder = tempfile::tempdir().unwrap();
        let mut restored = Vec::new();
        for generation in 0..2 {
            let (name, next) = (format!("gen{generation}"), format!("gen{}", generation + 1));
            let saved = folder.path().join(&name);
            let saved = saved.to_str().unwrap();
            assert_eq!(first.control(&["snapshot", "create", "--stop", &name, saved]).0, Some(0));
            let before = count.load(Ordering::Relaxed);
            let mut command = first.command(&["restore", saved, "--name", &next]);
            command.stdin(Stdio::null());
            let guest = Guest::start_in(command, first.runtime());
            await_running(&first, &guest, &next);
            await_count(&guest, &next, before + 10_000);
            let lines = "$(wc -l </tmp/back)";
            let more = format!("had={lines}; until [ {lines} -gt $((had + 1000)) ]; do sleep 0.1; done");
            exec(&first, &next, &more);
            restored.push(guest);
        }
        // The last line may not be whole.
        let check = "sed '$d' /tmp/back >/tmp/lines; awk '$1 != NR { print NR, $0; exit }' /tmp/lines; wc -l </tmp/lines";
        let lines = exec(&first, "gen2", check);
        assert!(lines.parse::<u64>().is_ok_and(|lines| lines > 20_000), "what came back: {lines}");
        well(&first, "gen2");
        assert_eq!(first.control(&["kill", "gen2"]).0, Some(0));
    }
    net::ip(&format!("link delete {tap}"));
}
