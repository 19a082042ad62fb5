//! The trace-event format of Chromium (JSON), which ui.perfetto.dev and chrome://tracing open: a track per thread, a slice for
//! each stretch in the guest and each answer of the monitor.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::before;
use super::line::plain_name;
use super::{Filter, Report};
use crate::{devices, frames};
use vmm_monitor::recorder::{Event, Kind};

/// One process: the machine.
const PROCESS: u32 = 1;

impl Report<'_> {
    /// Everything that passes `filter`.
    ///
    /// # Errors
    /// As `out` has them.
    pub fn perfetto(&self, filter: &Filter, out: &mut dyn Write) -> io::Result<()> {
        write!(out, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
        let name = json!({"name": "process_name", "ph": "M", "pid": PROCESS, "args": {"name": "vmm"}});
        write!(out, "{name}")?;
        for (track, name) in &self.trace.tracks {
            let name = json!({"name": "thread_name", "ph": "M", "pid": PROCESS, "tid": track, "args": {"name": name}});
            write!(out, ",\n{name}")?;
        }
        if !filter.is_set() {
            for before::Row { track, name, what, from, took } in self.before() {
                let (ts, dur) = (from as f64 / 1e3, took as f64 / 1e3);
                let slice = json!({"name": name, "cat": "monitor", "ph": "X", "pid": PROCESS, "tid": track, "ts": ts, "dur": dur,
                                   "args": {"what": what}});
                write!(out, ",\n{slice}")?;
            }
        }
        for (track, event) in &self.trace.events {
            if filter.passes(self, *track, event) {
                for slice in self.slices(*track, event) {
                    write!(out, ",\n{slice}")?;
                }
            }
        }
        writeln!(out, "]}}")
    }

    fn slices(&self, track: u32, event: &Event) -> Vec<Value> {
        let Some(kind) = event.kind() else { return Vec::new() };
        // Microseconds, as the format has it.
        let us = |ns: f64| ns / 1e3;
        let (start, took) = (self.trace.since_start(event.time), self.trace.ns(event.handled.into()));
        let slice = |name: &str, category: &str, start: f64, took: f64, arguments: Value| {
            json!({"name": name, "cat": category, "ph": "X", "pid": PROCESS, "tid": track,
                   "ts": us(start), "dur": us(took), "args": arguments})
        };
        if kind == Kind::Interrupt {
            return vec![
                json!({"name": "interrupt", "ph": "i", "s": "t", "pid": PROCESS, "tid": track, "ts": us(start),
                               "args": {"queue": event.address}}),
            ];
        }
        if kind == Kind::Frame {
            return vec![
                json!({"name": frames::tell(event), "ph": "i", "s": "t", "pid": PROCESS, "tid": track, "ts": us(start)}),
            ];
        }
        if kind == Kind::InKernel {
            let arguments = json!({"rip": self.symbols.name(event.rip)});
            return vec![slice(&self.reason(kind, event), "kvm", start, took, arguments)];
        }
        if !kind.is_exit() {
            let arguments = json!({"index": event.address, "completed": event.value});
            return vec![slice(plain_name(kind), "device", start, took, arguments)];
        }
        let (rip, instruction) = self.code.instruction(event);
        let guest = self.trace.ns(event.guest);
        let place = json!({"until": self.symbols.name(rip)});
        let arguments = json!({
            "rip": self.symbols.name(rip),
            "instruction": instruction,
            "reason": self.reason(kind, event),
            "answer": devices::tell(&self.trace.header, event),
        });
        let name = devices::name(&self.trace.header, event).unwrap_or_else(|| plain_name(kind));
        vec![
            slice("guest", "guest", start - guest, guest, place),
            slice(name, "exit", start, took, arguments),
        ]
    }
}
