//! What stands before each file of an archive: a ustar header, and a pax one for what that has no room for.

use std::io::{self, Read};

use super::{BLOCK, Error, padding};

/// The longest pax header or GNU long name that is read.
const MAX_EXTRA: u64 = 1 << 20;

/// What attributes are called in pax headers.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Kinds of files, as ustar has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Folder,
    Fifo,
}

impl Kind {
    const ALL: [(Self, u8); 7] = [
        (Self::File, b'0'),
        (Self::HardLink, b'1'),
        (Self::Symlink, b'2'),
        (Self::Char, b'3'),
        (Self::Block, b'4'),
        (Self::Folder, b'5'),
        (Self::Fifo, b'6'),
    ];
}

/// One file's facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Since 1970: seconds, and nanoseconds more.
    pub modified: (i64, u32),
    /// Bytes in the archive.
    pub size: u64,
    /// Of links.
    pub target: Vec<u8>,
    /// Of devices: major, minor.
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a sparse file (GNU's format 1.0: its bytes begin with a map): its size with its holes.
    pub sparse: Option<u64>,
}

impl Entry {
    /// The header's blocks.
    pub fn blocks(&self) -> Vec<u8> {
        let mut extra = Vec::new();
        let fits = |number: u64, digits: u32| number < 1 << (3 * digits);
        match self.sparse {
            Some(size) => {
                record(&mut extra, b"GNU.sparse.major", b"1");
                record(&mut extra, b"GNU.sparse.minor", b"0");
                record(&mut extra, b"GNU.sparse.name", &self.path);
                record(&mut extra, b"GNU.sparse.realsize", size.to_string().as_bytes());
            }
            None if self.path.len() > 100 => record(&mut extra, b"path", &self.path),
            None => {}
        }
        if self.target.len() > 100 {
            record(&mut extra, b"linkpath", &self.target);
        }
        if !fits(self.size, 11) {
            record(&mut extra, b"size", self.size.to_string().as_bytes());
        }
        for (name, number) in [(&b"uid"[..], self.uid), (b"gid", self.gid)] {
            if !fits(number.into(), 7) {
                record(&mut extra, name, number.to_string().as_bytes());
            }
        }
        let (seconds, nanoseconds) = self.modified;
        if nanoseconds != 0 || seconds < 0 || !fits(seconds.unsigned_abs(), 11) {
            record(&mut extra, b"mtime", decimal(self.modified).as_bytes());
        }
        for (name, value) in &self.xattrs {
            record(&mut extra, &[XATTR, name].concat(), value);
        }
        let mut blocks = Vec::new();
        if !extra.is_empty() {
            let name = b"././@PaxHeader";
            blocks.extend(self.ustar(b'x', name, b"", extra.len() as u64));
            blocks.extend_from_slice(&extra);
            blocks.resize(blocks.len() + padding(extra.len() as u64), 0);
        }
        let (_, kind) = Kind::ALL[self.kind as usize];
        blocks.extend(self.ustar(kind, &self.path, &self.target, self.size));
        blocks
    }

    fn ustar(&self, kind: u8, path: &[u8], target: &[u8], size: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, len: usize, bytes: &[u8]| {
            let bytes = &bytes[..bytes.len().min(len)];
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // One that does not fit is in the pax header; here it is cut.
        let octal = |number: u64, digits: usize| {
            let largest = (1 << (3 * digits)) - 1;
            format!("{:0digits$o}", number.min(largest)).into_bytes()
        };
        put(0, 100, path);
        put(100, 8, &octal(self.mode.into(), 7));
        put(108, 8, &octal(self.uid.into(), 7));
        put(116, 8, &octal(self.gid.into(), 7));
        put(124, 12, &octal(size, 11));
        put(136, 12, &octal(self.modified.0.max(0) as u64, 11));
        put(148, 8, b"        ");
        put(156, 1, &[kind]);
        put(157, 100, target);
        put(257, 8, b"ustar\x0000");
        put(329, 8, &octal(self.device.0.into(), 7));
        put(337, 8, &octal(self.device.1.into(), 7));
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(&[&octal(sum, 6)[..], b"\0 "].concat());
        block
    }

    /// The next file's facts; none at the archive's end.
    pub fn read(from: &mut impl Read) -> Result<Option<Self>, Error> {
        let mut extra = Vec::new();
        let (mut long_path, mut long_target) = (None, None);
        loop {
            let Some(block) = read_block(from)? else { return Ok(None) };
            if block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            check_sum(&block)?;
            let field = |at: usize, len: usize| &block[at..at + len];
            let size = number(field(124, 12))?;
            match block[156] {
                b'x' => extra = read_extra(from, size)?,
                // Of all that follow: comments, as a rule.
                b'g' => drop(read_extra(from, size)?),
                b'L' => long_path = Some(text(&read_extra(from, size)?).to_vec()),
                b'K' => long_target = Some(text(&read_extra(from, size)?).to_vec()),
                kind => {
                    let prefix = if field(257, 6) == b"ustar\0" { text(field(345, 155)) } else { b"" };
                    let name = text(field(0, 100));
                    let name = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
                    let kind = match kind {
                        0 | b'7' => Some(Kind::File),
                        _ => Kind::ALL.iter().find(|(_, number)| *number == kind).map(|(kind, _)| *kind),
                    };
                    let small = |bytes| number(bytes).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
                    let mut entry = Self {
                        path: long_path.unwrap_or(name),
                        kind: kind.ok_or(Error::Format("it has a file of a kind that is not known"))?,
                        mode: small(field(100, 8))? & 0o7777,
                        uid: small(field(108, 8))?,
                        gid: small(field(116, 8))?,
                        modified: (i64::try_from(number(field(136, 12))?).unwrap_or(0), 0),
                        size,
                        target: long_target.unwrap_or_else(|| text(field(157, 100)).to_vec()),
                        device: (small(field(329, 8))?, small(field(337, 8))?),
                        xattrs: Vec::new(),
                        sparse: None,
                    };
                    entry.amend(&extra)?;
                    if entry.path.contains(&0) || entry.target.contains(&0) {
                        return Err(Error::Format("it has a name with a NUL"));
                    }
                    // All others have no bytes, whatever their header says.
                    if entry.kind != Kind::File {
                        entry.size = 0;
                    }
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Takes what a pax header says.
    fn amend(&mut self, mut extra: &[u8]) -> Result<(), Error> {
        const BAD: Error = Error::Format("it has a pax header that is none");
        let mut version = (None, None);
        while !extra.is_empty() {
            // "LENGTH NAME=VALUE\n", and LENGTH counts itself.
            let blank = extra.iter().position(|byte| *byte == b' ').ok_or(BAD)?;
            let length = usize::try_from(digits(&extra[..blank])?).map_err(|_| BAD)?;
            let (record, rest) = extra.split_at_checked(length).ok_or(BAD)?;
            extra = rest;
            let record = record.get(blank + 1..).and_then(|record| record.strip_suffix(b"\n")).ok_or(BAD)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            let (name, value) = (&record[..equals], &record[equals + 1..]);
            let small = |value| digits(value).map(|number| u32::try_from(number).unwrap_or(u32::MAX));
            match name {
                b"path" | b"GNU.sparse.name" => self.path = value.to_vec(),
                b"linkpath" => self.target = value.to_vec(),
                b"size" => self.size = digits(value)?,
                b"uid" => self.uid = small(value)?,
                b"gid" => self.gid = small(value)?,
                b"mtime" => self.modified = time(value).ok_or(BAD)?,
                b"GNU.sparse.major" => version.0 = Some(digits(value)?),
                b"GNU.sparse.minor" => version.1 = Some(digits(value)?),
                b"GNU.sparse.realsize" => self.sparse = Some(digits(value)?),
                _ => {
                    if let Some(name) = name.strip_prefix(XATTR) {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    } else if name.starts_with(b"GNU.sparse.") {
                        return Err(Error::Format("it has sparse files of an old format"));
                    }
                }
            }
        }
        match (self.sparse, version) {
            (None, (None, None)) | (Some(_), (Some(1), Some(0))) => Ok(()),
            _ => Err(Error::Format("it has sparse files of an old format")),
        }
    }
}

/// Appends `LENGTH NAME=VALUE\n`, where LENGTH counts its own digits.
fn record(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let rest = 3 + name.len() + value.len();
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} ").as_bytes());
    out.extend_from_slice(&[name, b"=", value, b"\n"].concat());
}

fn decimal((seconds, nanoseconds): (i64, u32)) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        // Half a second before -1 is -1.5, and 500 ms after -2.
        (..0, _) => {
            let whole = (seconds + 1).unsigned_abs();
            format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds)
        }
        _ => format!("{seconds}.{nanoseconds:09}"),
    }
}

fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok().filter(|seconds| *seconds >= 0)?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

fn digits(text: &[u8]) -> Result<u64, Error> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    text.and_then(|text| text.parse().ok()).ok_or(Error::Format("it has a number that is none"))
}

/// Octal digits, or with the top bit set a number of as many bytes as there are.
fn number(field: &[u8]) -> Result<u64, Error> {
    const BAD: Error = Error::Format("it has a number that is none");
    match field {
        [0x80, rest @ ..] => {
            rest.iter().try_fold(0u64, |sum, byte| Ok(sum.checked_mul(256).ok_or(BAD)? | u64::from(*byte)))
        }
        _ => {
            let is_end = |byte: &u8| *byte == 0 || *byte == b' ';
            let digits = field.iter().skip_while(|byte| **byte == b' ').take_while(|byte| !is_end(byte));
            digits.clone().try_fold(0u64, |sum, byte| match byte {
                b'0'..=b'7' => Ok(sum.checked_mul(8).ok_or(BAD)? | u64::from(byte - b'0')),
                _ => Err(BAD),
            })
        }
    }
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn check_sum(block: &[u8; BLOCK]) -> Result<(), Error> {
    let told = number(&block[148..156])?;
    let sum = block
        .iter()
        .enumerate()
        .map(|(at, byte)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte }));
    if sum.sum::<u64>() == told { Ok(()) } else { Err(Error::Format("a header's sum is wrong")) }
}

/// The next block; none at the stream's end.
fn read_block(from: &mut impl Read) -> Result<Option<[u8; BLOCK]>, Error> {
    let mut block = [0; BLOCK];
    let mut filled = 0;
    while filled < BLOCK {
        match from.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(Error::Cut),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Stream("read", error)),
        }
    }
    Ok(Some(block))
}

fn read_extra(from: &mut impl Read, size: u64) -> Result<Vec<u8>, Error> {
    if size > MAX_EXTRA {
        return Err(Error::Format("it has a header that is too long"));
    }
    let mut bytes = vec![0; size as usize + padding(size)];
    from.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Cut,
        _ => Error::Stream("read", error),
    })?;
    bytes.truncate(size as usize);
    Ok(bytes)
}
