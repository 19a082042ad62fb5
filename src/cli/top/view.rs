//! The view itself: a [`Look`] laid out on a screen of 80 columns and 24 lines, or more. Pure: draws into ratatui's buffer.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Borders, Cell, Clear, Paragraph, Row, Table, Widget};

use super::screen::Settings;
use super::session::Look;
use super::{MEANING, indented, remark};
use crate::list::uptime;
use vmm_monitor::config::Size;
use vmm_monitor::config::cpu::Vendor;
use vmm_trace::live::rates::{self, DeviceRates, Order, Rates, VcpuRates};
use vmm_trace::reasons::{Both, Shown, extension};

/// Lines for vCPUs at most, so that the rest has room.
const MAX_VCPUS: usize = 6;
/// Cells of a vCPU's bar.
const BAR: usize = 24;
/// The text form's size.
const TEXT: Rect = Rect { x: 0, y: 0, width: 80, height: 24 };

/// Draws all of it.
pub fn draw(frame: &mut Frame<'_>, look: Option<&Look>, settings: &Settings) {
    render(look, settings, frame.area(), frame.buffer_mut());
}

/// The view as text, with the hardware reasons of the vendors that are `shown`.
pub fn text(look: &Look, shown: Option<Shown>) -> String {
    let mut buffer = Buffer::empty(TEXT);
    render(Some(look), &Settings { shown, ..Settings::default() }, TEXT, &mut buffer);
    let mut text = String::new();
    // The last line is that of the keys.
    for y in 0..TEXT.height - 1 {
        let line: String =
            (0..TEXT.width).filter_map(|x| buffer.cell((x, y))).map(|cell| cell.symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn render(look: Option<&Look>, settings: &Settings, area: Rect, buffer: &mut Buffer) {
    let [body, keys] = Layout::vertical([Constraint::Fill(1), Constraint::Length(1)]).areas(area);
    self::keys(settings).render(keys, buffer);
    match look {
        Some(look) => numbers(look, settings, body, buffer),
        None => Paragraph::new(" attached; waiting for the first interval ...").render(body, buffer),
    }
    if settings.help {
        help(area, buffer);
    }
}

fn numbers(look: &Look, settings: &Settings, area: Rect, buffer: &mut Buffer) {
    let rates = look.rates.clone().sorted(settings.order);
    let vcpus = rates.vcpus.len().min(MAX_VCPUS);
    let hidden = usize::from(rates.vcpus.len() > vcpus);
    let [title, totals, cpus, upper, lower] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length((1 + vcpus + hidden) as u16),
        Constraint::Fill(4),
        Constraint::Fill(5),
    ])
    .areas(area);
    self::title(look, settings).render(title, buffer);
    self::totals(&rates).render(totals, buffer);
    self::vcpus(&rates.vcpus, vcpus, cpus, buffer);
    let columns = Layout::horizontal([Constraint::Fill(37), Constraint::Length(1), Constraint::Fill(42)]);
    let [left, _, right] = columns.areas(upper);
    reasons(&rates.reasons, settings.shown, left, buffer);
    devices(&rates.devices, right, buffer);
    let [left, _, right] = columns.areas(lower);
    places(&rates.places, &look.symbols, left, buffer);
    kvm(&rates, right, buffer);
}

fn title<'a>(look: &'a Look, settings: &Settings) -> Line<'a> {
    let status = &look.status;
    let mut parts = vec![
        Span::from(format!(" {} ", status.name)).bold(),
        Span::from(format!(" {}  up {}", status.state, uptime(status.uptime_seconds))),
        Span::from(format!("  {} vCPUs", status.cpus)),
        Span::from(format!("  {}", Size::from_bytes(status.memory_bytes))),
        Span::from(format!("  over {:.1}s", look.rates.seconds)),
    ];
    if look.recorded {
        parts.push(Span::from("  recorded"));
    }
    if look.viewers > 1 {
        parts.push(Span::from(format!("  {} viewers", look.viewers)));
    }
    if settings.paused {
        parts.push(Span::from("  view paused").yellow());
    }
    let remark = remark(status.state);
    if !remark.is_empty() {
        parts.push(Span::from(format!("  {remark}")).yellow());
    }
    Line::from(parts).style(Style::new().add_modifier(Modifier::REVERSED))
}

fn totals(rates: &Rates) -> Line<'static> {
    let monitor: f64 = rates.vcpus.iter().map(|vcpu| vcpu.monitor).sum();
    let each = if rates.exits > 0.0 { monitor / rates.exits * 1e6 } else { 0.0 };
    let mut parts = vec![
        Span::from(" exits/s "),
        Span::from(number(rates.exits)).bold(),
        Span::from(format!(" to the monitor, {each:.1}us each; ")),
        Span::from(rates.kvm_exits.map_or("?".to_owned(), number)).bold(),
        Span::from(" in all"),
    ];
    if rates.lost > 0 {
        parts.push(Span::from(format!("; {} events lost", rates.lost)).red());
    }
    Line::from(parts)
}

fn vcpus(all: &[VcpuRates], shown: usize, area: Rect, buffer: &mut Buffer) {
    let mut vcpus: Vec<_> = all.iter().collect();
    if all.len() > shown {
        // The busiest, in their order.
        vcpus.sort_by(|a, b| a.idle.unwrap_or(0.0).total_cmp(&b.idle.unwrap_or(0.0)));
        vcpus.truncate(shown);
        vcpus.sort_by_key(|vcpu| (vcpu.name.len(), vcpu.name.clone()));
    }
    let mut rows: Vec<_> = vcpus
        .into_iter()
        .map(|vcpu| {
            Row::new([
                Cell::from(vcpu.name.clone()),
                right(number(vcpu.exits)),
                right(vcpu.kvm_exits.map_or("-".to_owned(), number)),
                right(share(vcpu.guest)),
                right(share(Some(vcpu.monitor))),
                right(share(vcpu.waiting)),
                right(share(vcpu.idle)),
                Cell::from(bar(vcpu)),
            ])
        })
        .collect();
    if all.len() > shown {
        rows.push(Row::new([format!("+{} more", all.len() - shown)]));
    }
    let widths = [9, 7, 8, 6, 7, 6, 6, BAR as u16].map(Constraint::Length);
    let mut header: Vec<_> =
        ["exits/s", "all/s", "guest", "monitor", "wait", "idle"].into_iter().map(right).collect();
    header.insert(0, Cell::from("vCPU"));
    header.push(Cell::from(Line::from(vec![
        Span::from("█guest ").green(),
        Span::from("▓monitor ").yellow(),
        Span::from("▒wait").red(),
    ])));
    Table::new(rows, widths).header(Row::new(header).bold()).render(area, buffer);
}

/// A vCPU's time as a bar; what is not told stays empty.
fn bar(vcpu: &VcpuRates) -> Line<'static> {
    let cells = |share: Option<f64>| (share.unwrap_or(0.0) * BAR as f64).round() as usize;
    let piece =
        |symbol: &str, share, colour: Color| Span::from(symbol.repeat(cells(share).min(BAR))).fg(colour);
    Line::from(vec![
        piece("█", vcpu.guest, Color::Green),
        piece("▓", Some(vcpu.monitor), Color::Yellow),
        piece("▒", vcpu.waiting, Color::Red),
    ])
}

/// Ways to say a reason in a column, the longest first.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// `out (0x7b IOIO = 30 I/O instruction)`
    Both,
    /// `out (0x7b = 30)`
    Numbers,
    /// `out (0x7b IOIO)`; of no vendor: the host's own.
    One(Option<Vendor>),
}

impl Form {
    fn text(self, name: &str, both: Option<&Both>) -> String {
        let Some(both) = both else { return name.to_owned() };
        let (own, other) = (both.own.vendor, both.own.vendor.other());
        let number = |vendor| match both.name(vendor) {
            name if both.single(vendor).is_some() => name.split(' ').next().unwrap_or_default().to_owned(),
            name => name,
        };
        match self {
            Self::Both => format!("{name} ({} = {})", both.name(own), both.name(other)),
            Self::Numbers => format!("{name} ({} = {})", number(own), number(other)),
            Self::One(vendor) => format!("{name} ({})", both.name(vendor.unwrap_or(own))),
        }
    }

    /// Of `host`'s reasons.
    fn header(self, host: Vendor) -> String {
        match self {
            Self::Both | Self::Numbers => {
                format!("reason ({} = {})", extension(host), extension(host.other()))
            }
            Self::One(vendor) => format!("reason ({})", extension(vendor.unwrap_or(host))),
        }
    }
}

fn reasons(rows: &[rates::Row], shown: Option<Shown>, area: Rect, buffer: &mut Buffer) {
    let (long, short) = match shown {
        None => (Form::Both, Form::One(None)),
        Some(Shown::Both) => (Form::Both, Form::Numbers),
        Some(Shown::Only(vendor)) => (Form::One(Some(vendor)), Form::One(Some(vendor))),
    };
    let room = usize::from(area.width).saturating_sub(RATE + TIME + 2);
    let fits = |row: &rates::Row| long.text(&row.name, row.hardware.as_ref()).chars().count() <= room;
    let form = if rows.iter().all(fits) { long } else { short };
    let host = rows.iter().find_map(|row| row.hardware.as_ref()).map(|both| both.own.vendor);
    let lines = rows.iter().map(|row| {
        let name = form.text(&row.name, row.hardware.as_ref());
        [Cell::from(name), right(number(row.rate)), right(share(Some(row.monitor)))]
    });
    let header = [&host.map_or("reason".to_owned(), |host| form.header(host)), "exits/s", "time"];
    table(header, lines.map(Row::new).collect(), &SMALL, area, buffer);
}

/// Columns of numbers in the tables on the left.
const RATE: usize = 7;
const TIME: usize = 4;

/// Columns of the tables on the left.
const SMALL: [Constraint; 3] =
    [Constraint::Fill(1), Constraint::Length(RATE as u16), Constraint::Length(TIME as u16)];

fn devices(rows: &[DeviceRates], area: Rect, buffer: &mut Buffer) {
    let rows = rows.iter().map(|row| {
        let numbers = [row.exits, row.kicks, row.interrupts, row.bytes].map(number).map(right);
        [Cell::from(row.name.clone())].into_iter().chain(numbers)
    });
    let number = Constraint::Length(6);
    let widths = [Constraint::Fill(1), number, number, number, number];
    let header = ["device (per s)", "exits", "kicks", "irqs", "bytes"];
    table(header, rows.map(Row::new).collect(), &widths, area, buffer);
}

fn places(rows: &[rates::Row], symbols: &str, area: Rect, buffer: &mut Buffer) {
    let unnamed = rows.iter().all(|row| row.name.starts_with("0x") || row.name.starts_with('('));
    let mut lines: Vec<_> = rows
        .iter()
        .map(|row| {
            Row::new([Cell::from(row.name.clone()), right(number(row.rate)), right(share(Some(row.monitor)))])
        })
        .collect();
    if unnamed && !rows.is_empty() {
        let room = usize::from(area.height.saturating_sub(3));
        lines.truncate(room);
        lines.push(Row::new([symbols.to_owned()]).dark_gray());
    }
    table(["place", "exits/s", "time"], lines, &SMALL, area, buffer);
}

fn kvm(rates: &Rates, area: Rect, buffer: &mut Buffer) {
    let mut rows: Vec<_> = rates.kvm.iter().filter(|(_, rate)| **rate > 0.0).collect();
    rows.sort_by(|a, b| b.1.total_cmp(a.1).then(a.0.cmp(b.0)));
    let rows =
        rows.into_iter().map(|(name, rate)| Row::new([Cell::from(name.clone()), right(number(*rate))]));
    let widths = [Constraint::Fill(1), Constraint::Length(8)];
    table(["inside KVM too", "KVM/s"], rows.collect(), &widths, area, buffer);
}

/// A table whose first column is words and whose others are numbers, under a line.
fn table<const N: usize>(
    header: [&str; N],
    rows: Vec<Row<'_>>,
    widths: &[Constraint],
    area: Rect,
    buffer: &mut Buffer,
) {
    let header = header.iter().enumerate().map(|(n, word)| match n {
        0 => Cell::from((*word).to_owned()),
        _ => right(*word),
    });
    let block = Block::new().borders(Borders::TOP).border_style(Style::new().fg(Color::DarkGray));
    let table = Table::new(rows, widths.iter().copied()).header(Row::new(header).bold()).block(block);
    Widget::render(table, area, buffer);
}

fn keys(settings: &Settings) -> Line<'static> {
    let order = match settings.order {
        Order::Count => "count",
        Order::Time => "time",
    };
    let pause = if settings.paused { "resume" } else { "pause" };
    let text = format!(" q quit   p {pause}   s sort (by {order})   h help");
    Line::from(text).style(Style::new().add_modifier(Modifier::REVERSED))
}

fn help(area: Rect, buffer: &mut Buffer) {
    let text = format!("{MEANING}\n\nq quit, p pause the view, s sort by count or time, h close this");
    let text = indented(&text).lines().map(|line| line[1..].to_owned()).collect::<Vec<_>>().join("\n");
    let wanted = Rect { x: area.x, y: area.y + 1, width: 80, height: text.lines().count() as u16 + 2 };
    let place = wanted.intersection(area);
    Clear.render(place, buffer);
    Paragraph::new(text).block(Block::bordered().title(" columns ")).render(place, buffer);
}

fn right<'a>(text: impl Into<Text<'a>>) -> Cell<'a> {
    Cell::from(text.into().right_aligned())
}

/// A rate in six characters or fewer.
fn number(value: f64) -> String {
    match value {
        v if v <= 0.0 => "0".to_owned(),
        v if v < 9.95 => format!("{v:.1}"),
        v if v < 99_999.5 => format!("{v:.0}"),
        v if v < 999_950.0 => format!("{:.0}k", v / 1e3),
        v if v < 999_950_000.0 => format!("{:.1}M", v / 1e6),
        v => format!("{:.1}G", v / 1e9),
    }
}

fn share(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value > 0.0 && value < 0.005 => "<1%".to_owned(),
        Some(value) => format!("{:.0}%", value * 100.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_monitor::api::{State, Status};
    use vmm_trace::live::rates::VcpuRates;
    use vmm_trace::reasons::Pair;

    fn look(vcpus: usize) -> Look {
        let vcpu = |n: usize| VcpuRates {
            name: format!("vcpu{n}"),
            exits: 1e5,
            kvm_exits: Some(2e9),
            monitor: 0.25,
            guest: Some(0.5),
            waiting: Some(0.0),
            idle: Some(if n == 33 { 0.0 } else { 0.25 }),
        };
        let row = |name: &str| rates::Row {
            name: name.to_owned(),
            hardware: Some(Both::of_pair(Pair { vtx: 30, svm: 0x7b }, Vendor::Amd)),
            count: 7,
            rate: 7.0,
            monitor: 0.001,
        };
        let device =
            |n| DeviceRates { name: format!("virtio-blk{n}"), exits: 12.0, ..DeviceRates::default() };
        let rates = Rates {
            seconds: 1.0,
            exits: 1e5,
            kvm_exits: None,
            lost: 3,
            vcpus: (0..vcpus).map(vcpu).collect(),
            reasons: (0..9).map(|_| row("out")).collect(),
            devices: (0..20).map(device).collect(),
            places: ["a_function", "another", "0x1234"].map(row).to_vec(),
            kvm: [("exits".to_owned(), 1e5)].into(),
        };
        let status = Status {
            name: "web".to_owned(),
            pid: 1,
            state: State::Paused,
            uptime_seconds: 61.0,
            cpus: vcpus as u32,
            memory_bytes: 64 << 20,
            kernel: None,
            vsock: None,
            vsock_cid: None,
            ptys: Vec::new(),
            ports: Vec::new(),
            networks: Vec::new(),
            sandbox: "off".to_owned(),
            cgroup: None,
        };
        Look { status, recorded: true, viewers: 2, symbols: "no symbols".to_owned(), rates }
    }

    #[test]
    fn what_is_shown_fits_80_by_24() {
        let told = text(&look(1), None);
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines.len(), 23);
        assert!(lines[0].contains("web  paused  up 1m01s  1 vCPUs  64M"), "{told}");
        assert!(
            lines[1].contains("100k to the monitor") && lines[1].contains("? in all; 3 events lost"),
            "{told}"
        );
        assert!(
            lines[3]
                .starts_with("vcpu0        100k     2.0G    50%     25%     0%    25% ████████████▓▓▓▓▓▓")
        );
        for words in ["reason (AMD-V)", "out (0x7b IOIO)", "virtio-blk0", "a_function", "<1%"] {
            assert!(told.contains(words), "no {words} in\n{told}");
        }
    }

    #[test]
    fn reasons_are_in_both_vendors_terms_where_there_is_room() {
        let both = |width, shown| {
            let area = Rect::new(0, 0, width, 40);
            let mut buffer = Buffer::empty(area);
            render(Some(&look(1)), &Settings { shown, ..Settings::default() }, area, &mut buffer);
            let line =
                |y| (0..width).filter_map(|x| buffer.cell((x, y))).map(|c| c.symbol()).collect::<String>();
            (0..40).map(line).collect::<Vec<_>>().join("\n")
        };
        for (width, shown, words) in [
            (80, None, ["reason (AMD-V) ", "out (0x7b IOIO) "]),
            (140, None, ["reason (AMD-V = VT-x)", "out (0x7b IOIO = 30 I/O instruction)"]),
            (80, Some(Shown::Both), ["reason (AMD-V = VT-x)", "out (0x7b = 30) "]),
            (80, Some(Shown::Only(Vendor::Intel)), ["reason (VT-x) ", "out (30 I/O instruction"]),
        ] {
            let told = both(width, shown);
            for word in words {
                assert!(told.contains(word), "no {word:?} at {width} columns in\n{told}");
            }
        }
    }

    #[test]
    fn of_many_vcpus_the_busiest_are_shown() {
        let told = text(&look(254), None);
        assert!(told.contains("vcpu33 ") && told.contains("+248 more"), "{told}");
        assert!(told.contains("place"), "there is room for the rest:\n{told}");
    }

    #[test]
    fn every_size_of_screen_can_be_drawn_on() {
        let settings = Settings { help: true, paused: true, order: Order::Time, shown: None };
        for (width, height) in [(1, 1), (3, 40), (79, 2), (80, 24), (20, 5), (400, 120)] {
            let area = Rect::new(0, 0, width, height);
            for look in [None, Some(&look(0)), Some(&look(9))] {
                render(look, &settings, area, &mut Buffer::empty(area));
            }
        }
    }
}
