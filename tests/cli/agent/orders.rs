//! What `vmm agent` and `vmm stop` ask of an agent. What a guest makes of it is tested by tests/boot/agent.rs: the agent that runs on
//! this host is not to be told such things.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use vmm_agent::client::Session;
use vmm_agent::protocol::{Decoder, Exit, Facts, Message, Network, Reason, Request, Stream, VERSION};

use super::Guest;
use crate::place::*;

/// A guest with an agent that does nothing, but says what it was asked.
fn guest(answer: Message<'static>) -> (Guest, Receiver<Request>) {
    let guest = Guest::without_agent(600.0);
    let (asked, requests) = channel();
    guest.take_connections(move |_| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (asked, answer) = (asked.clone(), answer.clone());
        thread::spawn(move || {
            let (mut decoder, mut bytes) = (Decoder::default(), [0; 4096]);
            while let Ok(count @ 1..) = theirs.read(&mut bytes) {
                decoder.feed(&bytes[..count]);
                while let Some(message) = decoder.next().unwrap() {
                    let reply = match message {
                        Message::Hello { nonce, .. } => Message::Hello { version: VERSION, nonce },
                        Message::Request(Request::Facts) => Message::Facts(Facts::default()),
                        Message::Request(request) => {
                            if matches!(request, Request::Renew(_)) {
                                let complaint = Message::Data(Stream::Stderr, b"10-a: exit status: 3\n");
                                let first = [Message::Started.to_vec(), complaint.to_vec()].concat();
                                theirs.write_all(&first).unwrap();
                            }
                            asked.send(request).unwrap();
                            answer.clone()
                        }
                        // For what it complained of.
                        Message::Credit(..) => continue,
                        other => panic!("{other:?}"),
                    };
                    theirs.write_all(&reply.to_vec()).unwrap();
                }
            }
        });
        Some(ours)
    });
    (guest, requests)
}

#[test]
fn a_guest_is_told_the_time_a_seed_its_name_and_its_network() {
    let (guest, requests) = guest(Message::Exit(Exit::Code(0)));
    let asked = |arguments: &str| {
        let output = guest.vmm(arguments);
        assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
        requests.try_recv().unwrap()
    };
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
    let before = now();
    let Request::SetTime(told) = asked("agent time web") else { panic!("another request") };
    assert!((before..now()).contains(&u128::from(told)), "{told}");
    let seeds = [(); 2].map(|()| asked("agent reseed web"));
    assert!(matches!(&seeds[0], Request::Reseed(seed) if seed.len() == 32) && seeds[0] != seeds[1]);
    assert_eq!(asked("agent hostname web copy"), Request::SetHostname(b"copy".to_vec()));
    let address = |text: &str| text.parse().unwrap();
    let network = Network {
        device: b"eth0".to_vec(),
        address: address("10.0.2.16"),
        bits: 24,
        gateway: None,
        dns: None,
    };
    assert_eq!(asked("agent network web 10.0.2.16/24"), Request::SetNetwork(network.clone()));
    let all = Network {
        device: b"ens3".to_vec(),
        gateway: Some(address("10.0.2.2")),
        dns: Some(address("10.0.2.3")),
        ..network
    };
    let arguments = "agent network web 10.0.2.16/24 --gateway 10.0.2.2 --dns 10.0.2.3 --device ens3";
    assert_eq!(asked(arguments), Request::SetNetwork(all));
}

#[test]
fn a_copy_gets_another_generation_and_seed_each_time_and_names_if_that_is_asked_for() {
    let (guest, requests) = guest(Message::Exit(Exit::Code(0)));
    let asked = |options: &str| {
        let output = guest.vmm(&format!("agent renew web {options}"));
        assert!(output.status.success(), "{options}: {}", text(&output.stderr));
        let Request::Renew(renewal) = requests.try_recv().unwrap() else { panic!("another request") };
        renewal
    };
    let (one, two) = (asked(""), asked("--hostname copy --machine-id"));
    assert!(one.generation != two.generation && one.seed != two.seed && two.time > one.time);
    assert_eq!((one.seed.len(), &*one.hostname, one.machine_id), (32, &b""[..], false));
    assert_eq!((two.seed.len(), &*two.hostname, two.machine_id), (32, &b"copy"[..], true));
}

#[test]
fn what_fails_in_a_copy_is_told() {
    let (guest, _requests) = guest(Message::Exit(Exit::Code(1)));
    refused(&guest.place, "agent renew web", HOST, &["10-a: exit status: 3"]);
}

#[test]
fn what_the_guest_refuses_and_what_makes_no_sense_is_told() {
    let (guest, requests) =
        guest(Message::Failed(Reason::Refused, b"the guest cannot set up eth0: no such device"));
    let output = guest.vmm("agent network web 10.0.2.16/24");
    assert_eq!(output.status.code(), Some(HOST));
    assert!(text(&output.stderr).contains("cannot set up eth0"), "{}", text(&output.stderr));
    assert!(requests.try_recv().is_ok());
    for address in ["10.0.2.16", "10.0.2/24", "10.0.2.16/33", "fe80::1/64"] {
        let output = guest.vmm(&format!("agent network web {address}"));
        assert_eq!(output.status.code(), Some(BAD_ARGUMENT), "{address}");
        assert!(text(&output.stderr).contains("10.0.2.15/24"), "{address}: {}", text(&output.stderr));
    }
    for (arguments, words) in [
        ("10.0.2.77/24 --gateway 1.2.3.4", "gateway 1.2.3.4 is no other host of the network 10.0.2.0/24"),
        ("10.0.2.77/24 --gateway 10.0.2.77", "no other host"),
        ("10.0.2.77/32 --gateway 10.0.2.2", "no other host"),
        ("10.0.2.0/24", "no address that a host can have"),
        ("10.0.2.255/24", "no address that a host can have"),
        ("0.0.0.0/24", "no address that a host can have"),
        ("127.0.0.2/8", "no address that a host can have"),
        ("224.0.0.1/24", "no address that a host can have"),
        ("10.0.2.15/24 --device a-name-of-16-byt", "at most 15 bytes"),
    ] {
        refused(&guest.place, &format!("agent network web {arguments}"), BAD_ARGUMENT, &[words]);
    }
    let long = format!("{}.{}", "a".repeat(32), "b".repeat(32));
    for name in ["", "a b", "-a", "a-", "a..b", "a_b", ".", &"a".repeat(64), &long] {
        let mut command = guest.command("agent hostname web");
        command.arg("--").arg(name);
        refused_command(&guest.place, command, BAD_ARGUMENT, &["is no host name"]);
    }
    assert!(requests.try_recv().is_err(), "nothing was asked");
}

/// The real agent, which asks before it changes anything: here it finds no such interface either.
#[test]
fn the_agent_refuses_a_gateway_outside_the_network_before_it_changes_anything() {
    let guest = Guest::new();
    let address = |text: &str| text.parse().unwrap();
    let network = Network {
        device: b"nosuch0".to_vec(),
        address: address("10.0.2.16"),
        bits: 24,
        gateway: Some(address("1.2.3.4")),
        dns: None,
    };
    let order = |network| {
        let agent = UnixStream::connect(guest.place.path("agent")).unwrap();
        let error = Session::order(agent, Request::SetNetwork(network), Instant::now() + PATIENCE);
        error.unwrap_err().to_string()
    };
    let said = order(network.clone());
    assert!(said.contains("gateway 1.2.3.4 is outside the network"), "{said}");
    let said = order(Network { gateway: None, ..network });
    assert!(said.contains("set up nosuch0") && !said.contains("gateway"), "{said}");
}

/// The virtual machine here does not heed any button.
#[test]
fn an_agent_shuts_down_the_guest_whose_power_button_does_nothing() {
    let (guest, requests) = guest(Message::Exit(Exit::Code(0)));
    let mut stop = guest.command("stop web").spawn().unwrap();
    assert_eq!(requests.recv_timeout(PATIENCE).unwrap(), Request::ShutDown);
    stop.kill().unwrap();
    stop.wait().unwrap();
}
