//! The worker's turns: a driver that offers as fast as the device takes cannot keep it in one callback.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_monitor::state::Stateless;
use vmm_monitor::virtio::device::{Traits, VirtioDevice};
use vmm_monitor::virtio::queue::Virtqueue;
use vmm_monitor::virtio::testing::DriverRing;

use crate::guest::{DATA, Guest};

/// Requests that the driver makes in all.
const ALL: usize = 5000;

/// A driver that puts a request back as soon as the device has answered it, and what the device saw of it.
#[derive(Default)]
struct Busy {
    ring: Option<DriverRing>,
    served: usize,
    /// The most requests that came out of the queue in one callback.
    longest: usize,
}

struct Device(Arc<Mutex<Busy>>);

impl VirtioDevice for Device {
    fn traits(&self) -> Traits {
        Traits { kind: 4, features: 0, queues: vec![64] }
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Virtqueue]) {
        let mut busy = self.0.lock().unwrap();
        let mut turn = 0;
        while let Some(chain) = queues[index].pop() {
            queues[index].complete(chain.head, 0);
            busy.served += 1;
            turn += 1;
            let more = busy.served < ALL;
            if let Some(ring) = busy.ring.as_mut() {
                while ring.used().is_some() {}
                if more {
                    ring.add(&[], &[(DATA, 16)]);
                }
            }
        }
        busy.longest = busy.longest.max(turn);
    }
}

impl Stateless for Device {}

#[test]
fn a_callback_ends_while_the_driver_goes_on_offering() {
    let busy = Arc::new(Mutex::new(Busy::default()));
    let mut guest = Guest::new(Box::new(Device(busy.clone())));
    guest.start(0);
    let mut ring = guest.rings.remove(0);
    ring.add(&[], &[(DATA, 16)]);
    busy.lock().unwrap().ring = Some(ring);
    // One kick; the worker gives itself the other turns.
    guest.notify(0);
    let end = Instant::now() + Duration::from_secs(10);
    while busy.lock().unwrap().served < ALL {
        assert!(Instant::now() < end, "{} of {ALL} served", busy.lock().unwrap().served);
        std::thread::sleep(Duration::from_millis(1));
    }
    let longest = busy.lock().unwrap().longest;
    assert!((1..=1000).contains(&longest), "{longest} requests in one callback");
}
