//! [`Rates`]: what happened between two [`Sample`]s, for one who looks. Pure: no I/O, no clock.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::{Device, Sample, Vcpu, Work};
use crate::reasons::{self, Both, Shown};
use crate::report::plain_name;
use crate::symbols::Symbols;
use vmm_monitor::recorder::Kind;

/// What happened in an interval. Rates are per second, shares are 0 to 1 of the interval.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Rates {
    /// The interval's length.
    pub seconds: f64,
    /// Exits to the monitor.
    pub exits: f64,
    /// All exits, those inside KVM included, as KVM counts them; where it does.
    pub kvm_exits: Option<f64>,
    /// Events that were lost, and so are not counted here.
    pub lost: u64,
    /// In order of their numbers.
    pub vcpus: Vec<VcpuRates>,
    /// Exits to the monitor by kind.
    pub reasons: Vec<Row>,
    /// By name.
    pub devices: Vec<DeviceRates>,
    /// Exits to the monitor by guest function; by address where there is no symbol.
    pub places: Vec<Row>,
    /// KVM's own counters, per second.
    pub kvm: BTreeMap<String, f64>,
}

/// One vCPU.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VcpuRates {
    /// `vcpu0` and so on.
    pub name: String,
    /// Exits to the monitor.
    pub exits: f64,
    /// All exits.
    pub kvm_exits: Option<f64>,
    /// From an exit's arrival in the monitor until it was answered.
    pub monitor: f64,
    /// The thread's time on a processor beyond that: in the guest, and in KVM for it. None where the host does not tell.
    pub guest: Option<f64>,
    /// The thread was ready and had no processor.
    pub waiting: Option<f64>,
    /// The rest: asleep in KVM (HLT), or parked.
    pub idle: Option<f64>,
}

/// Exits that have something in common.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// What.
    pub name: String,
    /// Of a reason: hardware's, in both vendors' terms.
    #[serde(serialize_with = "as_text")]
    pub hardware: Option<Both>,
    /// How many in the interval.
    pub count: u64,
    /// How many a second.
    pub rate: f64,
    /// Time in the monitor, as a share of the interval: 1 is one processor's.
    pub monitor: f64,
}

fn as_text<S: Serializer>(hardware: &Option<Both>, serializer: S) -> Result<S::Ok, S::Error> {
    hardware.as_ref().map(|both| both.text(Shown::Both)).serialize(serializer)
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DeviceRates {
    /// Its name.
    pub name: String,
    /// Exits in the interval for its ports and registers.
    pub count: u64,
    /// The same per second.
    pub exits: f64,
    /// Bytes that those moved, and those of a network's frames. What else goes through queues is not counted.
    pub bytes: f64,
    /// Frames that a network device gave the guest.
    pub received: f64,
    /// Frames that it took from the guest.
    pub sent: f64,
    /// Frames that it dropped, either way.
    pub dropped: f64,
    /// Turns of its worker at a queue that was kicked.
    pub kicks: f64,
    /// Requests completed.
    pub completed: f64,
    /// Interrupts to the guest.
    pub interrupts: f64,
    /// Time in the monitor for it, on vCPUs' threads and its worker's, as a share of the interval.
    pub busy: f64,
}

/// A sum that is smaller than before has begun anew (a reboot; a place that had been forgotten).
fn since(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

impl Work {
    fn since(self, before: Self) -> Self {
        match self.count.checked_sub(before.count) {
            Some(count) => Self { count, ticks: since(self.ticks, before.ticks) },
            None => self,
        }
    }
}

/// An interval: what makes rates of sums.
struct Interval {
    ns: f64,
    ns_per_tick: f64,
}

impl Interval {
    fn rate(&self, count: u64) -> f64 {
        if self.ns > 0.0 { count as f64 * 1e9 / self.ns } else { 0.0 }
    }

    fn share(&self, ns: f64) -> f64 {
        if self.ns > 0.0 { ns / self.ns } else { 0.0 }
    }

    fn ticks_share(&self, ticks: u64) -> f64 {
        self.share(ticks as f64 * self.ns_per_tick)
    }

    fn row(&self, name: String, hardware: Option<Both>, work: Work) -> Row {
        let (rate, monitor) = (self.rate(work.count), self.ticks_share(work.ticks));
        Row { name, hardware, count: work.count, rate, monitor }
    }

    fn vcpu(&self, name: &str, now: &Vcpu, before: Option<&Vcpu>) -> VcpuRates {
        let first = Vcpu::default();
        let exits = now.exits.since(before.unwrap_or(&first).exits);
        // Of a vCPU that was not known before, only what was recorded is known: the rest is since its start.
        let between = |get: fn(&Vcpu) -> Option<u64>| Some(since(get(now)?, get(before?)?));
        let monitor = self.ticks_share(exits.ticks).min(1.0);
        let cpu = between(|vcpu| vcpu.cpu_ns).map(|ns| self.share(ns as f64));
        let waiting = between(|vcpu| vcpu.waiting_ns).map(|ns| self.share(ns as f64).min(1.0 - monitor));
        let guest = cpu.map(|cpu| (cpu - monitor).clamp(0.0, 1.0 - monitor - waiting.unwrap_or(0.0)));
        let idle = guest.map(|guest| (1.0 - guest - monitor - waiting.unwrap_or(0.0)).max(0.0));
        VcpuRates {
            name: name.to_owned(),
            exits: self.rate(exits.count),
            kvm_exits: between(|vcpu| vcpu.kvm_exits).map(|count| self.rate(count)),
            monitor,
            guest,
            waiting,
            idle,
        }
    }

    fn device(&self, name: &str, now: &Device, before: Device) -> DeviceRates {
        let (exits, turns) = (now.exits.since(before.exits), now.turns.since(before.turns));
        let sum = |of: fn(&Device) -> u64| since(of(now), of(&before));
        DeviceRates {
            name: name.to_owned(),
            count: exits.count,
            exits: self.rate(exits.count),
            bytes: self.rate(sum(|d| d.bytes.saturating_add(d.received.bytes).saturating_add(d.sent.bytes))),
            received: self.rate(sum(|d| d.received.frames)),
            sent: self.rate(sum(|d| d.sent.frames)),
            dropped: self.rate(sum(|d| d.received.dropped.total().saturating_add(d.sent.dropped.total()))),
            kicks: self.rate(since(now.kicks, before.kicks)),
            completed: self.rate(since(now.completed, before.completed)),
            interrupts: self.rate(since(now.interrupts, before.interrupts)),
            busy: self.ticks_share(exits.ticks.saturating_add(turns.ticks)),
        }
    }
}

impl Rates {
    /// What happened from `before` to `now`, places by the names of `symbols`.
    pub fn between(before: &Sample, now: &Sample, symbols: &Symbols) -> Self {
        let (ns, ticks) = (since(now.ns, before.ns) as f64, since(now.ticks, before.ticks) as f64);
        let interval = Interval { ns, ns_per_tick: if ticks > 0.0 { ns / ticks } else { 0.0 } };
        let reasons = now.reasons.iter().map(|(name, work)| {
            let work = work.since(before.reasons.get(name).copied().unwrap_or_default());
            interval.row(name.clone(), hardware(name, &now.vendor), work)
        });
        let mut vcpus: Vec<_> =
            now.vcpus.iter().map(|(name, vcpu)| interval.vcpu(name, vcpu, before.vcpus.get(name))).collect();
        vcpus.sort_by_key(|vcpu| (vcpu.name.len(), vcpu.name.clone()));
        let device = |(name, device): (&String, &Device)| {
            interval.device(name, device, before.devices.get(name).copied().unwrap_or_default())
        };
        let mut places: BTreeMap<String, Work> = BTreeMap::new();
        let mut place = |name: String, work: Work| {
            let sum = places.entry(name).or_default();
            sum.count = sum.count.saturating_add(work.count);
            sum.ticks = sum.ticks.saturating_add(work.ticks);
        };
        let known: BTreeMap<_, _> = before.places.iter().copied().collect();
        for (rip, work) in &now.places {
            let name = symbols.find(*rip).map_or_else(|| format!("{rip:#x}"), |(name, _)| name.to_owned());
            place(name, work.since(known.get(rip).copied().unwrap_or_default()));
        }
        place("(elsewhere)".to_owned(), now.elsewhere.since(before.elsewhere));
        let kvm = now.kvm.iter().map(|(name, count)| {
            let before = before.kvm.get(name).copied();
            (name.clone(), before.map_or(0.0, |before| interval.rate(since(*count, before))))
        });
        let kvm: BTreeMap<_, _> = kvm.collect();
        let reasons: Vec<_> = reasons.filter(|row| row.count > 0).collect();
        Self {
            seconds: ns / 1e9,
            exits: interval.rate(reasons.iter().map(|row| row.count).fold(0, u64::saturating_add)),
            // A KVM may have the counter and leave it at 0.
            kvm_exits: kvm.get("exits").copied().filter(|_| now.kvm.get("exits").is_some_and(|sum| *sum > 0)),
            lost: since(now.lost, before.lost),
            vcpus,
            reasons,
            devices: now.devices.iter().map(device).filter(DeviceRates::is_busy).collect(),
            places: places
                .into_iter()
                .filter(|(_, work)| work.count > 0)
                .map(|(name, work)| interval.row(name, None, work))
                .collect(),
            kvm,
        }
        .sorted(Order::Count)
    }

    /// The same, the largest first.
    pub fn sorted(mut self, order: Order) -> Self {
        fn by<T>(rows: &mut [T], key: impl Fn(&T) -> (f64, f64)) {
            rows.sort_by(|a, b| {
                let ((a, a2), (b, b2)) = (key(a), key(b));
                b.total_cmp(&a).then(b2.total_cmp(&a2))
            });
        }
        let pick = |count: f64, time: f64| match order {
            Order::Count => (count, time),
            Order::Time => (time, count),
        };
        by(&mut self.reasons, |row| pick(row.rate, row.monitor));
        by(&mut self.places, |row| pick(row.rate, row.monitor));
        by(&mut self.devices, |row| pick(row.exits + row.kicks + row.interrupts, row.busy));
        self
    }
}

/// What comes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// What came most often.
    #[default]
    Count,
    /// What took most of the monitor's time.
    Time,
}

impl DeviceRates {
    fn is_busy(&self) -> bool {
        self.exits + self.kicks + self.completed + self.interrupts > 0.0
            || self.received + self.sent + self.dropped > 0.0
            || self.busy > 0.0
    }
}

/// The hardware's reason behind a kind of exit, on a host whose CPUID says `maker`.
fn hardware(name: &str, maker: &str) -> Option<Both> {
    let kind = Kind::ALL.into_iter().find(|kind| plain_name(*kind) == name)?;
    Some(Both::of_pair(reasons::of(kind)?, reasons::vendor(maker)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_monitor::net::traffic::{Counts, Dropped};

    const SECOND: u64 = 1_000_000_000;

    /// Two ticks a nanosecond.
    fn sample(seconds: u64) -> Sample {
        Sample { ns: seconds * SECOND, ticks: seconds * SECOND * 2, ..Sample::default() }
    }

    fn work(count: u64, ns: u64) -> Work {
        Work { count, ticks: ns * 2 }
    }

    #[test]
    fn sums_become_rates_and_shares() {
        let (mut before, mut now) = (sample(10), sample(12));
        before.reasons.insert("out".to_owned(), work(100, 0));
        now.reasons.insert("out".to_owned(), work(300, SECOND / 2));
        now.reasons.insert("mmio read".to_owned(), work(2, 0));
        now.vendor = "AuthenticAMD".to_owned();
        let vcpu = |exits, cpu, waiting| Vcpu {
            exits,
            cpu_ns: Some(cpu),
            waiting_ns: Some(waiting),
            kvm_exits: Some(exits.count * 2),
        };
        before.vcpus.insert("vcpu0".to_owned(), vcpu(work(0, 0), SECOND, 0));
        now.vcpus.insert("vcpu0".to_owned(), vcpu(work(200, SECOND / 2), 2 * SECOND, SECOND / 2));
        now.vcpus.insert("vcpu10".to_owned(), vcpu(work(2, 0), 50 * SECOND, 0));
        now.vcpus.insert("vcpu2".to_owned(), Vcpu::default());
        before.places.push((7, work(5, 0)));
        now.places.push((7, work(3, 0)));
        let rates = Rates::between(&before, &now, &Symbols::default());
        assert_eq!((rates.seconds, rates.exits, rates.lost), (2.0, 101.0, 0));
        let [out, read] = &rates.reasons[..] else { panic!("{rates:?}") };
        assert_eq!((out.name.as_str(), out.count, out.rate, out.monitor), ("out", 200, 100.0, 0.25));
        let json = serde_json::to_value(out).unwrap();
        assert_eq!(json["hardware"], "AMD-V 0x7b IOIO = VT-x 30 I/O instruction");
        assert_eq!(read.count, 2);
        let names: Vec<_> = rates.vcpus.iter().map(|vcpu| vcpu.name.as_str()).collect();
        assert_eq!(names, ["vcpu0", "vcpu2", "vcpu10"]);
        let [first, _, new] = &rates.vcpus[..] else { panic!() };
        let shares = (first.monitor, first.guest, first.waiting, first.idle);
        assert_eq!(shares, (0.25, Some(0.25), Some(0.25), Some(0.25)));
        assert_eq!((new.guest, new.idle, new.kvm_exits, new.exits), (None, None, None, 1.0));
        // A place whose sum had been dropped meanwhile.
        assert_eq!((rates.places[0].name.as_str(), rates.places[0].count), ("0x7", 3));
    }

    #[test]
    fn a_networks_frames_become_rates_too() {
        let counts = |frames, filtered| Counts {
            frames,
            bytes: frames * 100,
            dropped: Dropped { filtered, ..Dropped::default() },
        };
        let device =
            |n| Device { bytes: n, received: counts(10 * n, 2 * n), sent: counts(n, 0), ..Device::default() };
        let (mut before, mut now) = (sample(10), sample(12));
        before.devices.insert("virtio-net0".to_owned(), device(100));
        now.devices.insert("virtio-net0".to_owned(), device(104));
        now.devices.insert("virtio-net1".to_owned(), Device::default());
        let rates = Rates::between(&before, &now, &Symbols::default());
        let [net] = &rates.devices[..] else { panic!("one is idle: {rates:?}") };
        assert_eq!((net.received, net.sent, net.dropped), (20.0, 2.0, 4.0));
        assert_eq!(net.bytes, 2.0 + 2000.0 + 200.0);
        now.devices.insert("virtio-net1".to_owned(), device(u64::MAX / 1000));
        Rates::between(&before, &now, &Symbols::default());
    }

    #[test]
    fn what_makes_no_sense_makes_no_nonsense() {
        let mut now = sample(5);
        now.vcpus.insert("vcpu0".to_owned(), Vcpu { exits: work(1, 99 * SECOND), ..Vcpu::default() });
        for before in [sample(5), sample(9)] {
            let rates = Rates::between(&before, &now, &Symbols::default());
            let vcpu = &rates.vcpus[0];
            assert!(rates.exits.is_finite() && (0.0..=1.0).contains(&vcpu.monitor), "{rates:?}");
        }
    }

    #[test]
    fn the_order_is_by_count_or_by_time() {
        let (before, mut now) = (sample(0), sample(1));
        now.reasons.insert("out".to_owned(), work(9, 10));
        now.reasons.insert("in".to_owned(), work(1, 1000));
        let rates = Rates::between(&before, &now, &Symbols::default());
        assert_eq!(rates.reasons[0].name, "out");
        assert_eq!(rates.sorted(Order::Time).reasons[0].name, "in");
    }
}
