//! What init waits for: its children, signals that ask for an end, and the power button. No acpid runs in our guests, and
//! the kernel itself does nothing about the button but report a key, so PID 1 listens to it.

use crate::agent::Agent;
use crate::finish::{NOT_RUN, Outcome};
use crate::kernel::{has_power_key, next_signal, take_signals};
use crate::mounts::Text;
use crate::orders::End;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, Timespec, open};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};

/// ACPI knows a fixed power button and any number of button devices; a machine has one or two.
const BUTTONS: usize = 4;

/// sizeof(struct input_event) on 64-bit: a timeval, type, code and value.
const EVENT_SIZE: usize = 24;

/// The descriptors that init sleeps on.
#[derive(Debug)]
pub struct Watch {
    signals: Option<OwnedFd>,
    buttons: [Option<OwnedFd>; BUTTONS],
}

/// Why init woke up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// At least one child has ended.
    Child,
    /// The machine shall end.
    End(End),
    /// Nothing came in time.
    Timeout,
}

impl Watch {
    /// Takes the signals and opens every input device with a power key. To be called when modules are loaded.
    pub fn start() -> Self {
        let signals =
            take_signals().inspect_err(|&error| crate::console::complain(b"take", b"signals", error)).ok();
        let mut buttons = [const { None }; BUTTONS];
        let mut count = 0;
        for number in 0..32 {
            let mut path = Text::<32>::new();
            path.push(b"/dev/input/event");
            path.push(Text::<12>::decimal(number).bytes());
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(device) = open(path.bytes(), flags, Mode::empty()) else {
                break;
            };
            if count < BUTTONS && has_power_key(&device) {
                buttons[count] = Some(device);
                count += 1;
            }
        }
        Self { signals, buttons }
    }

    /// Sleeps until something happens, or `milliseconds` have passed.
    pub fn next(&self, milliseconds: Option<u32>) -> Event {
        let Some(signals) = &self.signals else {
            return Event::Child;
        };
        let timeout = milliseconds
            .map(|ms| Timespec { tv_sec: i64::from(ms / 1000), tv_nsec: i64::from(ms % 1000) * 1_000_000 });
        loop {
            if let Some(event) = next_signal(signals.as_fd()).and_then(event_of_signal) {
                return event;
            }
            if self.buttons.iter().flatten().any(pressed) {
                return Event::End(End::PowerOff);
            }
            let mut fds = [const { None }; 1 + BUTTONS];
            fds[0] = Some(signals.as_fd());
            for (slot, button) in fds[1..].iter_mut().zip(&self.buttons) {
                *slot = button.as_ref().map(AsFd::as_fd);
            }
            // A missing button waits on the signals twice: harmless, and the array keeps its size.
            let mut polled =
                fds.map(|fd| PollFd::from_borrowed_fd(fd.unwrap_or(signals.as_fd()), PollFlags::IN));
            if poll(&mut polled, timeout.as_ref()) == Ok(0) {
                return Event::Timeout;
            }
        }
    }

    /// Reaps children until `child` ends or somebody asks for an end, which is `end` unless they say otherwise. Keeps `agent`
    /// running meanwhile.
    ///
    /// # Safety
    /// The process must have one thread.
    pub unsafe fn until_end_of(&self, child: Pid, end: End, mut agent: Option<Agent>) -> Outcome {
        loop {
            let pause = agent.as_ref().and_then(Agent::pause);
            match self.next(pause) {
                Event::Child => {
                    if let Some(code) = self.reap(child, &mut agent) {
                        return Outcome { code: Some(code), end, child: None };
                    }
                }
                Event::End(end) => {
                    return Outcome { code: None, end, child: Some(child) };
                }
                Event::Timeout => {}
            }
            if let Some(agent) = agent.as_mut().filter(|agent| agent.pause() == Some(0)) {
                // SAFETY: this function's own contract.
                unsafe { agent.start() };
            }
        }
    }

    /// Reaps all that have ended; the exit code of `child` if it was among them.
    fn reap(&self, child: Pid, agent: &mut Option<Agent>) -> Option<i32> {
        // Without a descriptor for signals this is where init sleeps.
        let options = if self.signals.is_some() { WaitOptions::NOHANG } else { WaitOptions::empty() };
        while let Ok(Some((pid, status))) = wait(options) {
            if pid == child {
                return Some(exit_code(status));
            }
            if let Some(agent) = agent {
                agent.note_end_of(pid);
            }
        }
        None
    }
}

/// As a shell has it: 128 and the signal for those that a signal ended.
pub(crate) fn exit_code(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (_, Some(signal)) => 128 + signal,
        _ => NOT_RUN,
    }
}

/// The signals by which busybox's poweroff, reboot and halt speak to PID 1, SIGPWR, and SIGINT for Ctrl-Alt-Del.
fn event_of_signal(number: i32) -> Option<Event> {
    match Signal::from_named_raw(number)? {
        Signal::CHILD => Some(Event::Child),
        Signal::USR2 | Signal::POWER => Some(Event::End(End::PowerOff)),
        Signal::TERM | Signal::INT => Some(Event::End(End::Reboot)),
        Signal::USR1 => Some(Event::End(End::Halt)),
        _ => None,
    }
}

/// Whether KEY_POWER has gone down. Takes all pending events.
fn pressed(button: &OwnedFd) -> bool {
    let mut event = [0u8; EVENT_SIZE];
    let mut down = false;
    while let Ok(EVENT_SIZE) = rustix::io::read(button, &mut event) {
        down |= is_power_press(&event);
    }
    down
}

fn is_power_press(event: &[u8; EVENT_SIZE]) -> bool {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    half(16) == EV_KEY && half(18) == KEY_POWER && half(20) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_power_key_going_down_counts() {
        let mut event = [0; EVENT_SIZE];
        assert!(!is_power_press(&event));
        event[16] = 1;
        event[18] = 116;
        assert!(!is_power_press(&event), "key up");
        event[20] = 1;
        assert!(is_power_press(&event));
        event[18] = 115;
        assert!(!is_power_press(&event), "another key");
    }

    #[test]
    fn signals_mean_what_busybox_means_by_them() {
        assert_eq!(event_of_signal(Signal::USR2.as_raw()), Some(Event::End(End::PowerOff)));
        assert_eq!(event_of_signal(Signal::TERM.as_raw()), Some(Event::End(End::Reboot)));
        assert_eq!(event_of_signal(Signal::HUP.as_raw()), None);
    }
}
