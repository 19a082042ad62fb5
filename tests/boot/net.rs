//! The network under a real guest: to the host over a tap, and to another VM over sockets.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::guest::{Guest, Kernel, available, bare, copy_of_disk, vmm};

const FOUR_MIB: &str = "head -c 4194304 /dev/urandom >/d; echo BEGIN; sha256sum </d";

pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip of iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tap with two queues called `name` whose host has the address 10.98.`net`.1.
pub fn tap(name: &str, net: u8) {
    ip(&format!("tuntap add dev {name} mode tap multi_queue"));
    ip(&format!("addr add 10.98.{net}.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
}

/// Sends back what the next who connects sends, all at its end. How much that was.
fn echo(listener: &TcpListener) -> usize {
    let (mut guest, _) = listener.accept().unwrap();
    let mut all = Vec::new();
    guest.read_to_end(&mut all).unwrap();
    guest.write_all(&all).unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    all.len()
}

/// The guest pings the host, and sends it 4 MiB over TCP, which the host sends back: over a tap with two queues, so
/// with segments and checksums that are left to the other side.
#[test]
fn a_guest_reaches_the_host_over_a_tap() {
    if !available("network over a tap") {
        return;
    }
    tap("vmmtest0", 7);
    let listener = TcpListener::bind("10.98.7.1:7000").unwrap();
    let echo = thread::spawn(move || echo(&listener));
    let script = format!(
        "ip addr add 10.98.7.2/24 dev eth0; ip link set eth0 up; {FOUR_MIB}; \
         nc 10.98.7.1 7000 </d | sha256sum; \
         ping -q -c 3 -W 20 10.98.7.1 | grep -o '3 packets received'; \
         cut -c 1,12 /sys/class/net/eth0/device/features; ls /sys/class/net/eth0/queues | grep -o [rt]x-[0-9]; \
         cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; echo END"
    );
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.args(["--mem", "256M", "--cpus", "2"]);
    command.args(["--net", "tap=vmmtest0,queues=2,mac=02:00:00:00:00:2a,mtu=1400"]);
    let ended = Guest::start(command).finish();
    let body = ended.body();
    assert_eq!(echo.join().unwrap(), 4 << 20);
    assert_eq!(body[0], body[1], "what came back is what was sent: {}", ended.text);
    let queues = ["rx-0", "rx-1", "tx-0", "tx-1"];
    assert_eq!(body[2..4], ["3 packets received", "11"], "CSUM and HOST_TSO4: {}", ended.text);
    assert_eq!(body[4..], [&queues[..], &["02:00:00:00:00:2a", "1400"]].concat(), "{}", ended.text);
    ip("link delete vmmtest0");
}

/// With `ip=` there is no DHCP to wait for: the interface is up before the first program.
#[test]
fn a_guest_that_is_told_its_address_has_it_before_its_first_program() {
    if !available("ip=") {
        return;
    }
    for kernel in [Kernel::TunedPvh, Kernel::Stock] {
        let script = "echo BEGIN; ip -4 -o addr show dev eth0 | grep -o 10.0.2.15/24; ip route | head -1; \
                      cat /etc/resolv.conf; ping -q -c 1 -W 20 10.0.2.2 | grep -o '1 packets received'; echo END";
        let ip = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3";
        let mut command = bare(kernel, &format!("console=hvc0 quiet panic=-1 {ip} vmm.run=\"{script}\""));
        command.arg("--initrd").arg(kernel.initramfs()).args(["--mem", "512M", "--net", "user"]);
        let ended = Guest::start(command).finish();
        let body: Vec<_> = ended.body().into_iter().map(str::trim_end).collect();
        let route = "default via 10.0.2.2 dev eth0";
        let wanted = ["10.0.2.15/24", route, "nameserver 10.0.2.3", "1 packets received"];
        assert_eq!(body, wanted, "{kernel:?}: {}", ended.text);
    }
}

/// A root that init switches to has its own file of resolvers, which may be read-only.
#[test]
fn a_root_that_init_switches_to_asks_the_server_that_the_guest_was_told() {
    if !available("ip= and vmm.root=") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let own = copy_of_disk("debian.ext4", dir.path()).display().to_string();
    for (disk, flags) in [(format!("{own},readonly"), "ro"), (own, "rw")] {
        let ip = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3";
        let script = "echo BEGIN; cat /etc/resolv.conf; test -e /etc/debian_version && echo Debian; echo END";
        let root = format!("vmm.root=/dev/vda vmm.rootflags={flags}");
        let cmdline = format!("console=hvc0 quiet panic=-1 {ip} {root} vmm.run=\"{script}\"");
        let mut command = bare(Kernel::TunedPvh, &cmdline);
        command.arg("--initrd").arg(Kernel::TunedPvh.initramfs());
        command.args(["--mem", "512M", "--net", "user", "--disk", &disk]);
        let ended = Guest::start(command).finish();
        assert_eq!(ended.body(), ["nameserver 10.0.2.3", "Debian"], "{flags}: {}", ended.text);
    }
}

/// The threads of the host's kernel that serve queues of `guest`.
fn vhost_threads(guest: &Guest) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap().flatten();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("vhost-")).count()
}

/// With the host's kernel in the monitor's place: the same, over a pause in the middle and over a reboot, on our kernel and on Debian's.
#[test]
fn the_hosts_kernel_serves_a_taps_queues_over_pauses_and_reboots() {
    if !available("vhost-net") {
        return;
    }
    for (kernel, transport, name, net) in
        [(Kernel::TunedPvh, "mmio", "vmmtest2", 9), (Kernel::Stock, "pci", "vmmtest3", 10)]
    {
        tap(name, net);
        let listener = TcpListener::bind(format!("10.98.{net}.1:7000")).unwrap();
        let script = format!(
            "ip addr add 10.98.{net}.2/24 dev eth0; ip link set eth0 up; {FOUR_MIB}; echo sends; \
             nc 10.98.{net}.1 7000 </d | sha256sum; \
             ping -q -c 3 -W 20 10.98.{net}.1 | grep -o '3 packets received'; \
             ls /sys/class/net/eth0/queues | grep -c [rt]x-[0-9]; echo round; reboot -f"
        );
        let mut command = vmm(kernel, &script);
        command.args(["--mem", "512M", "--cpus", "2", "--name", "v", "--on-reboot", "reset"]);
        command.args(["--transport", transport, "--net", &format!("tap={name},queues=2,vhost=on")]);
        let guest = Guest::start(command);
        for round in 1..=2 {
            guest.wait_for("sends", round);
            assert_eq!(vhost_threads(&guest), 2, "{kernel:?}");
            for _ in 0..5 {
                assert_eq!(guest.control(&["pause", "v"]).0, Some(0));
                assert_eq!(guest.control(&["resume", "v"]).0, Some(0));
            }
            assert_eq!(echo(&listener), 4 << 20);
            guest.wait_for("round", round);
        }
        let text = guest.text();
        let sums: Vec<_> = text.lines().filter(|line| line.trim_end().ends_with("  -")).collect();
        assert_eq!(sums[0], sums[1], "{kernel:?}: what came back is what was sent: {text}");
        assert_eq!(sums[2], sums[3], "{kernel:?}: {text}");
        assert_eq!(text.matches("3 packets received").count(), 2, "{kernel:?}: {text}");
        assert_eq!(text.lines().filter(|line| line.trim_end() == "4").count(), 2, "{kernel:?}: {text}");
        assert_eq!(guest.control(&["kill", "v"]).0, Some(0));
        ip(&format!("link delete {name}"));
    }
}

/// A tap that is deleted under its guest takes the link down, whoever moves the frames.
#[test]
fn a_tap_that_is_deleted_is_a_link_that_is_down() {
    if !available("a tap that is deleted") {
        return;
    }
    for (vhost, net) in [("off", 11), ("on", 12)] {
        let name = format!("vmmtest{net}");
        tap(&name, net);
        let script = "ip link set eth0 up; cd /sys/class/net/eth0; until grep -q 1 carrier; do sleep 0.1; done; \
                      echo is-up; until grep -q 0 carrier; do sleep 0.1; done; echo BEGIN; cat carrier; echo END";
        let mut command = vmm(Kernel::TunedPvh, script);
        command.args(["--mem", "256M", "--net", &format!("tap={name},queues=2,vhost={vhost}")]);
        let guest = Guest::start(command);
        guest.wait_for("is-up", 1);
        ip(&format!("link delete {name}"));
        let ended = guest.finish();
        assert_eq!(ended.body(), ["0"], "vhost={vhost}: {}", ended.text);
    }
}

/// Debian's kernel with its own driver, on a tap that vmm makes: it pings the host, and the host connects to it.
#[test]
fn a_stock_guest_is_reached_over_a_tap_that_goes_with_it() {
    if !available("network over a tap of its own") {
        return;
    }
    let script = "ip addr add 10.98.8.2/24 dev eth0; ip link set eth0 up; \
                  until ping -q -c 1 -W 1 10.98.8.1 >/dev/null; do true; done; \
                  echo reaches-the-host; echo reached | nc -l -p 7000";
    let mut command = vmm(Kernel::Stock, script);
    command.args(["--mem", "512M", "--net", "tap=vmmtest1"]);
    let guest = Guest::start(command);
    let interface = Path::new("/sys/class/net/vmmtest1");
    let mut made = std::iter::repeat_with(|| thread::sleep(Duration::from_millis(10))).take(6000);
    assert!(made.any(|()| interface.exists()), "no tap: {}", guest.text());
    ip("addr add 10.98.8.1/24 dev vmmtest1");
    guest.wait_for("reaches-the-host", 1);
    let mut said = String::new();
    let connected = std::iter::repeat_with(|| {
        thread::sleep(Duration::from_millis(100));
        TcpStream::connect("10.98.8.2:7000")
    });
    // Refused until the guest listens.
    let mut there = connected.take(600).find_map(Result::ok).expect("the guest listens");
    there.read_to_string(&mut said).unwrap();
    drop(there);
    assert_eq!(said, "reached\n");
    let ended = guest.finish();
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(!interface.exists(), "it is left behind");
}

/// Two VMs, one connected to a socket that listens, one with a socket that it was given; what comes from one goes to the other.
#[test]
fn two_guests_reach_each_other_over_sockets() {
    if !available("network between VMs") {
        return;
    }
    let receiver = "ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up; \
                    echo BEGIN; nc -l -p 7000 | sha256sum; echo END";
    let sender = format!(
        "ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; {FOUR_MIB}; \
         until nc 10.0.0.1 7000 </d 2>/dev/null; do true; done; echo END"
    );
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wire");
    let listener = UnixListener::bind(&path).unwrap();
    let start = |script: &str, to: &str| {
        let mut command = vmm(Kernel::TunedPvh, script);
        command.args(["--mem", "256M", "--net", to]);
        Guest::start(command)
    };
    let receiver = start(receiver, &format!("socket={}", path.display()));
    let (one, _) = listener.accept().unwrap();
    let (other, passed) = UnixStream::pair().unwrap();
    // SAFETY: takes numbers only, and the descriptor is open.
    assert_eq!(unsafe { libc::fcntl(passed.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    let sender = start(&sender, &format!("fd={}", passed.as_raw_fd()));
    drop(passed);
    let copy = |mut from: UnixStream, mut to: UnixStream| {
        // Until one of them ends.
        thread::spawn(move || drop(std::io::copy(&mut from, &mut to)))
    };
    copy(one.try_clone().unwrap(), other.try_clone().unwrap());
    copy(other, one);
    let (sent, got) = (sender.finish(), receiver.finish());
    assert_eq!(got.body(), sent.body(), "{}\n{}", got.text, sent.text);
    assert_eq!(got.body()[0].len(), 64 + "  -".len());
}

/// Three pings are sentences in the trace, and packets in the dump, answers and all.
#[test]
fn a_guests_frames_are_in_the_trace_and_in_the_dump() {
    if !available("frames in traces and dumps") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (record, dump) = (dir.path().join("record"), dir.path().join("frames"));
    let script = "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; echo BEGIN; \
                  ping -q -c 3 -W 20 10.0.2.2 | grep -o '3 packets received'; echo END";
    let mut command = vmm(Kernel::TunedPvh, script);
    command.args(["--mem", "256M", "--net", "user,bw=10M,pps=1000"]);
    command.arg("--trace").arg(&record).arg("--net-dump").arg(&dump);
    let ended = Guest::start(command).finish();
    assert_eq!(ended.body(), ["3 packets received"], "{}", ended.text);
    let mut report = Command::new(env!("CARGO_BIN_EXE_vmm"));
    let report = report.args(["trace", "report", "--only", "net"]).arg(&record).output().unwrap();
    let told = String::from_utf8(report.stdout).unwrap();
    for sentence in [
        "sends 42 bytes: ARP who has 10.0.2.2? asks 10.0.2.15",
        "receives 42 bytes: ARP 10.0.2.2 answers 10.0.2.15",
        "sends 98 bytes: ICMP 10.0.2.15 > 10.0.2.2 echo request",
        "receives 98 bytes: ICMP 10.0.2.2 > 10.0.2.15 echo reply",
    ] {
        let count =
            told.lines().filter(|line| line.starts_with("virtio-net0") && line.ends_with(sentence)).count();
        assert_eq!(count, if sentence.contains("ICMP") { 3 } else { 1 }, "{sentence} in\n{told}");
    }
    // As many packets (blocks of type 6) as there are lines.
    let bytes = std::fs::read(&dump).unwrap();
    let (mut rest, mut packets) = (&bytes[..], 0);
    while let Some((head, _)) = rest.split_first_chunk::<8>() {
        packets += usize::from(head[..4] == [6, 0, 0, 0]);
        rest = &rest[u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize..];
    }
    assert_eq!(packets, told.lines().filter(|line| line.starts_with("virtio-net0")).count(), "{told}");
}

/// Two VMs on a segment of their own: 4 MiB go from one to the other, with checksums that are left to the other side.
#[test]
fn two_guests_reach_each_other_on_a_switch() {
    if !available("switch") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let receiver = "ip addr add 10.7.0.1/24 dev eth0; ip link set eth0 up; cat /sys/class/net/eth0/mtu; \
                    echo BEGIN; nc -l -p 7000 | sha256sum; echo END";
    let sender = format!(
        "ip addr add 10.7.0.2/24 dev eth0; ip link set eth0 up; {FOUR_MIB}; \
         until nc 10.7.0.1 7000 </d 2>/dev/null; do true; done; echo END"
    );
    let start = |script: &str| {
        let mut command = vmm(Kernel::TunedPvh, script);
        command.args(["--mem", "256M", "--net", "switch=boot-test"]);
        Guest::start_in(command, dir.path())
    };
    let (receiver, sender) = (start(receiver), start(&sender));
    let (sent, got) = (sender.finish(), receiver.finish());
    assert_eq!(got.body(), sent.body(), "{}\n{}", got.text, sent.text);
    assert_eq!(got.body()[0].len(), 64 + "  -".len());
    assert!(got.text.contains("9000"), "{}", got.text);
    assert!(!dir.path().join("vmm/switch/boot-test").exists(), "the segment goes with its last machine");
}

/// Two VMs with a user network and a segment: each takes its addresses by DHCP, as our images do it, and finds the other by its name.
#[test]
fn two_guests_on_a_switch_find_each_other_by_name() {
    if !available("names on a switch") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str, script: &str| {
        let set_up = "for i in eth0 eth1; do ip link set $i up; udhcpc -q -n -i $i >/dev/null 2>&1; done; \
                      ip -4 -o addr show dev eth0 | grep -o 10.0.2.15/24; ip route | grep -c default; echo BEGIN";
        let mut command = vmm(Kernel::TunedPvh, &format!("{set_up}; {script}; echo END"));
        command.args(["--mem", "256M", "--name", name, "--net", "user", "--net", "switch=names-test"]);
        Guest::start_in(command, dir.path())
    };
    let finds = |name: &str| {
        format!("until ping -q -c 1 -W 9 {name} >/dev/null 2>&1; do sleep 0.1; done; echo finds {name}")
    };
    let web = start("web", &format!("{}; echo reached | nc -l -p 7000", finds("db")));
    let again = "until nc web.vmm.internal 7000 </dev/null 2>/dev/null | grep reached; do sleep 0.1; done";
    let db = start(
        "db",
        &format!("{}; {again}; ip -4 -o addr show dev eth1 | grep -c 'inet 10.*/24'", finds("web")),
    );
    let (db, web) = (db.finish(), web.finish());
    assert_eq!(db.body(), ["finds web", "reached", "1"], "{}\n{}", db.text, web.text);
    assert_eq!(web.body(), ["finds db"], "{}", web.text);
    let lease = |text: &str| text.contains("10.0.2.15/24\n1\nBEGIN");
    assert!(
        lease(&web.text.replace('\r', "")) && lease(&db.text.replace('\r', "")),
        "{}\n{}",
        web.text,
        db.text
    );
    assert!(!dir.path().join("vmm/switch/names-test").exists(), "the segment goes with its last machine");
}

/// On a macvtap the guest has the interface's address, and reaches another interface on the same card of the host's.
#[test]
fn a_guest_on_a_macvtap_has_its_address_and_reaches_its_neighbour() {
    if !available("network over a macvtap") {
        return;
    }
    ip("link add vmmcard type veth peer name vmmcable");
    ip("link set vmmcable up");
    ip("link set vmmcard up");
    ip("link add link vmmcard name vmmmv0 address 02:00:00:00:00:4d type macvtap mode bridge");
    ip("link set vmmmv0 up");
    ip("link add link vmmcard name vmmmv1 type macvlan mode bridge");
    ip("addr add 10.98.9.1/24 dev vmmmv1");
    ip("link set vmmmv1 up");
    let listener = TcpListener::bind("10.98.9.1:7000").unwrap();
    let echo = thread::spawn(move || {
        let (mut guest, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        guest.write_all(&all).unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
    });
    let script = format!(
        "ip addr add 10.98.9.2/24 dev eth0; ip link set eth0 up; {FOUR_MIB}; nc 10.98.9.1 7000 </d | sha256sum; \
         cat /sys/class/net/eth0/address; cut -c 1,12 /sys/class/net/eth0/device/features; echo END"
    );
    let mut command = vmm(Kernel::TunedPvh, &script);
    command.args(["--mem", "256M", "--cpus", "2", "--net", "macvtap=vmmmv0,queues=2"]);
    let guest = Guest::start(command);
    // It has its device when its guest speaks. Another's frames would be lost to it, and its own to the other.
    let mut second = vmm(Kernel::TunedPvh, "true");
    second.args(["--net", "macvtap=vmmmv0"]);
    guest.wait_for("BEGIN", 1);
    let said = String::from_utf8(second.output().unwrap().stderr).unwrap();
    assert!(said.contains("macvtap vmmmv0 is in use by another process"), "{said}");
    let ended = guest.finish();
    let body = ended.body();
    assert_eq!(body[0], body[1], "what came back is what was sent: {}", ended.text);
    assert_eq!(body[2..], ["02:00:00:00:00:4d", "11"], "CSUM and HOST_TSO4: {}", ended.text);
    echo.join().unwrap();
    ip("link delete vmmcard");
}
