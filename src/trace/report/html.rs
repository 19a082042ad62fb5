//! A trace as one page that needs nothing else: no network, no other file, any browser.
//!
//! The page is `page/` put together, with its [`Data`](super::content::Data) in it as JSON. What a guest or a file says (names of
//! devices, symbols, command lines) reaches the browser only as text in that JSON, in which no `<` stands.

use std::io::{self, Write};

use super::{Filter, Report};

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPTS: [&str; 6] = [
    include_str!("page/data.js"),
    include_str!("page/head.js"),
    include_str!("page/density.js"),
    include_str!("page/lanes.js"),
    include_str!("page/story.js"),
    include_str!("page/tables.js"),
];

impl Report<'_> {
    /// The page, of everything that passes `filter`.
    ///
    /// # Errors
    /// As `out` has them.
    pub fn html(&self, filter: &Filter, out: &mut dyn Write) -> io::Result<()> {
        let data = self.data(filter);
        let mut rest = PAGE;
        for marker in ["/*STYLE*/", "\"DATA\"", "/*SCRIPT*/"] {
            let (before, after) = rest.split_once(marker).unwrap_or((rest, ""));
            out.write_all(before.as_bytes())?;
            rest = after;
            match marker {
                "/*STYLE*/" => out.write_all(STYLE.as_bytes())?,
                "\"DATA\"" => out.write_all(escape(&serde_json::to_string(&data)?).as_bytes())?,
                _ => SCRIPTS.iter().try_for_each(|script| out.write_all(script.as_bytes()))?,
            }
        }
        out.write_all(rest.as_bytes())
    }
}

/// JSON in which nothing ends a script or begins a comment, whatever its strings are.
fn escape(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => text.push_str(&format!("\\u{:04x}", c as u32)),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::file::{Range, Trace};
    use crate::symbols::Symbols;
    use vmm_monitor::recorder::{Event, Kind};

    /// The page of `trace`, and what stands in it as data.
    fn page(trace: &Trace, filter: &Filter) -> (String, Value) {
        let mut page = Vec::new();
        Report::new(trace, Symbols::default()).html(filter, &mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        let (_, rest) = page.split_once("id=\"data\">").unwrap();
        let data = serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap();
        (page, data)
    }

    #[test]
    fn nothing_in_a_trace_breaks_out_of_its_script() {
        let evil = "</script><script>alert(1)//<!-- \u{2028}\"'&amp;]]>";
        let mut trace = Trace::default();
        trace.header.cmdline = Some(evil.to_owned());
        trace.header.vendor = evil.to_owned();
        trace.header.ports = vec![Range { name: evil.to_owned(), base: 0, size: 0x1_0000 }];
        trace.tracks = [(0, evil.to_owned())].into();
        trace.reasons = [(0, evil.to_owned())].into();
        let event = |kind: Kind| (0, Event { kind: kind as u8, size: 1, count: 1, ..Event::default() });
        trace.events = Kind::ALL.map(event).to_vec();
        trace.dropped = [(0, 1)].into();
        let (page, data) = page(&trace, &Filter::default());
        assert_eq!(page.matches("<script").count(), 2);
        assert_eq!(page.matches("</script").count(), 2);
        assert!(!page.contains("<!--") && !page.contains('\u{2028}') && !page.contains("alert(1)//<"));
        assert_eq!(data["run"]["cmdline"], evil);
        assert_eq!(data["by_device"][0]["name"], evil);
        assert_eq!(data["tracks"][0]["name"], evil);
        // It needs nothing from elsewhere.
        for word in ["http:", "https:", "src=", "@import", "url("] {
            let page = page.replace("http://www.w3.org/2000/svg", "");
            assert!(!page.contains(word), "{word}");
        }
    }

    #[test]
    fn odd_traces_have_pages_too() {
        let (_, empty) = page(&Trace::default(), &Filter::default());
        assert_eq!(empty["totals"], serde_json::json!([0, 0, 0]));
        let mut trace = Trace::default();
        // Every kind, known or not, with numbers that are too large in every place.
        for kind in 0..=u8::MAX {
            for number in [0, 1, u64::MAX / 2, u64::MAX] {
                let [time, guest, rip, address, value] = [number; 5];
                let (handled, size) = (number as u32, number as u8);
                let event = Event {
                    time,
                    guest,
                    rip,
                    address,
                    value,
                    handled,
                    kind,
                    size,
                    count: size,
                    reason: size,
                };
                trace.events.push((kind.into(), event));
            }
        }
        let (_, odd) = page(&trace, &Filter::default());
        assert_eq!(odd["events"]["t"].as_array().unwrap().len(), 4 * 21, "all but code");
        let filter = Filter { device: Some("nobody".to_owned()), ..Filter::default() };
        assert_eq!(page(&trace, &filter).1["totals"], serde_json::json!([16, 0, 0]));
    }

    #[test]
    fn firmware_and_what_boots_a_disk_are_stretches_of_their_own() {
        let range = |name: &str, base, size| Range { name: name.to_owned(), base, size };
        let mut trace = Trace::default();
        trace.header.ports = vec![range("boot-marks", 0x80, 1), range("fw-cfg", 0x510, 12)];
        trace.tracks = [(0, "vcpu0".to_owned())].into();
        let out = |time, rip, address| {
            let kind = Kind::PioOut as u8;
            (0, Event { time, rip, kind, address, size: 1, count: 1, ..Event::default() })
        };
        let (rom, kernel) = (0xffff_f100, 0xffff_ffff_8100_0000);
        trace.events = vec![
            out(1, 0xfff2, 0x80),
            out(2, rom, 0x518),
            out(3, rom, 0x518),
            out(4, rom, 0x80),
            out(5, 0x100_0500, 0x1234),
            out(6, kernel, 0x1234),
        ];
        let names = |trace: &Trace| -> Vec<String> {
            let phases = page(trace, &Filter::default()).1["phases"].as_array().unwrap().clone();
            phases.iter().map(|phase| phase["name"].as_str().unwrap().to_owned()).collect()
        };
        assert_eq!(names(&trace), ["monitor", "firmware", "guest", "kernel"]);
        // What it starts is the program that boots a disk.
        trace.header.boots_disk = true;
        let program = [out(5, 0x10_3910, 0x3fd), out(5, 0x10_3950, 0x3f8)];
        trace.events.splice(4..4, program);
        assert_eq!(names(&trace), ["monitor", "firmware", "disk", "guest", "kernel"]);
        trace.events.drain(..4);
        assert_eq!(names(&trace), ["monitor", "disk", "guest", "kernel"]);
    }

    #[test]
    fn first_uses_marks_and_phases_are_told_in_order() {
        let range = |name: &str, base, size| Range { name: name.to_owned(), base, size };
        let mut trace = Trace::default();
        trace.header.ports = vec![range("boot-marks", 0x80, 1), range("serial", 0x3f8, 8)];
        trace.tracks = [(0, "vcpu0".to_owned()), (1, "vcpu1".to_owned())].into();
        let kernel = 0xffff_ffff_8100_0000;
        let out = |track, rip, address, value| {
            let kind = Kind::PioOut as u8;
            (track, Event { rip, kind, address, value, size: 1, count: 1, ..Event::default() })
        };
        trace.events = vec![
            out(0, 0x100_0500, 0x80, 0x10),
            out(0, kernel, 0x3f8, 0x41),
            // It goes back for a moment, and its second processor begins down there: no program yet.
            out(0, 0x100_01c7, 0x3f8, 0x42),
            out(1, 0x9_a000, 0x80, 0x10),
            out(1, kernel, 0x80, 0x20),
            out(0, 0x40_1000, 0x1234, 7),
        ];
        let (_, data) = page(&trace, &Filter::default());
        let names = |key: &str| {
            let all = data[key].as_array().unwrap().iter();
            all.map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names("phases"), ["monitor", "guest", "kernel", "programs"]);
        let uses = ["vcpu0", "mark 0x10", "serial", "vcpu1", "mark 0x10", "mark 0x20", "nobody", "last exit"];
        assert_eq!(names("uses"), uses);
        let serial = &data["uses"][2];
        assert_eq!((&serial["sentence"], &serial["count"]), (&"serial THR <- 'A'".into(), &2.into()));
        assert_eq!((&serial["before"][0], &serial["number"]), (&1.into(), &2.into()));
        assert_eq!(data["uses"][7]["sentence"], "nobody <- 0x7");
    }

    #[test]
    fn what_is_too_much_to_tell_one_by_one_is_counted() {
        let mut trace = Trace::default();
        let event = Event { kind: Kind::PioOut as u8, address: 0x3f8, size: 1, count: 1, ..Event::default() };
        trace.events = vec![(0, event); 200_010];
        let (_, data) = page(&trace, &Filter::default());
        assert_eq!(data["events"]["t"].as_array().unwrap().len(), 200_000);
        assert_eq!(
            (&data["totals"][0], &data["by_reason"][0]["counts"][0]),
            (&200_010.into(), &200_010.into())
        );
        let density = data["density"].as_array().unwrap();
        assert_eq!(density.iter().map(|bin| bin[0].as_u64().unwrap()).sum::<u64>(), 200_010);
    }
}
