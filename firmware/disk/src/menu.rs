//! The menu: one second to choose, if there is a choice. A digit boots, the arrows choose, Enter boots what is chosen.

use crate::clock::Clock;
use crate::console::{Console, say};
use bootdisk::entries::Entries;
use core::fmt::Write;

const MILLISECONDS: u64 = 1000;
/// How often to look at the serial port, whose every look is an exit.
const LOOK_EVERY: u64 = 10;

/// Which entry to boot.
pub fn choose(entries: &Entries, console: &mut Console) -> usize {
    let mut chosen = entries.default;
    let last = entries.all().len().saturating_sub(1);
    for (index, entry) in entries.all().iter().enumerate() {
        let _ = write!(console, "{} {:2}  ", if index == chosen { '*' } else { ' ' }, index + 1);
        let _ = entry.show(console);
        let _ = console.write_str("\r\n");
    }
    if last == 0 {
        return chosen;
    }
    say!(console, "boots {} in a second; or type a number, or choose by the arrows", chosen + 1);
    let (clock, mut looked) = (Clock::start(), 0);
    // Where in an arrow's three bytes we are, and whether somebody is there: then there is no hurry.
    let (mut escape, mut stay) = (0, false);
    let chosen = 'chosen: loop {
        let now = clock.milliseconds();
        if now >= MILLISECONDS && !stay {
            break chosen;
        }
        if now < looked + LOOK_EVERY {
            core::hint::spin_loop();
            continue;
        }
        looked = now;
        while let Some(byte) = console.typed() {
            match (escape, byte) {
                (_, 0x1b) => escape = 1,
                (1, b'[' | b'O') => escape = 2,
                (2, b'A' | b'B') => {
                    chosen = if byte == b'A' { chosen.saturating_sub(1) } else { (chosen + 1).min(last) };
                    (escape, stay) = (0, true);
                    let _ = write!(console, "\r{:2} ", chosen + 1);
                    console.flush();
                }
                (_, b'\r' | b'\n') => break 'chosen chosen,
                (_, b'1'..=b'9') if usize::from(byte - b'1') <= last => break 'chosen usize::from(byte - b'1'),
                _ => escape = 0,
            }
        }
    };
    if stay {
        say!(console, "");
    }
    chosen
}
