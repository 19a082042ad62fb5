//! [`Registers`]: a vCPU's registers at an exit, and how they are put into [`Event`]s.

use crate::recorder::event::{Event, Kind};

/// General registers, in the order of their numbers in instructions (SDM vol. 2, table 2-2), then RIP and RFLAGS.
pub const NAMES: [&str; 18] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "rflags",
];

/// Registers that only a system call tells.
pub const SYSTEM_NAMES: [&str; 4] = ["cr0", "cr3", "cr4", "efer"];

/// Words in an event.
const WORDS: usize = 4;
/// Events that hold the general registers; the system's come in one more.
const PARTS: usize = NAMES.len().div_ceil(WORDS);

/// What a vCPU had in its registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    /// By the numbers of [`NAMES`].
    pub general: [u64; NAMES.len()],
    /// By the numbers of [`SYSTEM_NAMES`]; where they were asked for.
    pub system: Option<[u64; SYSTEM_NAMES.len()]>,
}

impl Registers {
    /// The events that hold them, for the exit at `time`.
    pub fn events(&self, time: u64) -> impl Iterator<Item = Event> {
        let general = self.general.chunks(WORDS).map(|words| {
            let mut all = [0; WORDS];
            all[..words.len()].copy_from_slice(words);
            all
        });
        general.chain(self.system).enumerate().map(move |(part, [guest, rip, address, value])| Event {
            time,
            guest,
            rip,
            address,
            value,
            kind: Kind::Registers as u8,
            count: part as u8,
            ..Event::default()
        })
    }
}

/// Puts registers together again, from the events of one track in their order.
#[derive(Debug, Default)]
pub struct Collector {
    time: u64,
    parts: usize,
    registers: Registers,
}

impl Collector {
    /// The next event of that kind. What does not go on where the last one ended begins anew.
    pub fn add(&mut self, event: &Event) {
        let part = usize::from(event.count);
        if part == 0 {
            *self = Self { time: event.time, ..Self::default() };
        }
        if event.time != self.time || part != self.parts || part > PARTS {
            *self = Self::default();
            return;
        }
        let words = [event.guest, event.rip, event.address, event.value];
        if part == PARTS {
            self.registers.system = Some(words);
        } else {
            self.registers.general.iter_mut().skip(part * WORDS).zip(words).for_each(|(to, from)| *to = from);
        }
        self.parts += 1;
    }

    /// Those of the exit at `time`, if all of them have come.
    pub fn at(&self, time: u64) -> Option<Registers> {
        (self.parts >= PARTS && self.time == time).then_some(self.registers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_apart_is_put_together_and_what_is_lost_is_not_made_up() {
        let general = std::array::from_fn(|at| at as u64 * 3 + 1);
        for system in [None, Some([7, 8, 9, 10])] {
            let registers = Registers { general, system };
            let events: Vec<_> = registers.events(5).collect();
            let mut collector = Collector::default();
            assert_eq!(collector.at(0), None);
            events.iter().for_each(|event| collector.add(event));
            assert_eq!((collector.at(5), collector.at(6)), (Some(registers), None));
            for lost in 0..PARTS {
                let mut collector = Collector::default();
                let kept = events.iter().enumerate().filter(|(at, _)| *at != lost);
                kept.for_each(|(_, event)| collector.add(event));
                assert_eq!(collector.at(5), None, "{lost}");
            }
        }
        // Numbers that no monitor writes.
        let mut collector = Collector::default();
        (0..=u8::MAX).for_each(|count| collector.add(&Event { count, ..Event::default() }));
        assert_eq!(collector.at(0), None);
    }
}
