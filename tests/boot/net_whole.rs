//! Networks for longer: iperf3 each way, TCP and UDP, floods of pings, small and large MTUs, and gigabytes whose checksums the guest
//! computes itself; over each back end. `make net-whole` runs it; no part of `make test`.
//!
//! The guest is Debian with the tuned kernel and the tools; it is the client, and this machine the server.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, bare, bundle};

/// All of one guest's work, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(3000);

/// As many megabytes each way, whose checksums the guest checks: as iperf3 has it.
fn megabytes() -> String {
    let megabytes =
        std::env::var("VMM_NET_MEGABYTES").ok().and_then(|text| text.parse().ok()).unwrap_or(1000);
    format!("-n {megabytes}M")
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip of iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// iperf3's server on `address`.
fn server(address: Ipv4Addr) -> Running {
    let mut command = Command::new("iperf3");
    command.args(["-s", "-p", "5201", "-B", &address.to_string()]).stdout(Stdio::null());
    Running(command.spawn().expect("iperf3: apt-get install iperf3"))
}

/// What the guest does with the server at `peer`; `mtus` that the network carries. As iperf3 has it, `sums` is how much goes each way
/// with checksums that it computes.
fn script(peer: &str, mtus: &[u32], sums: &str) -> String {
    let mtus = mtus.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    format!(
        "r() {{ n=$1; shift; iperf3 -c {peer} -p 5201 $* >/tmp/o 2>&1 && echo ok $n $(grep -o '[0-9.]* [GMK]bits/sec.*receiver' /tmp/o | \
         tail -1) || {{ echo bad $n; tail -5 /tmp/o; }}; }}; \
         r from -t 3; r to -R -t 3; r from-4 -P 4 -t 3; r to-4 -R -P 4 -t 3; \
         r udp -u -b 50M -l 1200 -t 3; r udp-to -R -u -b 50M -l 1200 -t 3; \
         ping -f -q -c 1000 -w 120 {peer} | grep -q ' 0% packet loss' && echo ok flood || echo bad flood; \
         for m in {mtus}; do ip link set eth0 mtu $m && r mtu-$m -n 4M; r mtu-to-$m -R -n 4M; done; \
         ip link set eth0 mtu 1500; ethtool -K eth0 rx off tx off tso off gso off gro off >/dev/null 2>&1; \
         r sums {sums}; r sums-to -R {sums}; nstat -az TcpInCsumErrors UdpInCsumErrors | grep Csum; echo over"
    )
}

/// A guest with `net`, set up by `address`.
fn guest(image: &Path, net: &str, address: &str, script: &str, cpus: u32) -> Guest {
    let cmdline = format!(
        "console=hvc0 quiet panic=-1 root=/dev/vda rw init=/sbin/guest-init ip={address} vmm.run=\"{script}\""
    );
    let mut command = bare(Kernel::TunedPvh, &cmdline);
    command.args(["--mem", "512M", "--cpus", &cpus.to_string(), "--net", net, "--disk"]).arg(image);
    let mut guest = Guest::start(command);
    guest.patience = PATIENCE;
    guest
}

/// A copy of the guest's disk.
fn disk(dir: &Path) -> PathBuf {
    let image = dir.join("root.ext4");
    let copied =
        Command::new("cp").arg("--sparse=always").arg(bundle("net.ext4")).arg(&image).status().unwrap();
    assert!(copied.success(), "no {}: make net-whole makes it", bundle("net.ext4").display());
    image
}

/// Runs `script` and holds what it says against what it should.
fn check(name: &str, guest: Guest, mtus: &[u32]) {
    let ended = guest.finish();
    eprintln!("== {name}");
    for line in ended.text.lines().filter(|line| line.starts_with("ok ") || line.contains("Csum")) {
        eprintln!("{}", line.trim_end());
    }
    assert!(!ended.text.contains("bad "), "{name}: {}", ended.text);
    let tries = ["from", "to", "from-4", "to-4", "udp", "udp-to", "flood", "sums", "sums-to"];
    let tries = tries.iter().map(|name| (*name).to_owned());
    let tries = tries.chain(mtus.iter().flat_map(|mtu| [format!("mtu-{mtu}"), format!("mtu-to-{mtu}")]));
    for what in tries {
        assert!(ended.text.contains(&format!("ok {what}")), "{name}: no {what}: {}", ended.text);
    }
    let errors: Vec<_> = ended.text.lines().filter(|line| line.contains("CsumErrors")).collect();
    assert_eq!(errors.len(), 2, "{name}: {}", ended.text);
    for line in errors {
        assert_eq!(line.split_whitespace().nth(1), Some("0"), "{name}: {line}");
    }
}

const ALL_MTUS: [u32; 5] = [1280, 1500, 9000, 65520, 576];

#[test]
#[ignore = "minutes"]
fn whole_user() {
    if !available("user network at length") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path());
    let _server = server(Ipv4Addr::LOCALHOST);
    let address = "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3";
    for (name, net) in
        [("user", "user,allow=127.0.0.1:5201"), ("user, MTU 1500", "user,mtu=1500,allow=127.0.0.1:5201")]
    {
        let mtus = if net.contains("mtu") { &[1280, 1500, 576][..] } else { &ALL_MTUS };
        check(name, guest(&image, net, address, &script("10.0.2.2", mtus, &megabytes()), 2), mtus);
    }
}

/// Four connections to the guest at once, five times: next to nothing comes twice, however busy the guest's one processor is.
#[test]
#[ignore = "minutes"]
fn whole_streams() {
    const SOME: u32 = 20;
    if !available("connections side by side") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path());
    let _server = server(Ipv4Addr::LOCALHOST);
    let script = "for n in 1 2 3 4 5; do iperf3 -c 10.0.2.2 -p 5201 -R -P 4 -t 5 >/tmp/o; grep SUM.*receiver /tmp/o; done; \
         nstat -az TcpExtTCPDSACKOldSent | grep Old; echo over";
    let address = "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3";
    let ended = guest(&image, "user,mtu=1500,allow=127.0.0.1:5201", address, script, 1).finish();
    eprintln!("{}", ended.text);
    assert_eq!(ended.text.matches("receiver").count(), 5, "{}", ended.text);
    let again = ended.text.lines().find_map(|line| line.strip_prefix("TcpExtTCPDSACKOldSent"));
    let again = again.and_then(|line| line.split_whitespace().next()?.parse::<u32>().ok());
    assert!(again.is_some_and(|again| again < SOME), "{again:?} segments came twice: {}", ended.text);
}

/// Taps of one and of four queues, served by the monitor or by the host's kernel.
fn taps(more: &str, number: u8) {
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path());
    for (queues, cpus) in [(1, 1), (4, 4)] {
        let name = format!("vmmwhole{number}");
        let host = Ipv4Addr::new(10, 98, 100 + number, 1);
        let multi = if queues > 1 { " multi_queue" } else { "" };
        ip(&format!("tuntap add dev {name} mode tap{multi}"));
        ip(&format!("addr add {host}/24 dev {name}"));
        ip(&format!("link set {name} mtu 65521 up"));
        let server = server(host);
        let net = format!("tap={name},queues={queues}{more}");
        let address = format!("10.98.{}.2:::255.255.255.0::eth0:off", 100 + number);
        let guest = guest(&image, &net, &address, &script(&host.to_string(), &ALL_MTUS, &megabytes()), cpus);
        check(&format!("{net}, {cpus} CPUs"), guest, &ALL_MTUS);
        drop(server);
        ip(&format!("link delete {name}"));
    }
}

#[test]
#[ignore = "minutes"]
fn whole_tap() {
    if available("taps at length") {
        taps("", 1);
    }
}

#[test]
#[ignore = "minutes"]
fn whole_vhost() {
    if available("vhost-net at length") {
        taps(",vhost=on", 2);
    }
}

/// passt, of Debian, with what a socket carries: frames of 1500 bytes.
#[test]
#[ignore = "minutes"]
fn whole_socket() {
    if !available("passt at length") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path());
    // It takes addresses from an interface that has some.
    ip("tuntap add dev vmmwhole3 mode tap");
    ip("addr add 10.98.103.1/24 dev vmmwhole3");
    ip("link set vmmwhole3 up");
    // Its echo requests go out by sockets that not every group may have.
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
    let socket = dir.path().join("passt");
    let mut command = Command::new("passt");
    command.args([
        "-f",
        "-q",
        "-4",
        "-1",
        "-i",
        "vmmwhole3",
        "-a",
        "10.0.2.15",
        "-n",
        "24",
        "-g",
        "10.0.2.2",
    ]);
    command.args(["-D", "none", "--runas", "0", "-s"]).arg(&socket);
    let _passt = Running(command.spawn().expect("passt: apt-get install passt"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "passt does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    // Its gateway answers no echo requests.
    let host = Ipv4Addr::new(10, 98, 103, 1);
    let _server = server(host);
    let (net, address) =
        (format!("socket={}", socket.display()), "10.0.2.15::10.0.2.2:255.255.255.0::eth0:off");
    let mtus = [1280, 1500];
    // It resets a connection when all has gone one way for 23 s, acknowledged though it is (2023-03-09, Debian 12).
    let script = script(&host.to_string(), &mtus, "-t 15");
    check("socket, passt", guest(&image, &net, address, &script, 2), &mtus);
    ip("link delete vmmwhole3");
}

/// Two machines on one segment.
#[test]
#[ignore = "minutes"]
fn whole_switch() {
    if !available("a switch at length") {
        return;
    }
    let [one, two] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let images = [disk(one.path()), disk(two.path())];
    let name = format!("switch=whole{}", std::process::id());
    let run = tempfile::tempdir().unwrap();
    let start = |image: &Path, address: &str, script: &str| {
        let cmdline = format!(
            "console=hvc0 quiet panic=-1 root=/dev/vda rw init=/sbin/guest-init ip={address}:::255.255.255.0::eth0:off vmm.run=\"{script}\""
        );
        let mut command = bare(Kernel::TunedPvh, &cmdline);
        command.args(["--mem", "384M", "--net", &name, "--disk"]).arg(image);
        let mut guest = Guest::start_in(command, run.path());
        guest.patience = PATIENCE;
        guest
    };
    let mtus = [1280, 1500];
    let host = start(&images[0], "10.0.0.1", "iperf3 -s -p 5201 >/dev/null & echo serves; sleep 3000");
    host.wait_for("serves", 1);
    check("switch", start(&images[1], "10.0.0.2", &script("10.0.0.1", &mtus, &megabytes())), &mtus);
}
