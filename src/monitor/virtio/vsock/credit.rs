//! [`Credit`]: how many bytes either side of a connection may send before the other has made room (virtio 1.3, 5.10.6.3).
//!
//! All counts run freely and wrap. Knows no sockets and no queues.

/// Both directions of one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credit {
    /// Bytes of the guest's that may be on their way here, or wait here.
    buf_alloc: u32,
    /// Bytes that have come from the guest.
    received: u32,
    /// Those of them that wait here no more.
    forwarded: u32,
    /// How many the guest was last told are forwarded.
    told: u32,
    /// Bytes of ours that may be on their way to the guest, or wait there.
    peer_alloc: u32,
    /// Bytes that were sent to the guest.
    sent: u32,
    /// How many the guest has last told are taken.
    taken: u32,
}

impl Credit {
    /// Nothing has gone either way. We have room for `buf_alloc` bytes; the guest has yet to tell.
    pub fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, received: 0, forwarded: 0, told: 0, peer_alloc: 0, sent: 0, taken: 0 }
    }

    /// Room that the guest has, in all.
    pub fn peer_alloc(&self) -> u32 {
        self.peer_alloc
    }

    /// `len` bytes come from the guest. False if they are more than it was given room for.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let fits = len <= self.buf_alloc.saturating_sub(waiting);
        if fits {
            self.received = self.received.wrapping_add(len);
        }
        fits
    }

    /// `len` of the bytes that came wait no more.
    pub fn forward(&mut self, len: u32) {
        let waiting = self.received.wrapping_sub(self.forwarded);
        self.forwarded = self.forwarded.wrapping_add(len.min(waiting));
    }

    /// None of the bytes that came wait any more.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Whether the guest, for all that it knows, has less than half of the room left, and there is more.
    pub fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.buf_alloc.div_ceil(2)
    }

    /// What a packet to the guest says: the room in all, and how many bytes are forwarded.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }

    /// What a packet from the guest says. Packets may overtake each other, and a guest may say anything: a count that goes back, or
    /// ahead of what was sent, says nothing.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        if fwd_cnt.wrapping_sub(self.taken) <= self.in_flight() {
            self.taken = fwd_cnt;
        }
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.taken)
    }

    /// Bytes that may be sent to the guest now.
    pub fn free(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.in_flight())
    }

    /// `len` bytes go to the guest: at most [`Credit::free`].
    pub fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What can happen to a connection.
    #[derive(Debug, Clone)]
    enum Step {
        Receive(u32),
        Forward(u32),
        Tell,
        Send(u32),
        /// The guest takes so many of what is in flight, and tells of it.
        Take(u32),
        /// It tells something, whatever that is.
        Say(u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let len = || prop_oneof![0..300u32, 0..0x2_0000u32, any::<u32>()];
        prop_oneof![
            len().prop_map(Step::Receive),
            len().prop_map(Step::Forward),
            Just(Step::Tell),
            len().prop_map(Step::Send),
            len().prop_map(Step::Take),
            (len(), any::<u32>()).prop_map(|(alloc, count)| Step::Say(alloc, count)),
        ]
    }

    proptest! {
        /// A model in 64 bits, which never wraps, beside the counts, which begin shortly before they do.
        #[test]
        fn counts_agree_with_those_that_do_not_wrap(
            buf_alloc in 1..0x4_0000u32,
            start in prop_oneof![Just(0), (u32::MAX - 0x8_0000)..],
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut credit = Credit::new(buf_alloc);
            (credit.received, credit.forwarded, credit.told) = (start, start, start);
            (credit.sent, credit.taken) = (start, start);
            let [mut received, mut forwarded, mut told, mut sent, mut taken, mut alloc] = [0u64; 6];
            for step in steps {
                match step {
                    Step::Receive(len) => {
                        let fits = received + u64::from(len) - forwarded <= buf_alloc.into();
                        prop_assert_eq!(credit.receive(len), fits);
                        received += if fits { len.into() } else { 0 };
                    }
                    Step::Forward(len) => {
                        credit.forward(len);
                        forwarded = received.min(forwarded + u64::from(len));
                    }
                    Step::Tell => {
                        prop_assert_eq!(credit.tell(), (buf_alloc, start.wrapping_add(forwarded as u32)));
                        told = forwarded;
                    }
                    Step::Send(len) => {
                        let len = len.min(credit.free());
                        credit.send(len);
                        sent += u64::from(len);
                    }
                    Step::Take(len) => {
                        alloc = 0x1_0000;
                        taken += u64::from(len).min(sent - taken);
                        credit.hear(alloc as u32, start.wrapping_add(taken as u32));
                    }
                    Step::Say(room, count) => {
                        alloc = room.into();
                        let said = count.wrapping_sub(start.wrapping_add(taken as u32));
                        taken += if u64::from(said) <= sent - taken { said.into() } else { 0 };
                        credit.hear(room, count);
                    }
                }
                prop_assert!(received - forwarded <= buf_alloc.into(), "what waits here has room");
                prop_assert_eq!(u64::from(credit.free()), alloc.saturating_sub(sent - taken));
                let due = forwarded - told >= u64::from(buf_alloc).div_ceil(2);
                prop_assert_eq!(credit.is_update_due(), due);
                // A guest that may send nothing more, for all that it knows, hears of room as soon as nothing waits here.
                let knows = u64::from(buf_alloc) - (received - told);
                prop_assert!(knows > 0 || forwarded < received || due);
            }
        }
    }

    #[test]
    fn a_guest_that_sends_all_it_may_is_told_of_room_before_it_stands_still() {
        for buf_alloc in [1, 2, 3, 8192, 0x4_0000] {
            let mut credit = Credit::new(buf_alloc);
            assert!(credit.receive(buf_alloc) && !credit.receive(1));
            assert!(!credit.is_update_due(), "there is no room");
            credit.forward(buf_alloc);
            assert!(credit.is_update_due());
            credit.tell();
            assert!(!credit.is_update_due() && credit.receive(buf_alloc));
        }
    }
}
