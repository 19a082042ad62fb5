//! Peers that are not gdb: whatever they send, the guest and the next gdb come to no harm.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::guests::*;
use crate::place::*;

fn packet(body: &str) -> Vec<u8> {
    let sum = body.bytes().fold(0u8, u8::wrapping_add);
    format!("${body}#{sum:02x}").into_bytes()
}

/// Sends `bytes`, and reads what comes until nothing does. The connection may break at any time.
fn send(place: &Place, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(place.path("gdb")).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut buf = [0; 4096];
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return answer,
            Ok(count) => answer.extend(&buf[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return answer,
        }
    }
}

#[test]
fn garbage_ends_a_connection_and_nothing_else() {
    if !has_kvm("garbage_ends_a_connection_and_nothing_else") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let mut guest = start(&place, "--kernel counter");
    let noise: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let huge = [&b"$m"[..], &[b'f'; 20_000], b"#00"].concat();
    let packets = [
        "m0,ffffffffffffffff",
        "mffffffffffffffff,10",
        "m,,",
        "M1000000,4:zz",
        "M2000000,ffffffff:00",
        "Xffffffffffffffff,4:abcd",
        "G00",
        "P999=0",
        "Hg-7",
        "Hgp1.ffffffff",
        "Z0,ffffffffffffffff,1",
        "Z2,1,3",
        "Z9,,",
        "z0,",
        "T99",
        "vCont;s",
        "vCont;s:p1.77",
        "vCont;x:;;",
        "m0,ffffffffffffffff",
        "qXfer:features:read:target.xml:ffffffffffffffff,ffffffff",
        "qXfer:features:read:../../etc/passwd:0,100",
        "vFile:open:2f,0,0",
        "qRcmd,6869",
        "\0\u{1}",
    ];
    let mut all = vec![
        noise,
        huge,
        b"$".to_vec(),
        b"$g#".to_vec(),
        b"$g#00".to_vec(),
        vec![3; 5000],
        vec![b'+'; 50_000],
    ];
    all.extend(packets.iter().map(|body| packet(body)));
    all.extend(packets.iter().map(|body| [packet("?"), packet(body)].concat()));
    for bytes in &all {
        send(&place, bytes);
        assert!(
            guest.child().try_wait().unwrap().is_none(),
            "after {:?}",
            String::from_utf8_lossy(&bytes[..bytes.len().min(60)])
        );
    }
    // One of them may have let it run, as gdb may; so this asks what is so either way.
    let answer = send(&place, &packet("m1000000,3"));
    assert!(answer.ends_with(&packet("66baf8")), "{:?}", String::from_utf8_lossy(&answer));
    let said = ask(&place, &["x/3xb 0x1000000", "kill"]);
    assert!(said.contains("0x66\t0xba\t0xf8"), "{said}");
    let output = guest.finish();
    assert_eq!(output.status.code(), Some(KILLED));
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}

#[test]
fn a_second_one_is_turned_away_and_one_who_does_not_read_is_dropped() {
    if !has_kvm("a_second_one_is_turned_away") {
        return;
    }
    let place = Place::new();
    place.file("counter", counter());
    let guest = start(&place, "--kernel counter");
    let mut first = UnixStream::connect(place.path("gdb")).unwrap();
    first.write_all(&packet("?")).unwrap();
    let mut buf = [0; 64];
    assert!(first.read(&mut buf).unwrap() > 0);
    assert!(send(&place, &packet("?")).is_empty(), "a second one gets no answer");
    // Asks on and on, and reads nothing: its answers fill the socket, then the monitor gives it up.
    first.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let ask_for_all = [&packet("g")[..], &packet("m1000000,400")].concat();
    let mut broken = false;
    for _ in 0..200_000 {
        broken = first.write_all(&ask_for_all).is_err();
        if broken {
            break;
        }
    }
    assert!(broken, "it is given up");
    let said = ask(&place, &["p/x $rip", "kill"]);
    assert!(said.contains("= 0x1000000"), "it never ran: {said}");
    assert_eq!(guest.finish().status.code(), Some(KILLED));
}
