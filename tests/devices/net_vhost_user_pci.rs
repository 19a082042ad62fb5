//! Queues that another process serves, of a device on PCI: it interrupts by the messages of the device.

use crate::back_end::Conduct;
use crate::guest::{Guest, on_pci};
use crate::net::TRANSMIT;
use crate::net_vhost_user::{Place, exchange};
use crate::on_pci::{BAR, PENDING, QUEUE_MSIX_VECTOR, QUEUE_SELECT, TABLE};

/// The message of the transmit queue; that of the configuration, which nothing here interrupts for; and none at all.
const OWN: u16 = TRANSMIT as u16 + 1;
const OTHER: u16 = 0;
const NO_VECTOR: u16 = 0xffff;

/// Which messages have come since the last look, by the number that each carries.
fn messages(guest: &Guest) -> Vec<u32> {
    guest.vm.take_messages().iter().map(|message| message.data).collect()
}

fn wait_for_message(guest: &mut Guest, vector: u16) {
    guest.wait_for("its message", |guest| messages(guest).contains(&vector.into()));
}

fn is_pending(guest: &mut Guest, vector: u16) -> bool {
    let mut bits = [0; 8];
    guest.device.read(BAR + PENDING, &mut bits);
    u64::from_le_bytes(bits) & 1 << vector != 0
}

fn mask(guest: &mut Guest, vector: u16, masked: bool) {
    guest.write_bytes(BAR + TABLE + 16 * u64::from(vector) + 12, &u32::from(masked).to_le_bytes());
}

/// The driver has the transmit queue interrupt by `vector` from now on.
fn choose(guest: &mut Guest, vector: u16) {
    guest.write_bytes(BAR + QUEUE_SELECT, &(TRANSMIT as u16).to_le_bytes());
    guest.write_bytes(BAR + QUEUE_MSIX_VECTOR, &vector.to_le_bytes());
    let mut chosen = [0; 2];
    guest.device.read(BAR + QUEUE_MSIX_VECTOR, &mut chosen);
    assert_eq!(u16::from_le_bytes(chosen), vector);
}

#[test]
fn a_message_that_is_masked_is_pending_until_the_driver_opens_it() {
    on_pci(|| {
        let mut place = Place::new();
        let _back_end = place.back_end(Conduct::default());
        let mut guest = Guest::shared(place.device());
        guest.start(0);
        for round in 0..3 {
            exchange(&mut guest, 2 * round);
            wait_for_message(&mut guest, OWN);
            assert!(!is_pending(&mut guest, OWN));
            mask(&mut guest, OWN, true);
            exchange(&mut guest, 2 * round + 1);
            guest.wait_for("its pending bit", |guest| is_pending(guest, OWN));
            assert!(!messages(&guest).contains(&OWN.into()), "round {round}: it is masked");
            mask(&mut guest, OWN, false);
            wait_for_message(&mut guest, OWN);
            assert!(!is_pending(&mut guest, OWN));
        }
    });
}

#[test]
fn a_served_ring_interrupts_by_the_message_that_its_driver_has_chosen_last() {
    on_pci(|| {
        let mut place = Place::new();
        let _back_end = place.back_end(Conduct::default());
        let mut guest = Guest::shared(place.device());
        guest.start(0);
        for (round, vector) in [OWN, OTHER, NO_VECTOR, OWN, NO_VECTOR, OTHER].into_iter().enumerate() {
            choose(&mut guest, vector);
            // Those of before.
            messages(&guest);
            exchange(&mut guest, 2 * round);
            if vector != NO_VECTOR {
                wait_for_message(&mut guest, vector);
            }
            // When the back end has let go of its rings, it has interrupted for all that it has used.
            guest.settle();
            let all = [OWN, OTHER].into_iter().filter(|other| *other != vector).map(u32::from);
            let late = messages(&guest);
            assert!(all.clone().all(|other| !late.contains(&other)), "round {round}: {late:?}");
            exchange(&mut guest, 2 * round + 1);
        }
    });
}
