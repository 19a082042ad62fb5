//! Names: the host's resolvers, and those that are answered here: the host's, and those of machines on the guest's segments.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::addresses::{GATEWAY, GATEWAY6};
use crate::net::switch::Neighbours;

/// The host, as the guest calls it, in the wire's form.
const HOST_NAME: &[u8] = b"\x04host\x03vmm\x08internal\x00";
/// Where machines' names are that have a dot.
const DOMAIN: &[u8] = b"\x03vmm\x08internal\x00";
/// The longest label of a name (RFC 1035, 2.3.4).
pub const LABEL: u8 = 63;
/// Bytes of a message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// The name's address may be kept for so many seconds.
const TTL: u32 = 60;

/// The answer to a query for the host's name, with its address in IPv6 if that is `ipv6`, or for that of one of the `neighbours`,
/// which have IPv4. `None` for queries that resolvers answer.
pub fn own_answer(query: &[u8], ipv6: bool, neighbours: &Neighbours) -> Option<Vec<u8>> {
    let (header, question) = query.split_at_checked(HEADER)?;
    let (name, rest) = split_name(question)?;
    let kind: [u8; 4] = *rest.first_chunk()?;
    let is_query = header[2] & 0xf8 == 0 && header[4..6] == [0, 1];
    if !is_query {
        return None;
    }
    let (four, six) = match name.eq_ignore_ascii_case(HOST_NAME) {
        true => (GATEWAY, ipv6.then_some(GATEWAY6)),
        false => (neighbours.find(machine(name)?)?, None),
    };
    let kind = (u16::from_be_bytes([kind[0], kind[1]]), u16::from_be_bytes([kind[2], kind[3]]));
    let address = match kind {
        (TYPE_A, CLASS_IN) => Some(four.octets().to_vec()),
        (TYPE_AAAA, CLASS_IN) => six.map(|six| six.octets().to_vec()),
        _ => None,
    };
    let mut answer = header[..2].to_vec();
    // A response with authority, recursion desired as asked, and available; no error. One question, the answers, nothing else.
    answer.extend([0x84 | header[2] & 1, 0x80, 0, 1, 0, address.is_some().into(), 0, 0, 0, 0]);
    answer.extend(&question[..name.len() + 4]);
    if let Some(address) = address {
        // The name is that of the question, at byte 12.
        answer.extend([0xc0, HEADER as u8, 0, kind.0 as u8, 0, CLASS_IN as u8]);
        answer.extend(TTL.to_be_bytes());
        answer.extend([0, address.len() as u8]);
        answer.extend(address);
    }
    Some(answer)
}

/// The name at the start of `bytes` with its last, empty label, and what follows.
fn split_name(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut len = 0;
    loop {
        match *bytes.get(len)? {
            0 => return bytes.split_at_checked(len + 1),
            label if label <= LABEL => len += 1 + usize::from(label),
            _ => return None,
        }
    }
}

/// The machine that `name`, in the wire's form, is the name of: `web`, or `web.vmm.internal`.
fn machine(name: &[u8]) -> Option<&str> {
    let (len, rest) = name.split_first()?;
    let (label, domain) = rest.split_at_checked(usize::from(*len))?;
    let is_ours = domain == [0] || domain.eq_ignore_ascii_case(DOMAIN);
    str::from_utf8(label).ok().filter(|label| is_ours && !label.is_empty())
}

/// Who answers other queries.
pub struct Resolvers {
    fixed: bool,
    list: Vec<SocketAddr>,
    read: Option<Instant>,
}

/// How long the host's list is taken to stand.
pub const FRESH: Duration = Duration::from_secs(5);

impl Resolvers {
    /// Those of `fixed`, or, if there are none, the host's.
    pub fn new(fixed: &[SocketAddr]) -> Self {
        Self { fixed: !fixed.is_empty(), list: fixed.to_vec(), read: None }
    }

    /// The resolver for the `attempt`th time that a question is asked.
    pub fn pick(&mut self, attempt: usize, now: Instant) -> Option<SocketAddr> {
        let is_stale = self.read.is_none_or(|read| now.saturating_duration_since(read) > FRESH);
        if !self.fixed && is_stale {
            // A laptop's network changes while its guests run.
            if let Some(text) = host_config(self.read.is_none()) {
                self.list = parse(&text);
            }
            self.read = Some(now);
        }
        self.list.get(attempt % self.list.len().max(1)).copied()
    }
}

/// The host's resolv.conf(5). One that cannot be read says nothing the `first` time; later, what was read before stands: it may be out of
/// a sandbox's reach when it was replaced.
pub fn host_config(first: bool) -> Option<String> {
    let read = fs::read_to_string("/etc/resolv.conf").ok();
    read.or_else(|| first.then(String::new))
}

/// The servers of a resolv.conf(5); the library asks this host where there are none.
fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let server = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        server.parse::<IpAddr>().ok()
    });
    let mut servers: Vec<_> = servers.collect();
    if servers.is_empty() {
        servers.push(std::net::Ipv4Addr::LOCALHOST.into());
    }
    servers.into_iter().map(|ip| SocketAddr::new(ip, 53)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::switch::Switch;

    fn query(name: &[u8], kind: u8) -> Vec<u8> {
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend(name);
        query.extend([0, kind, 0, 1]);
        query
    }

    #[test]
    fn the_hosts_name_has_the_gateways_address() {
        let answer =
            own_answer(&query(b"\x04HOST\x03vmm\x08internal\x00", 1), true, &Neighbours::default()).unwrap();
        assert_eq!(answer[..12], [0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert!(answer.ends_with(&[0, 4, 10, 0, 2, 2]));
        let six = own_answer(&query(HOST_NAME, 28), true, &Neighbours::default()).unwrap();
        assert!(six[7] == 1 && six.ends_with(&GATEWAY6.octets()) && six[six.len() - 18..][..2] == [0, 16]);
        for no_such_type in [
            own_answer(&query(HOST_NAME, 28), false, &Neighbours::default()).unwrap(),
            own_answer(&query(HOST_NAME, 16), true, &Neighbours::default()).unwrap(),
        ] {
            assert_eq!((no_such_type[7], no_such_type.len()), (0, 12 + HOST_NAME.len() + 4));
        }
        assert_eq!(
            own_answer(&query(b"\x05guest\x03vmm\x08internal\x00", 1), true, &Neighbours::default()),
            None
        );
        let whole = query(HOST_NAME, 1);
        for len in 0..whole.len() {
            assert_eq!(own_answer(&whole[..len], true, &Neighbours::default()), None, "{len} bytes");
        }
    }

    #[test]
    fn machines_on_the_guests_segments_have_names_and_those_on_others_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let join = |segment: &str, number, name| {
            let mut switch = Switch::join(&dir.path().join("vmm"), segment).unwrap();
            switch.lease([2, 0, 0, 0, 0, number], Some(name)).unwrap();
            switch
        };
        let (web, stranger) = (join("lab", 1, "web"), join("other", 2, "stranger"));
        let neighbours = Neighbours::default();
        let ask = |name: &[u8], kind| own_answer(&query(name, kind), true, &neighbours);
        assert_eq!(ask(b"\x03web\x00", 1), None);
        neighbours.add(web.folder().to_owned());
        let address = neighbours.find("WEB").unwrap().octets();
        for name in [&b"\x03Web\x00"[..], b"\x03web\x03vmm\x08internal\x00"] {
            let answer = ask(name, 1).unwrap();
            assert!(answer[7] == 1 && answer.ends_with(&address) && answer[12..].starts_with(name));
            assert_eq!(ask(name, 28).unwrap()[7], 0, "of IPv6 nothing is known");
            for len in 0..query(name, 1).len() {
                assert_eq!(own_answer(&query(name, 1)[..len], true, &neighbours), None, "{len} bytes");
            }
        }
        for unknown in [
            &b"\x08stranger\x00"[..],
            b"\x03web\x07example\x00",
            b"\x00",
            b"\xc0\x0c",
            b"\x40web",
            b"\x03w\xffb\x00",
        ] {
            assert_eq!(ask(unknown, 1), None, "{unknown:?}");
        }
        drop((web, stranger));
        assert_eq!(ask(b"\x03web\x00", 1), None, "it is gone");
    }

    #[test]
    fn resolv_conf_is_read_as_the_library_reads_it() {
        let text = "# comment\nsearch a b\nnameserver 10.1.1.1 # first\nnameserver ::1\n nameserver fe80::1%eth0\nnameserver\n";
        let found: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.1.1:53", "[::1]:53"]);
        assert_eq!(parse("").len(), 1);
    }
}
