//! What the rig and the first process of its machine say to each other: frames over
//! virtio-serial ports. Used by the rig on the host and by `main.rs` here, which is linked
//! statically, so this file depends on the standard library only.
//!
//! A frame is one kind byte, the payload's length as a little-endian `u32`, and the payload.
//! One stream carries everything towards the host, so the exit code cannot overtake output.

use std::io::{self, Read, Write};

/// Name of the port that carries every frame but standard input.
pub const CONTROL_PORT: &str = "rig.control";
/// Name of the port that carries standard input to the command.
pub const STDIN_PORT: &str = "rig.stdin";
/// virtiofs tag of the host's root.
pub const ROOT_TAG: &str = "rig.root";
/// Folder of the initramfs that holds kernel modules, named so that they sort in load order.
pub const MODULE_FOLDER: &str = "/modules";
/// File of the initramfs that holds an encoded [`Request`], when it is known before the start.
pub const REQUEST_FILE: &str = "/request";
/// Folder of the initramfs that becomes the root when the request says so.
pub const ROOT_FOLDER: &str = "/host";
/// Word on the kernel command line that loads `kvm_amd` without nested paging.
pub const NO_NPT: &str = "rig.no_npt";

/// Exit code for a fault of the rig itself, not of the command.
pub const EXIT_RIG: i32 = 125;
/// Exit code for a command that was found but could not be executed.
pub const EXIT_CANNOT_EXECUTE: i32 = 126;
/// Exit code for a command that was not found.
pub const EXIT_NOT_FOUND: i32 = 127;

/// Largest payload either side accepts, in bytes: more means a broken stream.
const MAX_PAYLOAD: usize = 16 << 20;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the host: KVM is loaded, a request may come.
    Ready,
    /// To the host: the command runs from here on.
    Started,
    /// To the host: bytes of the command's standard output, or of its terminal.
    Stdout(Vec<u8>),
    /// To the host: bytes of the command's standard error.
    Stderr(Vec<u8>),
    /// To the host: a line about the machine itself, for the user.
    Note(String),
    /// To the host: nothing follows; how the command ended.
    Exit(i32),
    /// To the machine: what to run.
    Request(Box<Request>),
    /// To the machine: the terminal's rows and columns.
    Resize(u16, u16),
    /// To the machine: bytes of standard input; none mean its end.
    Stdin(Vec<u8>),
}

impl Frame {
    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Frame::Ready => (1, vec![]),
            Frame::Started => (2, vec![]),
            Frame::Stdout(bytes) => (3, bytes.clone()),
            Frame::Stderr(bytes) => (4, bytes.clone()),
            Frame::Note(text) => (5, text.clone().into_bytes()),
            Frame::Exit(code) => (6, code.to_le_bytes().to_vec()),
            Frame::Request(request) => (7, request.encode()),
            Frame::Resize(rows, columns) => (8, [rows.to_le_bytes(), columns.to_le_bytes()].concat()),
            Frame::Stdin(bytes) => (9, bytes.clone()),
        }
    }

    /// Writes the frame in one call, so that frames of several threads do not mix.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = self.parts();
        let length = u32::try_from(payload.len()).map_err(|_| broken("payload too long"))?;
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(kind);
        bytes.extend(length.to_le_bytes());
        bytes.extend(payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads the next frame; `UnexpectedEof` when the other side is gone.
    pub fn read(from: &mut impl Read) -> io::Result<Frame> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(broken("payload too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(match head[0] {
            1 => Frame::Ready,
            2 => Frame::Started,
            3 => Frame::Stdout(payload),
            4 => Frame::Stderr(payload),
            5 => Frame::Note(String::from_utf8_lossy(&payload).into_owned()),
            6 => Frame::Exit(i32::from_le_bytes(payload.try_into().map_err(|_| broken("exit code"))?)),
            7 => Frame::Request(Box::new(Request::decode(&payload)?)),
            8 => match payload[..] {
                [a, b, c, d] => Frame::Resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])),
                _ => return Err(broken("terminal size")),
            },
            9 => Frame::Stdin(payload),
            _ => return Err(broken("unknown kind")),
        })
    }
}

/// What the machine shall run, and in which surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The command and its arguments; never empty.
    pub args: Vec<Vec<u8>>,
    /// The whole environment, as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// The machine's name.
    pub hostname: Vec<u8>,
    /// Bytes for the kernel's random number generator.
    pub seed: Vec<u8>,
    /// Resource limits: number, soft and hard value, as setrlimit(2) takes them.
    pub limits: Vec<(u32, u64, u64)>,
    /// The file mode creation mask.
    pub umask: u32,
    /// Whether the root is in the initramfs instead of on the host.
    pub own_root: bool,
    /// Wall-clock time in nanoseconds since 1970; 0 leaves the machine's clock alone.
    pub time: u64,
    /// Rows and columns of the terminal that the command gets; none: pipes.
    pub terminal: Option<(u16, u16)>,
    /// Whether standard input comes over [`STDIN_PORT`]; otherwise it is `/dev/null`.
    pub stdin: bool,
}

impl Request {
    /// The request as bytes: numbers as little-endian `u64`, strings and lists after their length.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let number = |out: &mut Vec<u8>, n: u64| out.extend(n.to_le_bytes());
        let string = |out: &mut Vec<u8>, s: &[u8]| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s);
        };
        for list in [&self.args, &self.env] {
            number(&mut out, list.len() as u64);
            list.iter().for_each(|s| string(&mut out, s));
        }
        for s in [&self.cwd, &self.hostname, &self.seed] {
            string(&mut out, s);
        }
        number(&mut out, self.limits.len() as u64);
        for &(which, soft, hard) in &self.limits {
            for n in [u64::from(which), soft, hard] {
                number(&mut out, n);
            }
        }
        let (rows, columns) = self.terminal.unwrap_or_default();
        for n in [
            self.umask.into(),
            self.own_root.into(),
            self.time,
            self.terminal.is_some().into(),
            rows.into(),
            columns.into(),
            self.stdin.into(),
        ] {
            number(&mut out, n);
        }
        out
    }

    /// The request in `bytes`; an error when they are not what [`Request::encode`] made.
    pub fn decode(bytes: &[u8]) -> io::Result<Request> {
        let mut from = Fields(bytes);
        let request = Request {
            args: from.list(Fields::string)?,
            env: from.list(Fields::string)?,
            cwd: from.string()?,
            hostname: from.string()?,
            seed: from.string()?,
            limits: from.list(|f| Ok((f.number()? as u32, f.number()?, f.number()?)))?,
            umask: from.number()? as u32,
            own_root: from.number()? != 0,
            time: from.number()?,
            terminal: match [from.number()?, from.number()?, from.number()?] {
                [0, ..] => None,
                [_, rows, columns] => Some((rows as u16, columns as u16)),
            },
            stdin: from.number()? != 0,
        };
        match (request.args.is_empty(), from.0.is_empty()) {
            (false, true) => Ok(request),
            _ => Err(broken("request")),
        }
    }
}

/// The rest of an encoded request.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn number(&mut self) -> io::Result<u64> {
        let (number, rest) = self.0.split_first_chunk().ok_or(broken("request"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*number))
    }

    fn string(&mut self) -> io::Result<Vec<u8>> {
        let length = self.number()? as usize;
        let (string, rest) = self.0.split_at_checked(length).ok_or(broken("request"))?;
        self.0 = rest;
        Ok(string.to_vec())
    }

    fn list<T>(&mut self, item: impl Fn(&mut Self) -> io::Result<T>) -> io::Result<Vec<T>> {
        (0..self.number()?).map(|_| item(self)).collect()
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("broken frame between rig and machine: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_stream_in_order() {
        let request = Request {
            args: vec![b"ls".to_vec(), b"\xff\n".to_vec(), vec![]],
            env: vec![b"A=b".to_vec()],
            cwd: b"/tmp".to_vec(),
            seed: vec![7; 32],
            limits: vec![(7, 1024, u64::MAX)],
            umask: 0o27,
            terminal: Some((50, 132)),
            stdin: true,
            ..Request::default()
        };
        let frames = [
            Frame::Ready,
            Frame::Started,
            Frame::Stdout(vec![0; 100_000]),
            Frame::Stderr(b"x".to_vec()),
            Frame::Note("note".into()),
            Frame::Exit(-3),
            Frame::Request(Box::new(request)),
            Frame::Resize(24, 80),
            Frame::Stdin(vec![]),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut from = &bytes[..];
        for frame in &frames {
            assert_eq!(&Frame::read(&mut from).unwrap(), frame);
        }
        assert!(from.is_empty());
    }

    #[test]
    fn cut_and_foreign_bytes_are_errors() {
        assert!(Frame::read(&mut &b"\x03\x05\0\0\0abc"[..]).is_err());
        assert!(Frame::read(&mut &b"\xc8\0\0\0\0"[..]).is_err());
        assert!(Frame::read(&mut &b"\x03\xff\xff\xff\xff"[..]).is_err());
        assert!(Request::decode(&Request::default().encode()).is_err());
        let good = Request { args: vec![b"true".to_vec()], ..Request::default() };
        let bytes = good.encode();
        assert_eq!(Request::decode(&bytes).unwrap(), good);
        for cut in 0..bytes.len() {
            assert!(Request::decode(&bytes[..cut]).is_err());
        }
    }
}
