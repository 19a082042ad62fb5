//! [`Tally`]: events added up as they pass. Its size does not depend on how many there are, nor on what the guest does.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::{Device, Sample, Vcpu, Work};
use crate::code;
use crate::devices;
use crate::file::Header;
use crate::report::plain_name;
use vmm_monitor::recorder::{Event, Kind, Taken};

/// Places in the guest that are kept apart. A kernel's drivers exit from some hundred.
const PLACES: usize = 512;
/// A place that had no exit for so long makes room for another.
const FORGOTTEN: Duration = Duration::from_secs(10);
/// Between two looks for such.
const SWEEP: Duration = Duration::from_secs(1);
/// Pieces of kernel code that are kept.
const CODE: usize = 64;
/// Where Linux maps its own image (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL_IMAGE: u64 = 0xffff_ffff_8000_0000;

/// See the file's text.
#[derive(Debug, Default)]
pub struct Tally {
    header: Header,
    reasons: BTreeMap<Kind, Work>,
    vcpus: BTreeMap<String, Work>,
    devices: BTreeMap<String, Device>,
    places: HashMap<u64, (Work, Instant)>,
    swept: Option<Instant>,
    elsewhere: Work,
    code: VecDeque<(u64, Vec<u8>)>,
    lost: u64,
}

/// The entry of `name`, made if there was none.
fn entry<'a, T: Default>(map: &'a mut BTreeMap<String, T>, name: &str) -> &'a mut T {
    if !map.contains_key(name) {
        map.insert(name.to_owned(), T::default());
    }
    map.get_mut(name).expect("it is there or was made just now")
}

impl Tally {
    /// Says which machine it is: its devices' addresses give the exits' devices.
    pub fn describe(&mut self, header: Header) {
        self.header = header;
    }

    /// Whether nobody has said so yet.
    pub fn is_blank(&self) -> bool {
        self.header == Header::default()
    }

    /// Adds what the reader took at `now`.
    pub fn add(&mut self, taken: &Taken<'_>, now: Instant) {
        self.lost += taken.dropped;
        for event in taken.events {
            match event.kind() {
                Some(Kind::Code) => self.keep_code(event),
                Some(Kind::Queue) => {
                    let device = self.turn(taken.name, event);
                    device.kicks += 1;
                }
                Some(Kind::Source) => _ = self.turn(taken.name, event),
                Some(Kind::Interrupt) => entry(&mut self.devices, taken.name).interrupts += 1,
                Some(kind) if kind.is_exit() => self.exit(taken.name, kind, event, now),
                _ => {}
            }
        }
    }

    fn turn(&mut self, name: &str, event: &Event) -> &mut Device {
        let device = entry(&mut self.devices, name);
        device.turns.add(event.handled);
        device.completed += event.value;
        device
    }

    fn exit(&mut self, vcpu: &str, kind: Kind, event: &Event, now: Instant) {
        self.reasons.entry(kind).or_default().add(event.handled);
        entry(&mut self.vcpus, vcpu).add(event.handled);
        if let Some(name) = devices::name(&self.header, event) {
            let device = entry(&mut self.devices, name);
            device.exits.add(event.handled);
            device.bytes += u64::from(event.size) * u64::from(event.count);
        }
        self.place(event.rip, now).add(event.handled);
    }

    fn place(&mut self, rip: u64, now: Instant) -> &mut Work {
        if self.places.len() >= PLACES && !self.places.contains_key(&rip) {
            let due = self.swept.is_none_or(|last| now.duration_since(last) >= SWEEP);
            if due {
                self.swept = Some(now);
                self.places.retain(|_, (_, last)| now.duration_since(*last) < FORGOTTEN);
            }
            if self.places.len() >= PLACES {
                return &mut self.elsewhere;
            }
        }
        let (work, last) = self.places.entry(rip).or_insert((Work::default(), now));
        *last = now;
        work
    }

    fn keep_code(&mut self, event: &Event) {
        if event.rip < KERNEL_IMAGE || self.code.iter().any(|(address, _)| *address == event.rip) {
            return;
        }
        if self.code.len() >= CODE {
            self.code.pop_front();
        }
        self.code.push_back((event.rip, code::bytes(event)));
    }

    /// All of it, as far as events tell it.
    pub fn sample(&self) -> Sample {
        let vcpus = self.vcpus.iter();
        Sample {
            kernel: self.header.kernel.clone(),
            vendor: self.header.vendor.clone(),
            reasons: self.reasons.iter().map(|(kind, work)| (plain_name(*kind).to_owned(), *work)).collect(),
            vcpus: vcpus
                .map(|(name, exits)| (name.clone(), Vcpu { exits: *exits, ..Vcpu::default() }))
                .collect(),
            devices: self.devices.clone(),
            places: self.places.iter().map(|(rip, (work, _))| (*rip, *work)).collect(),
            elsewhere: self.elsewhere,
            lost: self.lost,
            code: self.code.iter().cloned().collect(),
            ..Sample::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Range;

    fn taken<'a>(name: &'a str, events: &'a [Event]) -> Taken<'a> {
        Taken { track: 0, name, events, dropped: 0 }
    }

    fn event(kind: Kind, address: u64, rip: u64) -> Event {
        Event { kind: kind as u8, address, rip, size: 1, count: 1, handled: 10, ..Event::default() }
    }

    fn place(sample: &Sample, rip: u64) -> Work {
        sample.places.iter().find(|(place, _)| *place == rip).unwrap().1
    }

    #[test]
    fn events_are_added_up_by_reason_vcpu_device_and_place() {
        let mut tally = Tally::default();
        let ports = vec![Range { name: "serial".to_owned(), base: 0x3f8, size: 8 }];
        tally.describe(Header { ports, ..Header::default() });
        let now = Instant::now();
        let exits = [
            event(Kind::PioOut, 0x3f8, 7),
            Event { size: 2, count: 3, ..event(Kind::PioIn, 0x3f9, 8) },
            event(Kind::PioIn, 0x1234, 8),
            event(Kind::Registers, 0x3f8, 7),
        ];
        tally.add(&taken("vcpu0", &exits), now);
        tally.add(&taken("vcpu1", &exits[..1]), now);
        let worker = [
            Event { value: 4, ..event(Kind::Queue, 0, 0) },
            Event { value: 1, ..event(Kind::Source, 0, 0) },
            event(Kind::Interrupt, 0, 0),
        ];
        tally.add(&Taken { dropped: 5, ..taken("virtio-blk0", &worker) }, now);
        let sample = tally.sample();
        let work = |count| Work { count, ticks: 10 * count };
        assert_eq!(
            (sample.reasons["out"], sample.reasons["in"], sample.reasons.len()),
            (work(2), work(2), 2)
        );
        assert_eq!((sample.vcpus["vcpu0"].exits, sample.vcpus["vcpu1"].exits), (work(3), work(1)));
        let serial = &sample.devices["serial"];
        assert_eq!((serial.exits, serial.bytes), (work(3), 8));
        assert_eq!(sample.devices["nobody"].exits, work(1));
        let block = &sample.devices["virtio-blk0"];
        assert_eq!((block.kicks, block.completed, block.interrupts, block.turns), (1, 5, 1, work(2)));
        assert_eq!((place(&sample, 7), place(&sample, 8), sample.lost), (work(2), work(2), 5));
    }

    #[test]
    fn what_the_guest_does_does_not_make_it_grow() {
        let mut tally = Tally::default();
        let start = Instant::now();
        let many: Vec<_> = (0..10_000).map(|rip| event(Kind::PioOut, 0, rip)).collect();
        tally.add(&taken("vcpu0", &many), start);
        let sample = tally.sample();
        assert_eq!(sample.places.len(), PLACES);
        assert_eq!(sample.elsewhere.count, 10_000 - PLACES as u64);
        // What the guest does later has room again.
        let later = [event(Kind::PioOut, 0, 77_777)];
        tally.add(&taken("vcpu0", &later), start + FORGOTTEN + SWEEP);
        assert_eq!(place(&tally.sample(), 77_777).count, 1);
        let code: Vec<_> = (0..1000).map(|n| event(Kind::Code, 0, KERNEL_IMAGE + n)).collect();
        tally.add(&taken("vcpu0", &code), start);
        assert_eq!(tally.sample().code.len(), CODE);
        assert!(tally.sample().code.contains(&(KERNEL_IMAGE + 999, vec![0])));
    }
}
