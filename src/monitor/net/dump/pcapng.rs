//! Blocks of a pcapng file (draft-ietf-opsawg-pcapng), as bytes. Numbers are this machine's: the section says which way round.

/// Where frames come from, as the file's reader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// What it leads to.
    pub description: String,
    /// Its address.
    pub mac: [u8; 6],
}

/// Which way a frame went, from the interface's point of view (the values of `epb_flags`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    In = 1,
    /// From it.
    Out = 2,
}

/// Bytes of a packet's block beside its data, padding included.
pub const AROUND: usize = 48;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
/// LINKTYPE_ETHERNET.
const ETHERNET: u16 = 1;
/// `if_tsresol`: times are in units of 10^-9 s.
const NANOSECONDS: u8 = 9;

/// What every interface says of its frames.
const COMMENT: &str = "Frames as the guest hands them over and gets them: a checksum may be left to the other side, and so not \
                       be right yet; TCP and UDP may come in segments of up to 64 KiB that are cut later.";

/// The head of a file: its section, and its interfaces, whose frames have `most` bytes at most.
pub fn head(interfaces: &[Interface], most: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let application = format!("vmm {}", env!("CARGO_PKG_VERSION"));
    block(&mut bytes, SECTION, |body| {
        body.extend(0x1a2b_3c4d_u32.to_ne_bytes());
        body.extend([1u16, 0].map(u16::to_ne_bytes).as_flattened());
        // The section's length is not known.
        body.extend(u64::MAX.to_ne_bytes());
        options(body, &[(4, application.as_bytes())]);
    });
    for Interface { name, description, mac } in interfaces {
        block(&mut bytes, INTERFACE, |body| {
            body.extend([ETHERNET, 0].map(u16::to_ne_bytes).as_flattened());
            body.extend(most.to_ne_bytes());
            let (name, description) = (name.as_bytes(), description.as_bytes());
            let comment = COMMENT.as_bytes();
            options(body, &[(1, comment), (2, name), (3, description), (6, mac), (9, &[NANOSECONDS])]);
        });
    }
    bytes
}

/// Adds a frame of `len` bytes, of which `fill` puts the first `kept` into what it is given.
pub fn packet(
    bytes: &mut Vec<u8>,
    interface: u32,
    nanos: u64,
    direction: Direction,
    len: usize,
    kept: usize,
    fill: impl FnOnce(&mut [u8]),
) {
    block(bytes, PACKET, |body| {
        body.extend(interface.to_ne_bytes());
        body.extend(time(nanos));
        body.extend([kept as u32, len as u32].map(u32::to_ne_bytes).as_flattened());
        let at = body.len();
        body.resize(at + kept.next_multiple_of(4), 0);
        fill(&mut body[at..at + kept]);
        options(body, &[(2, &(direction as u32).to_ne_bytes())]);
    });
}

/// Adds how many of an interface's frames are here, and how many were left out.
pub fn statistics(bytes: &mut Vec<u8>, interface: u32, nanos: u64, kept: u64, lost: u64) {
    block(bytes, STATISTICS, |body| {
        body.extend(interface.to_ne_bytes());
        body.extend(time(nanos));
        options(body, &[(4, &(kept + lost).to_ne_bytes()), (5, &lost.to_ne_bytes())]);
    });
}

/// The length of the block that `bytes` begin with.
pub fn block_len(bytes: &[u8]) -> Option<usize> {
    Some(u32::from_ne_bytes(bytes.get(4..8)?.try_into().ok()?) as usize)
}

fn time(nanos: u64) -> [u8; 8] {
    let mut both = [0; 8];
    both[..4].copy_from_slice(&((nanos >> 32) as u32).to_ne_bytes());
    both[4..].copy_from_slice(&(nanos as u32).to_ne_bytes());
    both
}

/// A block: its kind, its length, the body, and its length once more.
fn block(bytes: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let at = bytes.len();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend([0; 4]);
    body(bytes);
    let len = ((bytes.len() - at + 4) as u32).to_ne_bytes();
    bytes.extend(len);
    bytes[at + 4..at + 8].copy_from_slice(&len);
}

/// Options by their codes, and their end.
fn options(body: &mut Vec<u8>, list: &[(u16, &[u8])]) {
    for (code, value) in list {
        body.extend([*code, value.len() as u16].map(u16::to_ne_bytes).as_flattened());
        body.extend(*value);
        body.resize(body.len() + (value.len().next_multiple_of(4) - value.len()), 0);
    }
    body.extend([0; 4]);
}
