//! Rings that the host's kernel serves, driven by hand: what breaks them is told, and a reset brings a working device back.

use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vmm_monitor::config;
use vmm_monitor::event_loop::Event;
use vmm_monitor::net::Ports;
use vmm_monitor::virtio::core::Core;
use vmm_monitor::virtio::net::Net;
use vmm_monitor::virtio::queue::Notifier;
use vmm_monitor::virtio::testing::{DriverRing, NEXT, ram};

use crate::guest::available;

/// ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK.
const RUNNING: u32 = 0xf;
const NEEDS_RESET: u8 = 0x40;
/// VIRTIO_F_VERSION_1 in its page.
const VERSION_1: u32 = 1;
const DATA: u64 = 0x8000;
const TRANSMIT: usize = 1;

/// An interrupt that nobody takes.
struct Line(Event);

impl Notifier for Line {
    fn used(&self, _: usize) {}

    fn config_changed(&self) {}

    fn direct(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// Waits until `done`.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Goes through the set-up of a driver with the two rings of the first pair.
fn start(core: &mut Core, rings: &[DriverRing; 2]) {
    core.write_status(0);
    core.write_status(3);
    core.accept_features(1, VERSION_1);
    core.write_status(RUNNING & !4);
    for (index, ring) in rings.iter().enumerate() {
        core.set_up_queue(index, |setup| *setup = ring.setup());
        core.set_queue_ready(index, true);
    }
    core.write_status(RUNNING);
}

#[test]
fn a_ring_that_is_broken_is_told_and_a_reset_brings_the_kernel_back() {
    if !available("vhost-net by hand") {
        return;
    }
    let config: config::Net = "tap=vmmtest4,vhost=on".parse().unwrap();
    let port = Ports::default().get(0, &config, None).unwrap();
    let ram = ram(0x10000);
    let line = Arc::new(Line(Event::new().unwrap()));
    let net = Box::new(Net::new(port, None));
    let mut core = Core::new("virtio-net0", &ram, net, line, &Arc::default()).unwrap();
    assert_eq!(core.offered_features(0) >> 18 & 7, 0, "no CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA");
    type Break = fn(&mut DriverRing);
    let breaks: [(&str, Break); 4] = [
        ("loop", |ring| ring.write_descriptor(0, DATA, 64, NEXT, 0)),
        ("not RAM", |ring| ring.write_descriptor(0, 0xfff0, 64, 0, 0)),
        ("head out of the table", |ring| ring.offer(1000)),
        ("index beyond the table", |ring| ring.set_available(1000)),
    ];
    for (case, damage) in breaks {
        let mut rings = [DriverRing::new(&ram, 0x1000, 8), DriverRing::new(&ram, 0x3000, 8)];
        start(&mut core, &rings);
        core.resume();
        // A frame that goes its way first.
        rings[TRANSMIT].add(&[(DATA, 12 + 60)], &[]);
        core.doorbells()[TRANSMIT].signal();
        wait(case, || rings[TRANSMIT].used().is_some());
        assert_eq!(core.status(), RUNNING as u8, "{case}");
        damage(&mut rings[TRANSMIT]);
        if !case.starts_with("head") && !case.starts_with("index") {
            rings[TRANSMIT].offer(0);
        }
        core.doorbells()[TRANSMIT].signal();
        wait(case, || core.status() & NEEDS_RESET != 0);
    }
    // Rings that lie where there is no memory are not taken.
    let rings = [DriverRing::new(&ram, 0x1000, 8), DriverRing::new(&ram, 0x3000, 8)];
    core.write_status(0);
    core.write_status(3);
    core.accept_features(1, VERSION_1);
    core.write_status(RUNNING & !4);
    core.set_up_queue(TRANSMIT, |setup| {
        *setup = rings[TRANSMIT].setup();
        setup.used = 0xffff_0000;
    });
    core.set_queue_ready(TRANSMIT, true);
    core.write_status(RUNNING);
    assert!(core.status() & NEEDS_RESET != 0);
    drop(core);
    assert!(!Command::new("ip").args(["link", "show", "vmmtest4"]).output().unwrap().status.success());
}
