//! The `state` of a snapshot, part by part: what each is in its present version, and what is done with one of another.
//!
//! A part whose bytes are not those in `state/` any more wants a new version (`Stateful::VERSION`), and a way to read the old one.

use std::fs;

use crate::counting::*;
use crate::images::*;
use crate::place::*;

/// Before the header: its magic, the file's version, the header's checksum.
const HEADER: usize = 16;

struct Reader<'a>(&'a [u8]);

/// postcard: a number is 7 bits a byte, the lowest first, and the last without its highest bit; a list has its length first.
impl<'a> Reader<'a> {
    fn number(&mut self) -> Option<usize> {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let (bytes, rest) = self.number().and_then(|len| self.0.split_at_checked(len))?;
        self.0 = rest;
        Some(bytes)
    }
}

/// The parts of the state in `bytes`, if it is one, by name.
fn parts(bytes: &[u8]) -> Option<Vec<(String, &[u8])>> {
    let mut reader = Reader(bytes);
    let mut all = vec![("host".to_owned(), reader.bytes()?), ("vm".to_owned(), reader.bytes()?)];
    for number in 0..reader.number()? {
        all.push((format!("vcpu{number}"), reader.bytes()?));
    }
    for _ in 0..reader.number()? {
        all.push((str::from_utf8(reader.bytes()?).ok()?.to_owned(), reader.bytes()?));
    }
    // Without a ROM.
    (reader.0 == [0]).then_some(all)
}

/// The file in two: what is before the state, and that.
fn split(file: &[u8]) -> (&[u8], &[u8]) {
    let is_state = |at: &usize| parts(&file[*at..]).is_some_and(|parts| parts.len() > 4);
    file.split_at((HEADER..file.len()).find(is_state).expect("a state"))
}

/// What a golden file says of a part.
fn line(name: &str, bytes: &[u8]) -> String {
    let (version, state) = bytes.split_first().unwrap();
    let state = match state.len() {
        // These are other on each host.
        _ if ["host", "vm"].contains(&name) || name.starts_with("vcpu") => String::new(),
        0..100 => state.iter().map(|byte| format!("{byte:02x}")).collect(),
        len => format!("{len} bytes, CRC-32 {:08x}", crc32fast::hash(state)),
    };
    format!("{name} {version}: {state}").trim_end().to_owned()
}

#[test]
fn each_part_is_what_its_version_says() {
    if !has_kvm("each_part_is_what_its_version_says") {
        return;
    }
    for transport in ["mmio", "pci"] {
        let place = Place::new();
        place.file("halt", kernel(&HALT));
        place.file("disk", [0; 1 << 16]);
        let devices = "--mem 32M --disk path=disk,readonly --rng --vsock cid=9 --net user,mac=52:54:00:12:34:56 \
            --share .,tag=t --rtc --serial file=out --port p=off";
        let _guest = place.start("v", &format!("--transport {transport} {devices}"));
        place.done("snapshot create v s");
        let file = fs::read(place.path("s/state")).unwrap();
        let now: String =
            parts(split(&file).1).unwrap().iter().map(|(name, bytes)| line(name, bytes) + "\n").collect();
        let golden = format!("{}/../../tests/cli/state/{transport}.golden", env!("CARGO_MANIFEST_DIR"));
        let then = fs::read_to_string(&golden).unwrap_or_default();
        assert!(now == then, "{golden} is otherwise: that wants another version. Now it is:\n{now}");
    }
}

/// `number` as postcard has it.
fn encoded(mut number: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

#[test]
fn a_part_of_another_version_is_refused_by_its_name() {
    if !has_kvm("a_part_of_another_version_is_refused_by_its_name") {
        return;
    }
    let (place, guest) = counting("--rng");
    place.done("snapshot create --stop v s");
    guest.finish();
    let file = fs::read(place.path("s/state")).unwrap();
    let (head, state) = split(&file);
    for (name, version, why) in [
        ("virtio-rng", 3, "virtio-rng: it is of version 3, and this vmm reads version 1"),
        ("serial", 0, "serial: it is of version 0, and this vmm reads version 1"),
        ("vcpu0", 2, "vcpu0: it is of version 2, and this vmm reads version 1"),
        ("vm", 2, "the VM: it is of version 2, and this vmm reads version 1"),
        ("host", 9, "the host: it is of version 9, and this vmm reads version 1"),
    ] {
        let mut state = state.to_vec();
        let part = parts(&state).unwrap().into_iter().find(|(part, _)| part == name).expect(name).1;
        let at = part.as_ptr().addr() - state.as_ptr().addr();
        state[at] = version;
        // Two checksums: the state's is the second number of the header.
        let mut reader = Reader(&head[HEADER..]);
        let config = reader.number().unwrap() as u32;
        reader.number().unwrap();
        let header = [&encoded(config)[..], &encoded(crc32fast::hash(&state)), reader.0].concat();
        let sum = crc32fast::hash(&header).to_le_bytes();
        fs::write(place.path("s/state"), [&head[..HEADER - 4], &sum, &header, &state].concat()).unwrap();
        let said = place.fails("restore s --serial file=more", BAD_ARGUMENT);
        assert!(said.contains(why), "{said}");
        assert!(said.ends_with("hint: restore it with the vmm that saved it\n"), "{said}");
    }
}
