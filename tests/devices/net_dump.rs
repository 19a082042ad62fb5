//! The frames of network devices in a pcapng file: read back by a reader of our own, and by tshark where it is installed.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use vmm_monitor::config::Net as Config;
use vmm_monitor::net::traffic::Network;
use vmm_monitor::net::{HEADER, Ports};
use vmm_monitor::virtio::net::Net;

use crate::guest::{DATA, Guest};
use crate::net::{RECEIVE, TRANSMIT, numbered, offer, send};
use crate::subjects::Peer;

/// A device whose frames go to `file`, with its peer, and what keeps the dump.
fn guest(dir: &Path, file: &str) -> (Guest, Peer, Ports) {
    let listener = std::os::unix::net::UnixListener::bind(dir.join("wire")).unwrap();
    let config: Config =
        format!("socket={},mac=02:00:00:00:00:07", dir.join("wire").display()).parse().unwrap();
    let mut ports = Ports::default();
    ports.note_frames();
    let port = ports.get(0, &config, None).unwrap();
    let network = Network {
        device: "virtio-net0".to_owned(),
        to: config.to.clone(),
        mac: config.mac.unwrap(),
        traffic: port.traffic.clone(),
    };
    let file = dir.join(file).display().to_string().parse().unwrap();
    ports.start_dump(&file, &[network]).unwrap();
    let mut guest = Guest::new(Box::new(Net::new(port, None)));
    guest.start(0);
    let (peer, _): (UnixStream, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    (guest, Peer::Stream(peer), ports)
}

/// A packet of a file: nanoseconds, direction, length, and its bytes.
type Packet = (u64, u32, usize, Vec<u8>);

/// Packets, what the interfaces' options say, and the statistics at the end.
#[allow(clippy::type_complexity, reason = "read once, by name")]
fn read(path: &Path) -> (Vec<Packet>, Vec<Vec<u8>>, Vec<(u64, u64)>) {
    let bytes = fs::read(path).unwrap();
    let (mut packets, mut interfaces, mut statistics) = (Vec::new(), Vec::new(), Vec::new());
    let mut rest = &bytes[..];
    let word = |bytes: &[u8], at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    while !rest.is_empty() {
        let (kind, len) = (word(rest, 0), word(rest, 4) as usize);
        assert!(len.is_multiple_of(4) && word(rest, len - 4) as usize == len, "{kind:#x} of {len} bytes");
        let body = &rest[8..len - 4];
        match kind {
            0x0a0d_0d0a => {
                assert_eq!((word(body, 0), rest.len()), (0x1a2b_3c4d, bytes.len()), "it is the first")
            }
            1 => interfaces.push(body.to_vec()),
            6 => {
                let nanos = u64::from(word(body, 4)) << 32 | u64::from(word(body, 8));
                let (kept, len) = (word(body, 12) as usize, word(body, 16) as usize);
                let flags = &body[20 + kept.next_multiple_of(4)..];
                assert_eq!(word(flags, 0), 0x0004_0002);
                packets.push((nanos, word(flags, 4), len, body[20..20 + kept].to_vec()));
            }
            5 => {
                let long = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
                statistics.push((long(16), long(28)));
            }
            _ => panic!("block of kind {kind:#x}"),
        }
        rest = &rest[len..];
    }
    (packets, interfaces, statistics)
}

#[test]
fn frames_are_in_the_file_as_they_passed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut peer, ports) = guest(dir.path(), "frames");
    let before =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    offer(&mut guest, 3, 2048);
    for number in 0..3 {
        send(&mut guest, TRANSMIT, [0; HEADER], &numbered(number, 61 + number));
        guest.rings[TRANSMIT].wait_used(10);
        assert_eq!(peer.receive(), numbered(number, 61 + number));
        peer.send(&numbered(number, 1500));
        guest.rings[RECEIVE].wait_used(10);
    }
    // Longer than the buffers, which are one for each frame now: there as far as they go.
    guest.start(1 << 15);
    offer(&mut guest, 1, 128);
    peer.send(&numbered(7, 1000));
    peer.send(&numbered(8, 100));
    assert_eq!(guest.rings[RECEIVE].wait_used(10).1, 112);
    guest.pause();
    drop((guest, ports));
    let path = dir.path().join("frames");
    let (packets, interfaces, statistics) = read(&path);
    let told: Vec<_> =
        packets.iter().map(|(_, direction, len, bytes)| (*direction, *len, bytes.clone())).collect();
    let mut expected: Vec<_> =
        (0..3).flat_map(|n| [(2, 61 + n, numbered(n, 61 + n)), (1, 1500, numbered(n, 1500))]).collect();
    expected.push((1, 1000, numbered(7, 116)));
    expected.push((1, 100, numbered(8, 100)));
    assert!(told == expected, "{told:?}");
    let times: Vec<_> = packets.iter().map(|packet| packet.0).collect();
    assert!(times.is_sorted() && times[0] >= before && times[0] - before < 600_000_000_000, "{times:?}");
    assert_eq!((interfaces.len(), statistics), (1, vec![(8, 0)]));
    let says = |what: &[u8]| interfaces[0].windows(what.len()).any(|part| part == what);
    assert!(says(b"virtio-net0") && says(b"socket=") && says(&[2, 0, 0, 0, 0, 7]) && says(b"checksum"));
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    judge(&path, 8);
}

/// What Wireshark's own reader says of the file.
fn judge(path: &Path, packets: usize) {
    let tshark = |arguments: &[&str]| Command::new("tshark").arg("-r").arg(path).args(arguments).output();
    let Ok(output) = tshark(&["-T", "fields", "-e", "frame.interface_name", "-e", "frame.len"]) else {
        return eprintln!("SKIP: what tshark says of a network dump: it is not installed");
    };
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{errors}");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), packets, "{said}{errors}");
    assert!(lines.iter().all(|line| line.starts_with("virtio-net0\t")), "{said}");
    assert!(!errors.contains("damaged") && !errors.contains("cut short"), "{errors}");
    let infos = Command::new("capinfos").arg("-M").arg(path).output().unwrap();
    let infos = String::from_utf8_lossy(&infos.stdout);
    for words in
        ["nanoseconds (9)", "Number of packets = 8", "Strict time order:   True", "Name = virtio-net0"]
    {
        assert!(infos.contains(words), "no {words:?} in {infos}");
    }
}

#[test]
fn a_full_file_begins_anew_with_a_head_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut peer, ports) = guest(dir.path(), "frames,max=256K");
    guest.store(DATA + 0x1000, &[0; HEADER]);
    for number in 0..70 {
        send(&mut guest, TRANSMIT, [0; HEADER], &numbered(number, 9000));
        guest.rings[TRANSMIT].wait_used(10);
        peer.receive();
    }
    guest.pause();
    drop((guest, ports));
    let (path, older) = (dir.path().join("frames"), dir.path().join("frames.1"));
    let numbers = |path: &Path| {
        let (packets, interfaces, _) = read(path);
        assert_eq!(interfaces.len(), 1);
        assert!(fs::metadata(path).unwrap().len() <= 256 << 10);
        packets.iter().map(|packet| usize::from(packet.3[8999])).collect::<Vec<_>>()
    };
    let both = [numbers(&older), numbers(&path)].concat();
    assert!(
        both.len() > 28 && both == (70 - both.len()..70).collect::<Vec<_>>(),
        "the latest, and none twice: {both:?}"
    );
}

#[test]
fn a_file_that_takes_nothing_stalls_nobody_and_one_that_fails_ends_the_dump_alone() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let reader = rustix::fs::open(&fifo, flags, 0.into()).unwrap();
    let (mut guest, mut peer, ports) = guest(dir.path(), "fifo");
    // More than the queue and the pipe hold.
    let mut exchange = |count: usize| {
        for number in 0..count {
            send(&mut guest, TRANSMIT, [0; HEADER], &numbered(number, 60_000));
            guest.rings[TRANSMIT].wait_used(10);
            assert_eq!(peer.receive().len(), 60_000);
        }
    };
    exchange(100);
    // Nobody reads it any more.
    drop(reader);
    exchange(3);
    drop(guest);
    let start = std::time::Instant::now();
    drop(ports);
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "an end that came is not waited for");
}
