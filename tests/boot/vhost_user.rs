//! A network whose queues another process serves, under real guests: over pauses, over reboots, and with that process gone.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::AsRawFd;
use std::process::Command;

use crate::back_end::{BackEnd, Conduct, Wire};
use crate::guest::{Guest, Kernel, available, vmm};

/// A tap called `name`, of this process, whose host has the address 10.98.`net`.1. It goes with its descriptor.
fn tap(name: &str, net: u8) -> File {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // struct ifreq: the name, and IFF_TAP | IFF_NO_PI.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&0x1002u16.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which has 40 bytes.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) }, 0);
    for arguments in [format!("addr add 10.98.{net}.1/24 dev {name}"), format!("link set {name} up")] {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
    }
    file
}

/// The guest sends 1 MiB by TCP, which comes back, each time that it boots, on our kernel and on Debian's; then its back end goes.
#[test]
fn another_process_serves_a_guests_queues_over_pauses_and_reboots() {
    if !available("vhost-user") {
        return;
    }
    for (kernel, name, net) in [(Kernel::TunedPvh, "vmmtest5", 11), (Kernel::Stock, "vmmtest6", 12)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("back-end");
        let back_end = BackEnd::listen(&path, Conduct::default(), Wire::Host(tap(name, net)));
        let listener = TcpListener::bind(format!("10.98.{net}.1:7000")).unwrap();
        let script = format!(
            "ip addr add 10.98.{net}.2/24 dev eth0; ip link set eth0 up; head -c 1048576 /dev/urandom >/d; \
             sha256sum </d; echo sends; nc 10.98.{net}.1 7000 </d | sha256sum; \
             ping -q -c 3 -W 20 10.98.{net}.1 | grep -o '3 packets received'; echo round; \
             until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do read -t 1 x; done; echo no-carrier; reboot -f"
        );
        let mut command = vmm(kernel, &script);
        command.args(["--mem", "512M", "--cpus", "2", "--name", "v", "--on-reboot", "reset"]);
        command.args(["--net", &format!("vhost-user={}", path.display())]);
        let guest = Guest::start(command);
        for round in 1..=2 {
            guest.wait_for("sends", round);
            for _ in 0..5 {
                assert_eq!(guest.control(&["pause", "v"]).0, Some(0));
                assert_eq!(guest.control(&["resume", "v"]).0, Some(0));
            }
            let (mut peer, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            peer.read_to_end(&mut all).unwrap();
            assert_eq!(all.len(), 1 << 20);
            peer.write_all(&all).unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            guest.wait_for("round", round);
            // The guest sees the link go down, boots again, and is served again by the one that is back.
            back_end.hang_up();
            guest.wait_for("no-carrier", round);
        }
        let text = guest.text();
        let sums: Vec<_> = text.lines().filter(|line| line.trim_end().ends_with("  -")).collect();
        assert_eq!(sums[0], sums[1], "{kernel:?}: what came back is what was sent: {text}");
        assert_eq!(sums[2], sums[3], "{kernel:?}: {text}");
        assert_eq!(text.matches("3 packets received").count(), 2, "{kernel:?}: {text}");
        assert_eq!(guest.control(&["kill", "v"]).0, Some(0));
    }
}
