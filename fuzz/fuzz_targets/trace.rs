//! Trace files of any content, told in every way, with symbols out of the file or of the fuzzer's own: a report or an error.
#![no_main]

use std::fs::File;
use std::io::{Write, sink};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_trace::file::{MAGIC, Trace};
use vmm_trace::report::{Filter, Report};
use vmm_trace::symbols::Symbols;

fn file(bytes: &[u8]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("trace", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

/// A file whose magic and header are good, and whose chunks are `data`: kind and track of one byte each, length of two.
fn chunks(vendor: &str, mut data: &[u8]) -> Vec<u8> {
    let header = format!(
        r#"{{"vmm":"1","kernel":null,"cmdline":"quiet","vendor":"{vendor}","ports":[{{"name":"serial","base":1016,"size":8}}],
        "addresses":[{{"name":"virtio-blk0","base":4261412864,"size":4096}}],"in_kernel":""}}"#
    );
    let mut all = MAGIC.to_vec();
    all.extend((header.len() as u32).to_le_bytes());
    all.extend(header.as_bytes());
    while let Some((&[kind, track, low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
        let track = u32::from(track) << if track & 0x80 != 0 { 9 } else { 0 };
        for number in [u32::from(kind), track, len as u32] {
            all.extend(number.to_le_bytes());
        }
        all.extend(&rest[..len]);
        data = &rest[len..];
    }
    all
}

fn tell(path: &Path, symbols: Symbols) {
    let trace = match Trace::read(path) {
        Ok(trace) => trace,
        // The whole text, as a user would see it.
        Err(error) => return assert!(!vmm_monitor::error_chain(&error).is_empty()),
    };
    let symbols = Symbols::of_guest(&trace.symbols).unwrap_or(symbols);
    let mut report = Report::new(&trace, symbols);
    let _ = report.find_shift();
    let out = &mut sink();
    for filter in [Filter::default(), Filter { port: Some(0x3f8..=0x3ff), ..Filter::default() }] {
        report.lines(&filter, out).unwrap();
        report.json(&filter, out).unwrap();
        report.write_stats(&filter, out).unwrap();
        report.perfetto(&filter, out).unwrap();
        report.html(&filter, out).unwrap();
    }
    report.write_advice(out).unwrap();
}

fuzz_target!(|data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let (_list, list) = file(data);
    let symbols = if how & 1 != 0 { Symbols::read(&list).unwrap_or_default() } else { Symbols::default() };
    let bytes = match how & 6 {
        0 => data.to_vec(),
        2 => chunks("AuthenticAMD", data),
        _ => chunks("GenuineIntel", data),
    };
    let (_trace, path) = file(&bytes);
    tell(&path, symbols);
});
