//! Network devices: ends that cannot be, and what is left of those that were.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::images::*;
use crate::place::*;

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn ip(arguments: &str) -> bool {
    run(Command::new("ip").args(arguments.split(' ')))
}

fn interface(name: &str) -> PathBuf {
    Path::new("/sys/class/net").join(name)
}

/// An interface of the test's own, which goes with it.
struct Interface(String);

impl Interface {
    /// `None` where this user may make none.
    fn new(suffix: &str, more: &str) -> Option<Self> {
        let name = format!("vt{}{suffix}", std::process::id());
        let made = ip(&format!("tuntap add dev {name} mode tap{more}"));
        made.then_some(Self(name))
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        ip(&format!("link delete {}", self.0));
    }
}

#[test]
fn ends_that_cannot_be() {
    if !has_kvm("ends_that_cannot_be") {
        return;
    }
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    place.file("file", "");
    drop(UnixListener::bind(place.path("deserted")).unwrap());
    for (arguments, words) in [
        ("--net socket=missing", &["missing", "No such file"][..]),
        ("--net socket=file", &["file", "refused"]),
        ("--net fd=99", &["99", "not passed"]),
        ("--net fd=3", &["3", "not passed"]),
        ("--net fd=0", &["0", "neither a tap nor"]),
        ("--net tap=lo", &["lo", "no tap"]),
        ("--disk path=missing --net socket=missing", &["disk"]),
        ("--net vhost-user=missing", &["vhost-user back end missing", "No such file"]),
        ("--net vhost-user=file", &["vhost-user back end file", "this is no socket"]),
        ("--net vhost-user=deserted", &["vhost-user back end deserted", "refused"]),
        ("--net vhost-user=a,mtu=67", &["vhost-user=a", "MTU"]),
        ("--net vhost-user=a,queues=17", &["17 pairs of queues"]),
        ("--net usr", &["'usr'", "one of user"]),
        ("--net user --net-dump frames,max=1K", &["frames,max=1K", "at least max=256K"]),
        ("--net vhost-user=a,bw=1M", &["keeps no limits"]),
        ("--net vhost-user=a --net-dump frames", &["network dump sees none"]),
        ("--net vhost-user=a --mem 64M,backing=anonymous", &["backing=anonymous", "can map such memory"]),
    ] {
        refused(&place, &format!("--kernel kernel --console off {arguments}"), BAD_ARGUMENT, words);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let arguments = format!("--kernel kernel --console off -p {port}:80");
    refused(&place, &arguments, HOST, &["cannot publish", &port, "in use"]);
    let arguments = "--kernel kernel --console off --net user,publish=192.0.2.1:8080:80/udp";
    refused(&place, arguments, BAD_ARGUMENT, &["192.0.2.1:8080/udp", "cannot publish"]);
    // More ports than open files: the hint has the number that does.
    let many = || {
        let mut command = std::process::Command::new("sh");
        let script = "ulimit -n 64; exec \"$0\" --kernel kernel --console off -p 20000-20199:1-200";
        command.args(["-c", script, crate::PROGRAM]);
        place.set_up(&mut command);
        command
    };
    refused_command(&place, many(), HOST, &["cannot publish 200 ports", "may have 64"]);
    assert!(text(&many().output().unwrap().stderr).contains("prlimit -n1224 "));
    for folder in ["run/vmm", "run/vmm/switch"] {
        std::fs::create_dir_all(place.path(folder)).unwrap();
        std::fs::set_permissions(place.path(folder), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
    }
    place.file("run/vmm/switch/taken", "");
    std::fs::create_dir(place.path("run/vmm/switch/open")).unwrap();
    for (arguments, words) in [
        ("--net switch=taken", &["segment taken", "Not a directory"][..]),
        ("--net switch=open", &["segment open", "open to other users"]),
        ("--net switch=a/b", &["a/b", "name of a network segment"]),
        ("--net switch=a,queues=2", &["several queues"]),
        ("--net macvtap=lo", &["lo", "no macvtap"]),
        ("--net macvtap=none", &["none", "no network interface"]),
        // Nobody is invited to a machine that there is not.
        ("--gdb unix:gdb --net macvtap=none", &["none", "no network interface"]),
        ("--net macvtap=a,mac=02:00:00:00:00:01", &["address of its own"]),
    ] {
        refused(&place, &format!("--kernel kernel --console off {arguments}"), BAD_ARGUMENT, words);
    }
    std::os::unix::fs::symlink("elsewhere", place.path("link")).unwrap();
    for (arguments, words) in [
        ("--net-dump frames", &["no network"][..]),
        ("--net user --net-dump frames,max=255K", &["max=255K", "at least max=256K"]),
        ("--net user --net-dump link", &["link", "symbolic link"]),
        ("--net user --net-dump no/frames", &["no/frames", "No such file"]),
        ("--net user --net-dump run", &["run", "Is a directory"]),
        ("--net user --net-dump /dev/full", &["/dev/full", "No space left"]),
        ("--net user,allow=127.0.0.53:53", &["--net user,allow=127.0.0.53:53", "opens nothing"]),
        ("--net user --net-dump kernel", &["the network dump", "the run's kernel"]),
        ("--net user,bw=0", &["lets nothing pass"]),
        ("--net user,pps=many", &["pps=10000/500"]),
    ] {
        refused(&place, &format!("--kernel kernel --console off {arguments}"), BAD_ARGUMENT, words);
    }
    assert!(!place.path("frames").exists() && !place.path("elsewhere").exists());
    let said = text(&place.vmm("--kernel kernel --net socket=missing").stderr);
    for (dump, hint) in [
        ("run", "name a file in that folder: run/frames.pcapng"),
        ("/dev/full", "make room, or name a file elsewhere"),
        ("no/frames", "make the folder first: mkdir -p no"),
        ("link", "name the file that the symbolic link leads to"),
    ] {
        let said = text(&place.vmm(&format!("--kernel kernel --net user --net-dump {dump}")).stderr);
        assert!(said.contains(&format!("hint: {hint}")), "{said}");
    }
    assert!(said.contains("passt -s missing") && said.contains("apt-get install passt"), "{said}");
    what_root_may_not_without_its_privileges(&place);
    let mut shell = Command::new("sh");
    place.set_up(&mut shell);
    shell.args(["-c", &format!("exec {} --kernel kernel --net fd=5 5<file", crate::PROGRAM)]);
    refused_command(&place, shell, BAD_ARGUMENT, &["descriptor 5", "neither a tap nor"]);
    // A listener whom nobody serves is not waited for.
    let _listener = UnixListener::bind(place.path("full")).unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = connect_at_once(&place.path("full")) {
        clients.push(client);
    }
    refused(&place, "--kernel kernel --net socket=full", BAD_ARGUMENT, &["full", "temporarily unavailable"]);
}

/// A port of the system's own, and a socket that we may not write to.
fn what_root_may_not_without_its_privileges(place: &Place) {
    if !run(Command::new("setpriv").arg("--version")) {
        return eprintln!("SKIP: ends_that_cannot_be: privileges of root: needs setpriv");
    }
    let without = |privilege: &str, arguments: &str| {
        let mut command = Command::new("setpriv");
        let of = |set: &str| format!("--{set}=-{privilege}");
        command.args([of("inh-caps"), of("bounding-set")]).arg(crate::PROGRAM);
        command.args(["--kernel", "kernel", "--console", "off"]).args(arguments.split(' '));
        place.set_up(&mut command);
        command
    };
    let lowest = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if lowest.trim().parse::<u16>().unwrap() > 7 {
        let command = || without("net_bind_service", "-p 7:80");
        refused_command(place, command(), HOST, &["127.0.0.1:7/tcp", "Permission denied"]);
        let hint = text(&command().output().unwrap().stderr);
        assert!(hint.contains("ip_unprivileged_port_start=7"), "{hint}");
    }
    let closed = place.path("closed");
    let _listener = UnixListener::bind(&closed).unwrap();
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    let command = without("dac_override", "--net socket=closed");
    refused_command(place, command, BAD_ARGUMENT, &["closed", "Permission denied"]);
}

#[test]
fn a_status_tells_of_each_network_device() {
    if !has_kvm("a_status_tells_of_each_network_device") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let listener = UnixListener::bind(place.path("wire")).unwrap();
    let _running = place.start("web", "--net user --net socket=wire,mac=02:00:00:00:00:07,bw=1M,pps=100");
    let (peer, _) = listener.accept().unwrap();
    let status = place.status("web");
    let [user, socket] = &status["networks"].as_array().unwrap()[..] else { panic!("{status}") };
    assert_eq!((&user["device"], &user["to"]), (&"virtio-net0".into(), &"user".into()));
    let nothing = serde_json::json!({"frames": 0, "bytes": 0,
        "dropped": {"filtered": 0, "no_room": 0, "malformed": 0, "link_down": 0, "refused": 0}});
    let expected = serde_json::json!({"device": "virtio-net1", "to": "socket=wire", "mac": "02:00:00:00:00:07", "up": true,
        "received": nothing, "sent": nothing});
    assert_eq!(*socket, expected);
    let said = text(&place.vmm("status web").stdout);
    let line =
        "net      virtio-net1 (socket=wire): received 0 frames, 0 bytes; sent 0 frames, 0 bytes; dropped 0";
    assert!(said.contains(line), "{said}");
    drop(peer);
}

fn connect_at_once(path: &Path) -> rustix::io::Result<rustix::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

#[test]
fn taps_that_cannot_be_and_what_is_left_of_one() {
    let test = "taps_that_cannot_be_and_what_is_left_of_one";
    if !has_kvm(test) {
        return;
    }
    let Some(single) = Interface::new("s", "") else {
        eprintln!("SKIP: {test}: needs the right to make taps (root, iproute2, /dev/net/tun)");
        return;
    };
    let other = Interface::new("o", " user nobody").unwrap();
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    place.file("halt", kernel(&HALT));
    let arguments = |tap: &str| format!("--kernel kernel --console off --net tap={tap}");
    refused(&place, &format!("{},queues=2", arguments(&single.0)), BAD_ARGUMENT, &[&single.0, "one queue"]);
    if !Path::new("/dev/vhost-net").exists() {
        refused(
            &place,
            &format!("{},vhost=on", arguments(&single.0)),
            BAD_ARGUMENT,
            &["open /dev/vhost-net"],
        );
    }

    // Root without the right to make one, or to use those of others.
    let weak = |tap: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-net_admin", "--bounding-set=-net_admin", crate::PROGRAM]);
        command.args(arguments(tap).split(' '));
        place.set_up(&mut command);
        command
    };
    let missing = format!("{}x", single.0);
    if run(Command::new("setpriv").arg("--version")) {
        refused_command(&place, weak(&missing), BAD_ARGUMENT, &["no tap", &missing]);
        refused_command(&place, weak(&other.0), BAD_ARGUMENT, &[&other.0, "another user"]);
        let hint = text(&weak(&missing).output().unwrap().stderr);
        assert!(hint.contains(&format!("sudo ip tuntap add dev {missing} mode tap")), "{hint}");
    }
    assert!(!interface(&missing).exists());

    // One that was made for a start that fails goes again, and ports are free.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let all = format!(
        "--kernel kernel --console off --net tap={missing} --net user -p {port}:80 --net socket=none"
    );
    refused(&place, &all, BAD_ARGUMENT, &["none", "No such file"]);
    assert!(!interface(&missing).exists(), "{missing} is left behind");
    drop(std::net::TcpListener::bind(("127.0.0.1", port)).unwrap());

    // In use; and one that was made goes with its VM, also where that is killed.
    for kill in [false, true] {
        let running = place.start("web", &format!("--net tap={missing} --net tap={}", single.0));
        let flags = fs::read_to_string(interface(&missing).join("flags")).unwrap();
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap();
        assert_eq!(flags & 1, 1, "it is up: {flags:#x}");
        refused(&place, &arguments(&single.0), BAD_ARGUMENT, &[&single.0, "in use"]);
        if !kill {
            assert!(place.vmm("stop web --timeout 0").status.success());
        }
        drop(running);
        let end = Instant::now() + PATIENCE;
        while interface(&missing).exists() {
            assert!(Instant::now() < end, "it is left behind");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(interface(&single.0).exists(), "one that was there stays");
    }
}
