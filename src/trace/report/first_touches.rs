//! Guest memory as it is first touched: which pages, and by whom.
//!
//! The guest's part is KVM's page faults, and the monitor's those of its threads, if the kernel's trace was to be had. What its
//! process has of saved memory at the end is known without it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::io::{self, Write};
use std::ops::Range;
use std::slice;

use serde::Serialize;

use super::{Report, duration};
use crate::file::Header;
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::memory::{layout, union};
use vmm_monitor::recorder::{Event, Kind, Step};

const PAGE: u64 = 4096;
/// Bytes between two pages that are told as one range.
const GAP: u64 = 16 * PAGE;
/// Physical addresses have 52 bits at most (Intel SDM vol. 3, 4.1.4).
const END: u64 = 1 << 52;
/// Code without a name is told by pieces of so many bytes.
const PIECE: u64 = 64 << 10;
/// Rows of a table at most: a guest may run code anywhere.
const ROWS: usize = 4096;
/// Those of them that are printed as text.
const PRINTED: usize = 20;

/// All of it. What only the kernel's trace tells is none without that.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FirstTouches {
    /// Page faults in guest memory that KVM answered, and the nanoseconds that it took.
    pub faults: Option<usize>,
    /// Nanoseconds that it took for them.
    pub took: Option<f64>,
    /// Pages that they, and the monitor's threads, touched.
    pub pages: Option<usize>,
    /// By where the pages are: those of most pages first.
    pub ranges: Vec<Place>,
    /// Ranges that are left out.
    pub more_ranges: usize,
    /// By who was first: those of most pages first.
    pub by: Vec<Toucher>,
    /// Left out of those.
    pub more_by: usize,
}

/// A range of guest addresses: pages, and few between them that nobody touched.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Place {
    /// The first.
    pub from: u64,
    /// The last.
    pub to: u64,
    /// Pages that were seen to be touched there.
    pub pages: Option<usize>,
    /// Of saved memory: pages that were written to by the end.
    pub written: Option<u64>,
    /// Of those: copied ahead of the guest.
    pub ahead: u64,
    /// KVM's page faults there.
    pub faults: Option<usize>,
    /// Nanoseconds that KVM took for them.
    pub took: Option<f64>,
    /// Who touched the most of them first.
    pub by: Option<String>,
    /// How many.
    pub by_pages: usize,
}

/// Who touches memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Toucher {
    /// A function of the guest, or a piece of its code; a thread of the monitor; what came otherwise.
    pub name: String,
    /// Pages that were touched by it first.
    pub pages: u64,
    /// Its page faults in KVM, also for pages that others had touched.
    pub faults: Option<usize>,
    /// Nanoseconds that KVM took for them.
    pub took: Option<f64>,
}

/// Who touches a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Who<'a> {
    /// The guest, in this function.
    Function(&'a str),
    /// The guest, in the piece of code from here on.
    Code(u64),
    /// A thread of the monitor.
    Thread(&'a str),
    /// Nobody: it was copied ahead.
    Ahead,
    /// Whom KVM and the kernel's faults do not show.
    Unseen,
    /// There is no such record.
    Unknown,
}

impl Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(name) => f.write_str(name),
            Self::Code(start) => write!(f, "code at {start:#x}-{:#x}", start + (PIECE - 1)),
            Self::Thread(name) => write!(f, "monitor: {name}"),
            Self::Ahead => f.write_str("copied ahead of the guest"),
            Self::Unseen => f.write_str("unseen: the host's kernel, or earlier"),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// Page faults in KVM, and the nanoseconds that it took.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    faults: usize,
    took: f64,
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.faults += other.faults;
        self.took += other.took;
    }
}

/// What the record has of touches.
#[derive(Default)]
struct Found<'a> {
    /// By page: who was first, and what it cost.
    pages: BTreeMap<u64, (Who<'a>, Cost)>,
    /// Of all that each touched, first or not.
    costs: BTreeMap<Who<'a>, Cost>,
    /// Written to by the end, and copied ahead: addresses.
    written: Vec<Range<u64>>,
    ahead: Vec<Range<u64>>,
    /// Whether there is an end to be known of.
    ended: bool,
    has_kvm: bool,
}

impl<'a> Found<'a> {
    fn touch(&mut self, address: u64, who: Who<'a>, cost: Cost) {
        if address < END {
            self.pages.entry(address / PAGE).or_insert((who, Cost::default())).1.add(cost);
            self.costs.entry(who).or_default().add(cost);
        }
    }
}

impl Report<'_> {
    /// None if there is nothing to tell.
    pub(super) fn first_touches(&self) -> Option<FirstTouches> {
        let mut found = Found::default();
        let mut goes_on = false;
        for (track, event) in &self.trace.events {
            match event.kind() {
                Some(Kind::InKernel) => {
                    found.has_kvm = true;
                    if let Some(address) = self.page_fault(event) {
                        let took = self.trace.ns(event.handled.into());
                        found.touch(address, self.code_at(event.rip), Cost { faults: 1, took });
                    }
                }
                Some(Kind::HostFault) => {
                    found.touch(event.address, Who::Thread(self.track(*track)), Cost::default());
                }
                Some(Kind::Stretch) if event.address < event.value && event.value <= END => {
                    let list = if event.count == 0 { &mut found.written } else { &mut found.ahead };
                    list.push(event.address..event.value);
                }
                Some(Kind::Step) => goes_on |= event.address == Step::State as u64,
                // What follows is another machine's.
                Some(Kind::Pages) => {
                    found.ended = true;
                    break;
                }
                _ => {}
            }
        }
        let is_told = goes_on || found.ended || !found.pages.is_empty();
        is_told.then(|| found.tables())
    }

    /// The guest address of a page fault in guest memory. Those elsewhere are for devices.
    fn page_fault(&self, event: &Event) -> Option<u64> {
        let reason = self.reason_in_kvm(event)?;
        let is_fault = match reason.vendor {
            // A reserved bit is KVM's mark for an address without memory.
            Vendor::Amd => reason.number == 0x400 && event.address >> 3 & 1 == 0,
            Vendor::Intel => reason.number == 48 && event.value != 0,
        };
        let address = event.value;
        let is_memory =
            !layout::HOLE.contains(&address) && Header::find(&self.trace.header.addresses, address).is_none();
        (is_fault && is_memory).then_some(address)
    }

    fn code_at(&self, rip: u64) -> Who<'_> {
        self.symbols.find(rip).map_or(Who::Code(rip / PIECE * PIECE), |(name, _)| Who::Function(name))
    }

    /// [`Report::first_touches`] as tables.
    pub(super) fn write_first_touches(&self, touches: &FirstTouches, out: &mut dyn Write) -> io::Result<()> {
        match (touches.faults, touches.took, touches.pages) {
            (Some(faults), Some(took), Some(pages)) => writeln!(
                out,
                "\nfirst touches of guest memory: {pages} pages; {faults} page faults in KVM, which took {}",
                duration(took)
            ),
            _ => {
                let why = &self.trace.header.in_kernel;
                writeln!(out, "\nfirst touches of guest memory: ? page faults in KVM ({why})")
            }
        }?;
        const WIDTH: usize = 40;
        if !touches.ranges.is_empty() {
            writeln!(
                out,
                "{:<WIDTH$} {:>8} {:>8} {:>8} {:>8} {:>8}  first touched by, most of all",
                "guest addresses", "pages", "written", "ahead", "faults", "time"
            )?;
        }
        for Place { from, to, pages, written, ahead, faults, took, by, by_pages } in
            touches.ranges.iter().take(PRINTED)
        {
            let (range, time) = (format!("{from:#x}-{to:#x}"), took.map(duration));
            let [pages, faults] = [pages, faults].map(|count| known(*count));
            let (written, time, by) = (known(*written), known(time), known(by.as_ref()));
            let share = if *by_pages > 0 { format!(": {by_pages}") } else { String::new() };
            writeln!(
                out,
                "{range:<WIDTH$} {pages:>8} {written:>8} {ahead:>8} {faults:>8} {time:>8}  {by}{share}"
            )?;
        }
        more(touches.more_ranges + touches.ranges.len().saturating_sub(PRINTED), out)?;
        if !touches.by.is_empty() {
            writeln!(out, "\n{:<WIDTH$} {:>8} {:>8} {:>8}", "first touched by", "pages", "faults", "time")?;
        }
        for Toucher { name, pages, faults, took } in touches.by.iter().take(PRINTED) {
            let (faults, time) = (known(*faults), known(took.map(duration)));
            writeln!(out, "{name:<WIDTH$} {pages:>8} {faults:>8} {time:>8}")?;
        }
        more(touches.more_by + touches.by.len().saturating_sub(PRINTED), out)
    }
}

/// As text; `?` where it is not known.
fn known(value: Option<impl ToString>) -> String {
    value.map_or("?".to_owned(), |value| value.to_string())
}

fn more(count: usize, out: &mut dyn Write) -> io::Result<()> {
    if count > 0 { writeln!(out, "... and {count} more") } else { Ok(()) }
}

impl Found<'_> {
    fn tables(mut self) -> FirstTouches {
        (self.written, self.ahead) = (union(self.written), union(self.ahead));
        let seen: Vec<_> = union(self.pages.keys().map(|page| page * PAGE..(page + 1) * PAGE).collect());
        let (ranges, more_ranges) = self.ranges(&seen);
        let (by, more_by) = self.by(&seen);
        let mut all = Cost::default();
        self.costs.values().for_each(|cost| all.add(*cost));
        FirstTouches {
            faults: self.of_kvm(all.faults),
            took: self.of_kvm(all.took),
            pages: self.of_kvm(self.pages.len()),
            ranges,
            more_ranges,
            by,
            more_by,
        }
    }

    /// What only KVM tells.
    fn of_kvm<T>(&self, value: T) -> Option<T> {
        self.has_kvm.then_some(value)
    }

    fn ranges(&self, seen: &[Range<u64>]) -> (Vec<Place>, usize) {
        let all = [seen, &self.written, &self.ahead].concat();
        let wide = all.into_iter().map(|range| range.start..range.end + GAP).collect();
        let ranges = union(wide).into_iter().map(|wide| wide.start..wide.end - GAP);
        let size = |range: &Range<u64>| {
            common(&self.written, slice::from_ref(range)).max(self.pages_in(range).count() as u64)
        };
        let (ranges, more) = largest(ranges.map(|range| (size(&range), range)).collect());
        (ranges.into_iter().map(|range| self.place(range)).collect(), more)
    }

    fn pages_in(&self, range: &Range<u64>) -> impl Iterator<Item = &(Who<'_>, Cost)> {
        self.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)).map(|(_, page)| page)
    }

    fn place(&self, range: Range<u64>) -> Place {
        let (mut count, mut all) = (0, Cost::default());
        let mut touchers: BTreeMap<Who<'_>, usize> = BTreeMap::new();
        for (who, cost) in self.pages_in(&range) {
            count += 1;
            all.add(*cost);
            *touchers.entry(*who).or_default() += 1;
        }
        let most = touchers.into_iter().max_by_key(|(_, pages)| *pages);
        Place {
            from: range.start,
            to: range.end - 1,
            pages: self.of_kvm(count),
            written: self.ended.then(|| common(&self.written, slice::from_ref(&range))),
            ahead: common(&self.ahead, slice::from_ref(&range)),
            faults: self.of_kvm(all.faults),
            took: self.of_kvm(all.took),
            by: most.map(|(who, _)| who.to_string()),
            by_pages: most.map_or(0, |(_, pages)| pages),
        }
    }

    fn by(&self, seen: &[Range<u64>]) -> (Vec<Toucher>, usize) {
        let mut pages: BTreeMap<Who<'_>, u64> = self.costs.keys().map(|who| (*who, 0)).collect();
        for (page, (who, _)) in &self.pages {
            let at = page * PAGE;
            let next = self.ahead.partition_point(|range| range.end <= at);
            let came_ahead = self.ahead.get(next).is_some_and(|range| range.start <= at);
            *pages.entry(*who).or_default() += u64::from(!came_ahead);
        }
        let explained = union([seen, &self.ahead].concat());
        let others = common(&self.written, &[0..END]) - common(&self.written, &explained);
        pages.insert(Who::Ahead, common(&self.ahead, &[0..END]));
        pages.insert(if self.has_kvm { Who::Unseen } else { Who::Unknown }, others);
        let cost = |who: &Who<'_>| self.costs.get(who).copied();
        let is_there =
            |(who, pages): &(Who<'_>, u64)| *pages > 0 || cost(who).is_some_and(|cost| cost.faults > 0);
        let rows = pages.into_iter().filter(is_there);
        let (rows, more) = largest(rows.map(|(who, pages)| (pages, (who, pages))).collect());
        let row = |(who, pages): (Who<'_>, u64)| {
            let cost = cost(&who).filter(|_| self.has_kvm);
            let (faults, took) = (cost.map(|cost| cost.faults), cost.map(|cost| cost.took));
            Toucher { name: who.to_string(), pages, faults, took }
        };
        (rows.into_iter().map(row).collect(), more)
    }
}

/// Those of the largest size, and how many are left out. What is as large stays in its order.
fn largest<T>(mut rows: Vec<(u64, T)>) -> (Vec<T>, usize) {
    rows.sort_by_key(|(size, _)| Reverse(*size));
    let more = rows.len().saturating_sub(ROWS);
    (rows.into_iter().take(ROWS).map(|(_, row)| row).collect(), more)
}

/// Pages that are in both. Each has its ranges in order, and none twice.
fn common(some: &[Range<u64>], others: &[Range<u64>]) -> u64 {
    let mut bytes = 0;
    for other in others {
        let first = some.partition_point(|range| range.end <= other.start);
        let inside = some[first..].iter().take_while(|range| range.start < other.end);
        bytes += inside.map(|range| range.end.min(other.end) - range.start.max(other.start)).sum::<u64>();
    }
    bytes / PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::{Range as Device, Trace};
    use crate::report::Filter;
    use crate::symbols::Symbols;

    const NAMES: &str = "ffffffff81000000 T _stext\nffffffff81001000 T clear_page\nffffffff81002000 T copy_page\n\
                         ffffffff81003000 T _etext\nffffffff81004000 T _end\n";
    const CLEAR: u64 = 0xffff_ffff_8100_1010;
    const COPY: u64 = 0xffff_ffff_8100_2020;

    /// Of a host with AMD's processor, whose vCPU and disk have a track each. Its clock stands still: a file alone has a rate.
    fn trace(events: impl IntoIterator<Item = (u32, Event)>) -> Trace {
        let mut trace = Trace::default();
        trace.header.vendor = "AuthenticAMD".to_owned();
        trace.header.in_kernel = "not recorded: no tracefs".to_owned();
        trace.header.addresses =
            vec![Device { name: "virtio-net0".to_owned(), base: 0x2_0000_0000, size: 0x1000 }];
        trace.tracks = [(0, "vcpu0".to_owned()), (1, "virtio-blk0".to_owned())].into();
        trace.reasons = [(0, "npf".to_owned()), (1, "cpuid".to_owned())].into();
        trace.events = events.into_iter().collect();
        trace
    }

    fn npf(rip: u64, address: u64) -> (u32, Event) {
        let kind = Kind::InKernel as u8;
        (0, Event { kind, rip, address: 6, value: address, handled: 1000, ..Event::default() })
    }

    fn by_host(address: u64) -> (u32, Event) {
        (1, Event { kind: Kind::HostFault as u8, address, value: 6, ..Event::default() })
    }

    fn written(addresses: Range<u64>) -> (u32, Event) {
        (2, Event::stretch(addresses, false))
    }

    fn ahead(addresses: Range<u64>) -> (u32, Event) {
        (2, Event::stretch(addresses, true))
    }

    fn end(value: u64) -> (u32, Event) {
        (2, Event { kind: Kind::Pages as u8, value, ..Event::default() })
    }

    fn told(trace: &Trace) -> (FirstTouches, String) {
        let report = Report::new(trace, Symbols::of_guest(NAMES).unwrap());
        let mut text = Vec::new();
        report.write_stats(&Filter::default(), &mut text).unwrap();
        (report.first_touches().unwrap(), String::from_utf8(text).unwrap())
    }

    #[test]
    fn each_page_is_the_ones_who_was_first_and_each_fault_the_ones_who_made_it() {
        let mut elsewhere = npf(CLEAR, 0x5000);
        elsewhere.1.count = 1;
        let mut of_device = npf(CLEAR, 0x6000);
        of_device.1.address |= 1 << 3;
        let trace = trace([
            ahead(0x10_0000..0x10_2000),
            npf(CLEAR, 0x1000),
            npf(CLEAR, 0x2010),
            npf(COPY, 0x2ff8),
            by_host(0x3000),
            npf(COPY, 0x3000),
            npf(0x40_1234, 0x10_0000),
            npf(COPY, 0x1_0000_0000),
            elsewhere,
            of_device,
            npf(CLEAR, 0xfe00_0000),
            npf(CLEAR, 0x2_0000_0000),
            written(0x1000..0x4000),
            written(0x10_0000..0x10_2000),
            written(0x20_0000..0x20_3000),
            end(8),
            npf(CLEAR, 0x9000),
        ]);
        let (touches, text) = told(&trace);
        assert_eq!((touches.faults, touches.took, touches.pages), (Some(6), Some(0.0), Some(5)));
        let by: Vec<_> = touches.by.iter().map(|by| (by.name.as_str(), by.pages, by.faults)).collect();
        assert_eq!(
            by,
            [
                ("unseen: the host's kernel, or earlier", 3, None),
                ("clear_page", 2, Some(2)),
                ("copied ahead of the guest", 2, None),
                ("copy_page", 1, Some(3)),
                ("monitor: virtio-blk0", 1, Some(0)),
                ("code at 0x400000-0x40ffff", 0, Some(1)),
            ]
        );
        let places = touches.ranges.iter().map(|place| {
            let Place { from, to, pages, written, ahead, faults, by, by_pages, .. } = place;
            ((*from, *to), *pages, *written, *ahead, *faults, by.as_deref().map(|by| (by, *by_pages)))
        });
        assert_eq!(
            places.collect::<Vec<_>>(),
            [
                ((0x1000, 0x3fff), Some(3), Some(3), 0, Some(4), Some(("clear_page", 2))),
                ((0x20_0000, 0x20_2fff), Some(0), Some(3), 0, Some(0), None),
                (
                    (0x10_0000, 0x10_1fff),
                    Some(1),
                    Some(2),
                    2,
                    Some(1),
                    Some(("code at 0x400000-0x40ffff", 1))
                ),
                ((0x1_0000_0000, 0x1_0000_0fff), Some(1), Some(0), 0, Some(1), Some(("copy_page", 1))),
            ]
        );
        let line = "first touches of guest memory: 5 pages; 6 page faults in KVM, which took 0ns";
        assert!(text.contains(line), "{text}");
        let words = |start: &str| -> Vec<&str> {
            let line = text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{text}"));
            line.split_whitespace().collect()
        };
        assert_eq!(words("0x1000-"), ["0x1000-0x3fff", "3", "3", "0", "4", "0ns", "clear_page:", "2"]);
        assert_eq!(words("copy_page"), ["copy_page", "1", "3", "0ns"]);
    }

    #[test]
    fn without_the_kernels_trace_there_is_what_was_written_to() {
        let (touches, text) = told(&trace([
            ahead(0x1000..0x3000),
            written(0x1000..0x5000),
            written(0x40_0000..0x40_1000),
            end(5),
        ]));
        assert_eq!((touches.faults, touches.pages), (None, None));
        let line = "first touches of guest memory: ? page faults in KVM (not recorded: no tracefs)";
        assert!(text.contains(line), "{text}");
        let rows: Vec<Vec<_>> = text
            .lines()
            .filter(|line| line.starts_with("0x") || line.starts_with(['?', 'c']))
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0], ["0x1000-0x4fff", "?", "4", "2", "?", "?", "?"]);
        assert_eq!(rows[1], ["0x400000-0x400fff", "?", "1", "0", "?", "?", "?"]);
        assert_eq!(rows[2], ["?", "3", "?", "?"]);
        assert_eq!(rows[3][..6], ["copied", "ahead", "of", "the", "guest", "2"]);
    }

    #[test]
    fn a_table_has_an_end_and_a_file_of_anybodys_is_read() {
        for (many, more) in [(50, 0), (ROWS + 7, 7)] {
            let (touches, text) = told(&trace((0..many as u64).map(|at| npf(at << 17, at << 17))));
            assert_eq!((touches.ranges.len(), touches.more_ranges), (many - more, more));
            assert_eq!((touches.by.len(), touches.more_by), (many - more, more));
            let left = format!("... and {} more", many - PRINTED);
            assert_eq!(text.matches(&left).count(), 2, "{text}");
        }

        let odd = [0, 1, END - 1, END, u64::MAX].into_iter();
        let odd = odd
            .flat_map(|at| [npf(at, at), by_host(at), written(at..u64::MAX), ahead(0..at), written(at..0)]);
        let (touches, _) = told(&trace(odd.chain([end(u64::MAX)])));
        assert_eq!(touches.pages, Some(2));
    }

    #[test]
    fn a_machine_that_neither_goes_on_nor_shows_faults_has_no_such_tables() {
        let trace = trace([(0, Event { kind: Kind::PioOut as u8, ..Event::default() })]);
        assert_eq!(Report::new(&trace, Symbols::default()).first_touches(), None);
    }
}
