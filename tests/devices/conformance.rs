//! One life of every device: start, traffic, drain, save, fresh device, restore, equal, go on, reset.

use std::panic::{AssertUnwindSafe, catch_unwind};

use vmm_monitor::bus::Effect;
use vmm_monitor::virtio::doorbells::EXITS;

use crate::guest::{DATA, EVENT_IDX, Guest, NEEDS_RESET, QUEUE_NOTIFY, STATUS, with_each_transport};
use crate::subjects::{Subject, all};

fn for_each(test: impl Fn(&Subject)) {
    with_each_transport(|transport| {
        for subject in all() {
            eprintln!("-- {} on {transport:?}", subject.name);
            test(&subject);
        }
    });
}

#[test]
fn a_device_lives_through_save_and_restore_in_the_middle_of_its_work() {
    for_each(|subject| {
        for without in [0, EVENT_IDX, 1 << 28] {
            let mut guest = Guest::new((subject.build)());
            guest.start(without);
            (subject.traffic)(&mut guest);
            (subject.traffic)(&mut guest);
            guest.pause();
            let saved = guest.device.save_bytes();
            guest.pause();
            assert_eq!(guest.device.save_bytes(), saved, "a paused device stands still");

            let mut guest = Guest::on(guest.unplug(), (subject.build)());
            guest.device.restore_bytes(&saved).unwrap();
            assert_eq!(guest.device.save_bytes(), saved, "restored is as saved");
            guest.device.resume();
            guest.device.resume();
            assert_eq!(guest.read(STATUS), 15);
            (subject.traffic)(&mut guest);

            guest.pause();
            guest.device.resume();
            (subject.traffic)(&mut guest);

            guest.reset();
            guest.start(without);
            (subject.traffic)(&mut guest);
            assert!(guest.interrupts() > 0);
            guest.check_guards();
        }
    });
}

#[test]
fn a_busy_queue_earns_a_doorbell_and_keeps_it_over_a_reset() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.start(0);
        for kick in 0..EXITS {
            assert_eq!(guest.vm.doorbells(), 0, "kick {kick}");
            guest.write(QUEUE_NOTIFY, 0);
        }
        assert_eq!((guest.vm.doorbells(), guest.ring(0)), (1, true));
        (subject.traffic)(&mut guest);
        guest.reset();
        // There is no such queue.
        (0..EXITS).for_each(|_| guest.write(QUEUE_NOTIFY, 0xffff));
        assert_eq!((guest.vm.doorbells(), guest.ring(0)), (1, true));
        guest.start(0);
        (subject.traffic)(&mut guest);
        guest.check_guards();
    });
}

#[test]
fn a_reset_device_is_as_built() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        let built = guest.device.save_bytes();
        guest.start(0);
        (subject.traffic)(&mut guest);
        guest.reset();
        let mut config = [0; 8];
        guest.device.read(0x100, &mut config);
        let rest = guest.unplug();
        let mut fresh = Guest::on(rest, (subject.build)());
        let mut as_built = [0; 8];
        fresh.device.read(0x100, &mut as_built);
        assert_eq!((fresh.device.save_bytes(), config), (built, as_built));
    });
}

#[test]
fn what_is_kicked_while_paused_is_done_after_resume() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.start(0);
        (subject.traffic)(&mut guest);
        guest.pause();
        let interrupts = guest.interrupts();
        // A kick of every queue, in vain or not.
        for queue in 0..guest.rings.len() {
            guest.notify(queue);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(guest.interrupts(), interrupts, "a paused device is quiet");
        guest.device.resume();
        (subject.traffic)(&mut guest);
    });
}

#[test]
fn a_machine_can_pause_between_any_two_steps_of_a_driver() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.settle();
        guest.agree(0);
        guest.settle();
        guest.set_up();
        guest.settle();
        guest.write(STATUS, 15);
        guest.settle();
        (subject.traffic)(&mut guest);
        guest.reset();
        guest.settle();
        guest.start(0);
        (subject.traffic)(&mut guest);
    });
}

#[test]
fn drivers_get_no_thread_from_their_vcpu_but_by_asking_the_machine_once() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.negotiate(0);
        guest.set_up();
        let status = |guest: &mut Guest, value: u32| guest.device.write(STATUS, &value.to_le_bytes());
        assert_eq!(status(&mut guest, 15), Effect::Serve);
        assert_eq!(status(&mut guest, 15), Effect::None, "it has asked");
        let ring = &mut guest.rings[subject.queue];
        let head = ring.add(&[(DATA, 16)], &[(DATA + 0x1000, 512), (DATA + 0x100, 1)]);
        guest.store(DATA, &[0; 16]);
        guest.notify(subject.queue);
        // Output of a console is served by the vCPU itself, all else waits for the worker.
        let at_once = guest.rings[subject.queue].used();
        assert_eq!(at_once.is_some(), subject.name.starts_with("console"));
        guest.resume();
        let done = at_once.unwrap_or_else(|| guest.rings[subject.queue].wait_used(20));
        assert_eq!(done.0, head);
        // The worker stays over a reset, and is not asked for again, but after a pause.
        guest.negotiate(0);
        guest.set_up();
        assert_eq!(status(&mut guest, 15), Effect::None);
        (subject.traffic)(&mut guest);
        guest.reset();
        guest.settle();
        guest.negotiate(0);
        guest.set_up();
        assert_eq!(status(&mut guest, 15), Effect::Serve);
        guest.resume();
        (subject.traffic)(&mut guest);
    });
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_gets_over_it() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.start(0);
        (subject.traffic)(&mut guest);
        for queue in 0..guest.rings.len() {
            guest.rings[queue].offer(u16::MAX);
            guest.notify(queue);
        }
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while guest.read(STATUS) & NEEDS_RESET == 0 {
            assert!(std::time::Instant::now() < end, "{}: NEEDS_RESET does not come", subject.name);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let reasons = guest.read(0x60);
        assert_ne!(reasons & 2, 0, "a configuration interrupt tells of it: {reasons:#x}");

        guest.pause();
        let saved = guest.device.save_bytes();
        let mut guest = Guest::on(guest.unplug(), (subject.build)());
        guest.device.restore_bytes(&saved).unwrap();
        assert_eq!(guest.device.save_bytes(), saved);
        guest.device.resume();
        assert_ne!(guest.read(STATUS) & NEEDS_RESET, 0);
        guest.start(0);
        (subject.traffic)(&mut guest);
    });
}

#[test]
fn damaged_state_is_refused_or_harmless() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        guest.start(0);
        (subject.traffic)(&mut guest);
        guest.pause();
        let saved = guest.device.save_bytes();
        let mut rest = guest.unplug();
        let mut refused = 0;
        for at in 0..saved.len() {
            let mut cases = vec![saved[..at].to_vec()];
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = saved.clone();
                bytes[at] ^= flip;
                cases.push(bytes);
            }
            for bytes in cases {
                let mut guest = Guest::on(rest, (subject.build)());
                let result = catch_unwind(AssertUnwindSafe(|| guest.device.restore_bytes(&bytes)));
                let result = result.unwrap_or_else(|_| panic!("{}: byte {at} of {bytes:?}", subject.name));
                refused += usize::from(result.is_err());
                guest.device.resume();
                guest.check_guards();
                rest = guest.unplug();
            }
        }
        assert!(refused > saved.len(), "{}: every cut is refused", subject.name);
        let mut guest = Guest::on(rest, (subject.build)());
        guest.start(0);
        (subject.traffic)(&mut guest);
    });
}

#[test]
fn negotiation_follows_the_rules() {
    for_each(|subject| {
        let mut guest = Guest::new((subject.build)());
        assert_eq!(guest.read(0), 0x7472_6976);
        assert_eq!(guest.read(4), 2);
        let offered = guest.offered();
        assert_ne!(offered & 1 << 32, 0, "VERSION_1 is offered");
        let accept = |guest: &mut Guest, page: u32, value: u32| {
            guest.write(0x24, page);
            guest.write(0x20, value);
        };
        // Out of order, and with what is not offered: FEATURES_OK does not stand.
        let bad = !offered & 0xffff_ffff;
        for (low, high, other) in
            [(0, 0, 0), (offered as u32, 0, 0), (bad as u32, 1, 0), (0, 3, 0), (0, 1, 1)]
        {
            guest.reset();
            guest.write(STATUS, 8);
            assert_eq!(guest.read(STATUS), 0, "not before DRIVER");
            guest.write(STATUS, 1);
            guest.write(STATUS, 3);
            accept(&mut guest, 2, other);
            accept(&mut guest, 0, low);
            accept(&mut guest, 1, high);

            guest.write(STATUS, 15);
            assert_eq!(guest.read(STATUS), 3, "{low:#x} {high:#x} {other:#x}");
        }
        guest.start(0);
        // Later changes do nothing: features, queues, bits taken back.
        accept(&mut guest, 0, 0);
        guest.write(0x30, 0);
        guest.write(0x80, 0);
        guest.write(0x38, 2);
        guest.write(STATUS, 1);
        assert_eq!(guest.read(STATUS), 15);
        (subject.traffic)(&mut guest);
        // A queue that is disabled stays quiet, and nothing else breaks.
        guest.write(0x44, 0);
        let ready = u32::from(!guest.can_disable_queues());
        assert_eq!(guest.read(0x44), ready);
        guest.write(0x44, 1);
        assert_eq!(guest.read(0x44), ready, "not again before a reset");
        assert_eq!(guest.read(STATUS), 15);
        guest.write(STATUS, 128);
        guest.write(STATUS, 128 | 15);
        assert_eq!(guest.read(STATUS), 128 | 15);
        guest.start(0);
        (subject.traffic)(&mut guest);
    });
}
