//! The domains in which the host's resolver looks names up that are not whole: given to the guest, whose resolver does the same.

use std::time::Instant;

use super::dns::{FRESH, LABEL, host_config};

/// Bytes of the whole list: one option of DHCP (RFC 3397, 2) holds it, and a message of 576 bytes that. More domains are left out.
const MOST: usize = 255;
/// A name's bytes on the wire (RFC 1035, 2.3.4).
const LONGEST: usize = 255;

/// The list, in the form of RFC 1035 without compression, which all three protocols have it in.
#[derive(Debug, Default)]
pub struct Search {
    /// Read from it, and from nothing else.
    pub is_hosts: bool,
    list: Vec<u8>,
    read: Option<Instant>,
}

impl Search {
    /// The host's, as it is whenever it is asked for.
    pub fn of_host() -> Self {
        Self { is_hosts: true, ..Self::default() }
    }

    /// What a resolv.conf(5) says.
    #[cfg(test)]
    pub fn of(text: &str) -> Self {
        Self { list: parse(text), ..Self::default() }
    }

    /// The list. Empty if there is none.
    pub fn list(&mut self, now: Instant) -> &[u8] {
        let is_stale = self.read.is_none_or(|read| now.saturating_duration_since(read) > FRESH);
        if self.is_hosts && is_stale {
            if let Some(text) = host_config(self.read.is_none()) {
                self.list = parse(&text);
            }
            self.read = Some(now);
        }
        &self.list
    }
}

/// The domains of a resolv.conf(5): the last line that names some counts.
fn parse(text: &str) -> Vec<u8> {
    let mut lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let most = match words.next()? {
            "search" => usize::MAX,
            "domain" => 1,
            _ => return None,
        };
        Some(words.take(most))
    });
    let mut list = Vec::new();
    for name in lines.next_back().into_iter().flatten().filter_map(wire) {
        if list.len() + name.len() > MOST {
            break;
        }
        list.extend(name);
    }
    list
}

/// A name as it is on the wire. `None` if it is none, or the root, in which nobody has to be told to look.
fn wire(name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for label in name.strip_suffix('.').unwrap_or(name).split('.') {
        let is_fine = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if label.is_empty() || label.len() > LABEL.into() || !is_fine {
            return None;
        }
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    (bytes.len() <= LONGEST).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_with_domains_counts_and_what_is_no_name_is_left_out() {
        for (text, list) in [
            ("nameserver 10.0.0.1\n", &b""[..]),
            ("search .\n", b""),
            ("search a.example b.\n", b"\x01a\x07example\x00\x01b\x00"),
            ("search a\ndomain b.c d\n", b"\x01b\x01c\x00"),
            ("domain a\n search b_1\t c-d\n", b"\x03b_1\x00\x03c-d\x00"),
            ("search a..b .a a\u{e9} a;b good\n", b"\x04good\x00"),
        ] {
            assert_eq!(parse(text), list, "{text:?}");
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_cut_between_names() {
        let label = "l".repeat(63);
        let name = [label.as_str(); 3].join(".");
        assert_eq!(parse(&format!("search {name} {label}")).len(), 193, "193 and 65 bytes are too many");
        assert_eq!(parse(&format!("search {name} {}", &label[..60])).len(), MOST);
        assert_eq!(wire(&format!("{label}l")), None);
        assert_eq!(wire(&[label.as_str(); 4].join(".")), None);
        assert!(parse(&format!("search {}", "abc ".repeat(100_000))).len() <= MOST);
    }

    #[test]
    fn a_search_list_that_is_not_the_hosts_is_not_read_from_it() {
        let now = Instant::now();
        assert_eq!(Search::default().list(now), b"");
        assert_eq!(Search::of("search lab").list(now), b"\x03lab\x00");
    }
}
