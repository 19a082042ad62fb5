//! The way out, for one pair of queues: frames from the driver's buffers straight to a link.

use std::io::Read;

use super::header::checked;
use crate::guest_warn;
use crate::net::{HEADER, Wire};
use crate::virtio::queue::Virtqueue;

/// Sends what the driver gives, as far as the link takes it. True if there is more: a frame that has to wait stays in its queue,
/// and with it all that come behind.
pub fn serve(wire: &mut dyn Wire, queue: &mut Virtqueue, features: u64) -> bool {
    while let Some(mut chain) = queue.pop() {
        let mut header = [0; HEADER];
        let whole = chain.readable.read_exact(&mut header).is_ok();
        let len = chain.readable.len();
        match if whole { checked(header, len, features) } else { Err("without a whole header") } {
            Ok(header) => {
                if !wire.send(&header, &chain.readable) {
                    queue.put_back(chain.head);
                    return true;
                }
            }
            Err(why) => guest_warn!("network: a frame of {len} bytes is dropped: {why}"),
        }
        queue.complete(chain.head, 0);
    }
    // Of the last one the link may have taken only a part.
    !wire.flush()
}
