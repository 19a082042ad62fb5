//! The way out, for one pair of queues: frames from the driver's buffers straight to a link.

use std::io::Read;

use super::Lane;
use super::header::checked;
use crate::guest_warn;
use crate::memory::Slices;
use crate::net::traffic::Drop;
use crate::net::{HEADER, Wire};
use crate::virtio::queue::Virtqueue;

/// Sends what the driver gives, as far as the link takes it and the gate of `lane` allows it. True if the link is to be waited for: a frame that
/// has to wait stays in its queue, and with it all that come behind.
pub(super) fn serve(wire: &mut dyn Wire, queue: &mut Virtqueue, features: u64, lane: &mut Lane<'_>) -> bool {
    let sent = lane.counts;
    while lane.gate.admits() {
        let Some(mut chain) = queue.pop() else { break };
        let mut header = [0; HEADER];
        let whole = chain.readable.read_exact(&mut header).is_ok();
        let len = chain.readable.len();
        match if whole { checked(header, len, features) } else { Err("without a whole header") } {
            Ok(header) => {
                if !wire.send(&header, &chain.readable) {
                    queue.put_back(chain.head);
                    return true;
                }
                lane.gate.take(len);
                let frame = &chain.readable;
                lane.frames.note(true, len, |first| Slices::of([frame], 0).copy_to(0, first));
                match wire.take_refused() {
                    false => sent.carried(len),
                    true => sent.dropped(if wire.is_up() { Drop::Refused } else { Drop::LinkDown }, 1),
                }
            }
            Err(why) => {
                guest_warn!("network: a frame of {len} bytes is dropped: {why}");
                sent.dropped(Drop::Malformed, 1);
            }
        }
        queue.complete(chain.head, 0);
    }
    // Of the last one the link may have taken only a part.
    !wire.flush()
}
