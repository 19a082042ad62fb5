//! Messages and their bytes. Does no I/O.
//!
//! A session is one connection: a hello each way, one request, then streams both ways, and at last an exit. Every stream has a
//! window of its own: a sender sends what it was given credit for, and no more, so that a stream that nobody reads fills up alone,
//! and neither the other streams nor what is no stream (signals, sizes, the exit) wait for it.

use std::net::Ipv4Addr;

use rustix::buffer::{SpareCapacity, spare_capacity};

use crate::wire::{Reader, put_bytes, put_list};

/// The version of the protocol. Another one is refused.
pub const VERSION: u16 = 1;
/// The vsock port where the agent listens: below 1024, so that no ordinary user of the guest can be there first.
pub const PORT: u32 = 1023;
/// The bytes that a sender may have on the way in each stream.
pub const WINDOW: u32 = 256 << 10;
/// The most that a message has of a stream.
pub const MAX_DATA: usize = 64 << 10;
/// The longest payload of a message that is no request.
const MAX_PAYLOAD: usize = MAX_DATA + 1;
/// The longest request: arguments and environment.
pub const MAX_REQUEST: usize = 1 << 20;
/// Bytes that tell one copy of a guest from all others.
pub const GENERATION: usize = 16;
/// A kind, and a length of three bytes.
const HEADER: usize = 4;
/// What a hello begins with.
const MAGIC: &[u8; 8] = b"vmmagent";

/// One of a session's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// To the command.
    Stdin,
    /// From it.
    Stdout,
    /// From it, too; nothing where it has a terminal.
    Stderr,
}

impl Stream {
    fn of(number: u8) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr].get(usize::from(number)).copied()
    }
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exec {
    /// The program and its arguments; none: the user's login shell.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE`, beside what every command gets, and before it.
    pub env: Vec<Vec<u8>>,
    /// Where it runs; empty: `/`, and for a login shell the user's home.
    pub cwd: Vec<u8>,
    /// `USER[:GROUP]`, names or numbers; empty: as whom the agent runs.
    pub user: Vec<u8>,
    /// Its terminal, if it shall have one; else it gets pipes.
    pub tty: Option<Size>,
    /// Whether there is a standard input; else it reads nothing.
    pub stdin: bool,
}

/// What a session is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Run a command.
    Exec(Exec),
    /// Send what is at `path` as a tar stream on stdout, by the name `name`.
    Pack {
        /// In the guest.
        path: Vec<u8>,
        /// What the archive calls it.
        name: Vec<u8>,
    },
    /// Unpack the tar stream of stdin into the folder `path`.
    Unpack {
        /// In the guest.
        path: Vec<u8>,
        /// With the owners of the archive; else they are those of the agent.
        owners: bool,
        /// Where `path` is no folder: it is what the archive's one file or folder is to be called.
        rename: bool,
    },
    /// Connect to `address` (`IP:PORT`) from within the guest: stdin goes there, stdout comes from there.
    Connect {
        /// An address and a port, numbers both.
        address: Vec<u8>,
    },
    /// Tell about the guest.
    Facts,
    /// Set the guest's clock: nanoseconds since 1970.
    SetTime(u64),
    /// Mix bytes into the guest's random pool, and have it use them at once.
    Reseed(Vec<u8>),
    /// Set the guest's host name.
    SetHostname(Vec<u8>),
    /// Set up a network interface.
    SetNetwork(Network),
    /// Have the guest power off, as if somebody had pressed its button. Answered before it does.
    ShutDown,
    /// Make a guest that is a copy another one.
    Renew(Renewal),
    /// The same, and run a command once all of that is done.
    RenewAndExec(Renewal, Exec),
}

/// What a guest is told that is a copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Renewal {
    /// Tells this copy from all others.
    pub generation: [u8; GENERATION],
    /// Nanoseconds since 1970. A clock that is ahead by less than a minute is left alone: that much the message may have taken.
    pub time: u64,
    /// As for [`Request::Reseed`].
    pub seed: Vec<u8>,
    /// The host name that it is to have; empty: the one that it has.
    pub hostname: Vec<u8>,
    /// It is to have another machine ID (machine-id(5)).
    pub machine_id: bool,
}

/// The set-up of one network interface, IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The interface's name.
    pub device: Vec<u8>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Leading bits of it that are its network's: 32 at most.
    pub bits: u8,
    /// The way to all others.
    pub gateway: Option<Ipv4Addr>,
    /// Who resolves names.
    pub dns: Option<Ipv4Addr>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(u8),
    /// By a signal.
    Signal(u8),
}

impl Exit {
    /// As a shell has it: 128 and the signal for those that a signal ended.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128u8.saturating_add(signal),
        }
    }
}

/// Why a request came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There is no such program.
    NotFound,
    /// It cannot be run: no permission, another machine's, no such folder or user.
    CannotRun,
    /// The agent does as much already as it may.
    Busy,
    /// What was sent makes no sense.
    Protocol,
    /// The guest's kernel refused it.
    Refused,
}

impl Reason {
    const ALL: [Self; 5] = [Self::NotFound, Self::CannotRun, Self::Busy, Self::Protocol, Self::Refused];
}

/// What an agent tells about itself and its guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The kernel's release, as `uname -r` has it.
    pub kernel: Vec<u8>,
    /// The host name.
    pub hostname: Vec<u8>,
    /// Seconds since the guest's kernel started.
    pub uptime: u64,
    /// Sessions that run now, this one included.
    pub sessions: u32,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// The first in each direction.
    Hello {
        /// Of the protocol.
        version: u16,
        /// The client's choice; the agent's hello repeats it.
        nonce: u64,
    },
    /// To the agent: the second, and last of its kind.
    Request(Request),
    /// To the agent: a signal for the command's process group.
    Signal(u8),
    /// To the agent: the size of the terminal has changed.
    Resize(Size),
    /// Bytes of a stream.
    Data(Stream, &'a [u8]),
    /// A stream's end.
    End(Stream),
    /// So many more bytes of a stream may be sent.
    Credit(Stream, u32),
    /// The receiver wants no more of a stream.
    Stop(Stream),
    /// From the agent: it is under way.
    Started,
    /// From the agent, the last message: how it ended. All of stdout and stderr came before.
    Exit(Exit),
    /// From the agent, the last message: why it did not start.
    Failed(Reason, &'a [u8]),
    /// From the agent: answers [`Request::Facts`].
    Facts(Facts),
}

/// What a peer may not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A kind of message that this version does not have.
    #[error("a message of kind {0}, which there is not")]
    Kind(u8),
    /// Longer than its kind may be.
    #[error("a message of {0} bytes, too long for its kind")]
    Length(usize),
    /// Fields that end too soon, or too late, or have values that there are not.
    #[error("a message of kind {0} whose fields are not as they must be")]
    Fields(u8),
    /// At its place there should have been another.
    #[error("a message that does not belong there")]
    Order,
    /// More of a stream than there was credit for.
    #[error("more of a stream than it was given room for")]
    Window,
}

const HELLO: u8 = 1;
const EXEC: u8 = 16;
const PACK: u8 = 17;
const UNPACK: u8 = 18;
const CONNECT: u8 = 19;
const FACTS: u8 = 20;
const SET_TIME: u8 = 21;
const RESEED: u8 = 22;
const SET_HOSTNAME: u8 = 23;
const SET_NETWORK: u8 = 24;
const SHUT_DOWN: u8 = 25;
const RENEW: u8 = 26;
const RENEW_AND_EXEC: u8 = 27;
const SIGNAL: u8 = 32;
const RESIZE: u8 = 33;
const DATA: u8 = 48;
const END: u8 = 49;
const CREDIT: u8 = 50;
const STOP: u8 = 51;
const STARTED: u8 = 64;
const EXIT: u8 = 65;
const FAILED: u8 = 66;
const TOLD: u8 = 67;

fn limit(kind: u8) -> usize {
    if (EXEC..SIGNAL).contains(&kind) { MAX_REQUEST } else { MAX_PAYLOAD }
}

/// Appends a message's header and what `fields` appends, with the length put right.
fn framed(out: &mut Vec<u8>, kind: u8, fields: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[kind, 0, 0, 0]);
    fields(out);
    let length = ((out.len() - start - HEADER) as u32).to_le_bytes();
    out[start + 1..start + HEADER].copy_from_slice(&length[..3]);
}

impl Message<'_> {
    /// Appends the message's bytes to `out`. A request longer than [`MAX_REQUEST`] is the caller's to refuse.
    pub fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello { version, nonce } => framed(out, HELLO, |out| {
                out.extend_from_slice(MAGIC);
                out.extend_from_slice(&version.to_le_bytes());
                out.extend_from_slice(&nonce.to_le_bytes());
            }),
            Self::Request(request) => request.put(out),
            Self::Signal(number) => framed(out, SIGNAL, |out| out.push(*number)),
            Self::Resize(size) => framed(out, RESIZE, |out| put_size(out, *size)),
            Self::Data(stream, bytes) => framed(out, DATA, |out| {
                out.push(*stream as u8);
                out.extend_from_slice(bytes);
            }),
            Self::End(stream) => framed(out, END, |out| out.push(*stream as u8)),
            Self::Credit(stream, count) => framed(out, CREDIT, |out| {
                out.push(*stream as u8);
                out.extend_from_slice(&count.to_le_bytes());
            }),
            Self::Stop(stream) => framed(out, STOP, |out| out.push(*stream as u8)),
            Self::Started => framed(out, STARTED, |_| ()),
            Self::Exit(Exit::Code(code)) => framed(out, EXIT, |out| out.extend_from_slice(&[0, *code])),
            Self::Exit(Exit::Signal(number)) => framed(out, EXIT, |out| out.extend_from_slice(&[1, *number])),
            Self::Failed(reason, text) => framed(out, FAILED, |out| {
                out.push(*reason as u8);
                out.extend_from_slice(&text[..text.len().min(MAX_DATA)]);
            }),
            Self::Facts(facts) => framed(out, TOLD, |out| {
                put_bytes(out, &facts.kernel);
                put_bytes(out, &facts.hostname);
                out.extend_from_slice(&facts.uptime.to_le_bytes());
                out.extend_from_slice(&facts.sessions.to_le_bytes());
            }),
        }
    }

    /// The message's bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.put(&mut out);
        out
    }
}

impl Request {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Exec(exec) => framed(out, EXEC, |out| exec.put(out)),
            Self::Pack { path, name } => framed(out, PACK, |out| {
                put_bytes(out, path);
                put_bytes(out, name);
            }),
            Self::Unpack { path, owners, rename } => framed(out, UNPACK, |out| {
                put_bytes(out, path);
                out.extend_from_slice(&[u8::from(*owners), u8::from(*rename)]);
            }),
            Self::Connect { address } => framed(out, CONNECT, |out| put_bytes(out, address)),
            Self::Facts => framed(out, FACTS, |_| ()),
            Self::SetTime(time) => framed(out, SET_TIME, |out| out.extend_from_slice(&time.to_le_bytes())),
            Self::Reseed(bytes) => framed(out, RESEED, |out| put_bytes(out, bytes)),
            Self::SetHostname(name) => framed(out, SET_HOSTNAME, |out| put_bytes(out, name)),
            Self::SetNetwork(network) => framed(out, SET_NETWORK, |out| {
                put_bytes(out, &network.device);
                out.extend_from_slice(&network.address.octets());
                out.push(network.bits);
                for address in [network.gateway, network.dns] {
                    out.extend_from_slice(&address.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
                }
            }),
            Self::ShutDown => framed(out, SHUT_DOWN, |_| ()),
            Self::Renew(renewal) => framed(out, RENEW, |out| renewal.put(out)),
            Self::RenewAndExec(renewal, exec) => framed(out, RENEW_AND_EXEC, |out| {
                renewal.put(out);
                exec.put(out);
            }),
        }
    }

    fn parse(kind: u8, r: &mut Reader<'_>) -> Option<Self> {
        Some(match kind {
            EXEC => Self::Exec(Exec::parse(r)?),
            PACK => Self::Pack { path: r.text()?, name: r.text()? },
            UNPACK => Self::Unpack { path: r.text()?, owners: boolean(r)?, rename: boolean(r)? },
            CONNECT => Self::Connect { address: r.text()? },
            FACTS => Self::Facts,
            SET_TIME => Self::SetTime(r.u64()?),
            RESEED => Self::Reseed(r.bytes()?.to_vec()),
            SET_HOSTNAME => Self::SetHostname(r.text()?),
            SET_NETWORK => Self::SetNetwork(Network {
                device: r.text()?,
                address: address(r)?,
                bits: r.u8().filter(|bits| *bits <= 32)?,
                gateway: Some(address(r)?).filter(|address| !address.is_unspecified()),
                dns: Some(address(r)?).filter(|address| !address.is_unspecified()),
            }),
            SHUT_DOWN => Self::ShutDown,
            RENEW => Self::Renew(Renewal::parse(r)?),
            RENEW_AND_EXEC => Self::RenewAndExec(Renewal::parse(r)?, Exec::parse(r)?),
            _ => return None,
        })
    }
}

impl Exec {
    fn put(&self, out: &mut Vec<u8>) {
        put_list(out, &self.argv);
        put_list(out, &self.env);
        put_bytes(out, &self.cwd);
        put_bytes(out, &self.user);
        out.push(u8::from(self.stdin));
        out.push(u8::from(self.tty.is_some()));
        if let Some(size) = self.tty {
            put_size(out, size);
        }
    }

    fn parse(r: &mut Reader<'_>) -> Option<Self> {
        let (argv, env, cwd, user) = (r.list()?, r.list()?, r.text()?, r.text()?);
        let stdin = boolean(r)?;
        let tty = if boolean(r)? { Some(size(r)?) } else { None };
        Some(Self { argv, env, cwd, user, tty, stdin })
    }
}

impl Renewal {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.generation);
        out.extend_from_slice(&self.time.to_le_bytes());
        put_bytes(out, &self.seed);
        put_bytes(out, &self.hostname);
        out.push(u8::from(self.machine_id));
    }

    fn parse(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            generation: r.array()?,
            time: r.u64()?,
            seed: r.bytes()?.to_vec(),
            hostname: r.text()?,
            machine_id: boolean(r)?,
        })
    }
}

fn put_size(out: &mut Vec<u8>, size: Size) {
    out.extend_from_slice(&size.rows.to_le_bytes());
    out.extend_from_slice(&size.columns.to_le_bytes());
}

fn size(r: &mut Reader<'_>) -> Option<Size> {
    Some(Size { rows: r.u16()?, columns: r.u16()? })
}

fn address(r: &mut Reader<'_>) -> Option<Ipv4Addr> {
    r.take(4)?.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets))
}

fn boolean(r: &mut Reader<'_>) -> Option<bool> {
    [false, true].get(usize::from(r.u8()?)).copied()
}

fn stream(r: &mut Reader<'_>) -> Option<Stream> {
    Stream::of(r.u8()?)
}

fn parse(kind: u8, payload: &[u8]) -> Option<Message<'_>> {
    let r = &mut Reader(payload);
    let message = match kind {
        HELLO => {
            r.take(MAGIC.len()).filter(|magic| magic == MAGIC)?;
            let (version, nonce) = (r.u16()?, r.u64()?);
            // A later version may say more here; that it is another must be readable all the same.
            if version != VERSION {
                r.0 = &[];
            }
            Message::Hello { version, nonce }
        }
        SIGNAL => Message::Signal(r.u8().filter(|number| (1..=64).contains(number))?),
        RESIZE => Message::Resize(size(r)?),
        DATA => {
            let stream = stream(r)?;
            Message::Data(stream, r.take(r.0.len())?)
        }
        END => Message::End(stream(r)?),
        CREDIT => Message::Credit(stream(r)?, r.u32()?),
        STOP => Message::Stop(stream(r)?),
        STARTED => Message::Started,
        EXIT => Message::Exit(match r.u8()? {
            0 => Exit::Code(r.u8()?),
            1 => Exit::Signal(r.u8()?),
            _ => return None,
        }),
        FAILED => {
            let reason = Reason::ALL.get(usize::from(r.u8()?)).copied()?;
            Message::Failed(reason, r.take(r.0.len())?)
        }
        TOLD => Message::Facts(Facts {
            kernel: r.text()?,
            hostname: r.text()?,
            uptime: r.u64()?,
            sessions: r.u32()?,
        }),
        _ => Message::Request(Request::parse(kind, r)?),
    };
    r.end(message)
}

/// The least that there is [`Decoder::room`] for.
const PIECE: usize = 32 << 10;

/// Finds the messages in bytes as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// What of it was given out.
    taken: usize,
}

impl Decoder {
    /// Adds what was received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.forget();
        self.bytes.extend_from_slice(bytes);
    }

    /// A buffer to receive into: what is read there counts as fed. The rest of it is not touched: in a guest that was restored, the
    /// first touch of a page takes as long as many system calls.
    pub fn room(&mut self) -> SpareCapacity<'_, u8> {
        self.forget();
        self.bytes.reserve(PIECE);
        spare_capacity(&mut self.bytes)
    }

    /// What was given out makes room.
    fn forget(&mut self) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
    }

    /// The length of the next message with its header, if it is whole.
    fn whole(&self) -> Result<Option<(u8, usize)>, Malformed> {
        let Some(rest) = self.bytes.get(self.taken..) else { return Ok(None) };
        let Some((&[kind, a, b, c], rest)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_le_bytes([a, b, c, 0]) as usize;
        let known =
            matches!(kind, HELLO | EXEC..=RENEW_AND_EXEC | SIGNAL | RESIZE | DATA..=STOP | STARTED..=TOLD);
        if !known {
            return Err(Malformed::Kind(kind));
        }
        if length > limit(kind) {
            return Err(Malformed::Length(length));
        }
        Ok((rest.len() >= length).then_some((kind, length)))
    }

    /// Whether [`Decoder::next`] has a message.
    ///
    /// # Errors
    /// As for [`Decoder::next`].
    pub fn has_message(&self) -> Result<bool, Malformed> {
        Ok(self.whole()?.is_some())
    }

    /// The next message, if it is whole. After an error nothing that comes makes sense.
    ///
    /// # Errors
    /// It is none that there is.
    #[allow(clippy::should_implement_trait, reason = "what it returns borrows from it")]
    pub fn next(&mut self) -> Result<Option<Message<'_>>, Malformed> {
        let Some((kind, length)) = self.whole()? else { return Ok(None) };
        let start = self.taken + HEADER;
        self.taken = start + length;
        let payload = self.bytes.get(start..self.taken).unwrap_or_default();
        parse(kind, payload).map(Some).ok_or(Malformed::Fields(kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(1u8.., 0..40)
    }

    fn list() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(bytes(), 0..5)
    }

    fn stream() -> impl Strategy<Value = Stream> {
        (0u8..3).prop_map(|number| Stream::of(number).unwrap())
    }

    fn size() -> impl Strategy<Value = Size> {
        (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| Size { rows, columns })
    }

    fn exec() -> impl Strategy<Value = Exec> {
        let fields = (list(), list(), bytes(), bytes(), proptest::option::of(size()), any::<bool>());
        fields.prop_map(|(argv, env, cwd, user, tty, stdin)| Exec { argv, env, cwd, user, tty, stdin })
    }

    fn renewal() -> impl Strategy<Value = Renewal> {
        let fields = (any::<[u8; GENERATION]>(), any::<u64>(), bytes(), bytes(), any::<bool>());
        fields.prop_map(|(generation, time, seed, hostname, machine_id)| Renewal {
            generation,
            time,
            seed,
            hostname,
            machine_id,
        })
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            exec().prop_map(Request::Exec),
            (bytes(), bytes()).prop_map(|(path, name)| Request::Pack { path, name }),
            (bytes(), any::<bool>(), any::<bool>()).prop_map(|(path, owners, rename)| Request::Unpack {
                path,
                owners,
                rename
            }),
            bytes().prop_map(|address| Request::Connect { address }),
            Just(Request::Facts),
            any::<u64>().prop_map(Request::SetTime),
            bytes().prop_map(Request::Reseed),
            bytes().prop_map(Request::SetHostname),
            (bytes(), any::<u32>(), 0u8..=32, any::<u32>(), any::<u32>()).prop_map(
                |(device, address, bits, gateway, dns)| {
                    let other = |number| Some(Ipv4Addr::from_bits(number)).filter(|a| !a.is_unspecified());
                    let (gateway, dns) = (other(gateway), other(dns));
                    let address = Ipv4Addr::from_bits(address);
                    Request::SetNetwork(Network { device, address, bits, gateway, dns })
                }
            ),
            Just(Request::ShutDown),
            renewal().prop_map(Request::Renew),
            (renewal(), exec()).prop_map(|(renewal, exec)| Request::RenewAndExec(renewal, exec)),
        ]
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<u64>().prop_map(|nonce| Message::Hello { version: VERSION, nonce }.to_vec()),
            request().prop_map(|request| Message::Request(request).to_vec()),
            (1u8..=64).prop_map(|number| Message::Signal(number).to_vec()),
            size().prop_map(|size| Message::Resize(size).to_vec()),
            (stream(), bytes()).prop_map(|(stream, bytes)| Message::Data(stream, &bytes).to_vec()),
            stream().prop_map(|stream| Message::End(stream).to_vec()),
            (stream(), any::<u32>()).prop_map(|(stream, count)| Message::Credit(stream, count).to_vec()),
            stream().prop_map(|stream| Message::Stop(stream).to_vec()),
            Just(Message::Started.to_vec()),
            any::<u8>().prop_map(|code| Message::Exit(Exit::Code(code)).to_vec()),
            any::<u8>().prop_map(|number| Message::Exit(Exit::Signal(number)).to_vec()),
            (0usize..5, bytes()).prop_map(|(at, text)| Message::Failed(Reason::ALL[at], &text).to_vec()),
            (bytes(), bytes(), any::<u64>(), any::<u32>()).prop_map(
                |(kernel, hostname, uptime, sessions)| {
                    Message::Facts(Facts { kernel, hostname, uptime, sessions }).to_vec()
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn what_is_put_is_read_in_whatever_pieces_it_comes(
            messages in proptest::collection::vec(message(), 0..8),
            piece in 1usize..50,
        ) {
            let all = messages.concat();
            let (mut decoder, mut again) = (Decoder::default(), Vec::new());
            for part in all.chunks(piece) {
                decoder.feed(part);
                while let Some(message) = decoder.next().unwrap() {
                    message.put(&mut again);
                }
            }
            prop_assert_eq!(again, all);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_say_more_than_was_there(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            kind in prop_oneof![Just(HELLO), EXEC..=RENEW_AND_EXEC, DATA..=STOP, STARTED..=TOLD],
        ) {
            for start in [vec![], vec![kind, bytes.len() as u8, (bytes.len() >> 8) as u8, 0]] {
                let mut decoder = Decoder::default();
                decoder.feed(&start);
                decoder.feed(&bytes);
                while let Ok(Some(message)) = decoder.next() {
                    prop_assert!(message.to_vec().len() <= start.len() + bytes.len());
                }
            }
        }
    }

    #[test]
    fn what_is_too_long_for_its_kind_is_refused_before_it_is_there() {
        let mut decoder = Decoder::default();
        decoder.feed(&[DATA, 2, 0, 1]);
        assert_eq!(decoder.next(), Err(Malformed::Length(MAX_DATA + 2)));
        let mut decoder = Decoder::default();
        decoder.feed(&[EXEC, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.next(), Err(Malformed::Length(0xff_ffff)));
    }

    #[test]
    fn a_hello_of_another_version_is_read_whatever_follows_in_it() {
        let mut bytes = Message::Hello { version: 7, nonce: 1 }.to_vec();
        bytes.extend_from_slice(b"more");
        bytes[1] += 4;
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        assert_eq!(decoder.next(), Ok(Some(Message::Hello { version: 7, nonce: 1 })));
    }

    #[test]
    fn a_text_for_the_kernel_has_no_nul() {
        let mut decoder = Decoder::default();
        decoder.feed(&Message::Request(Request::SetHostname(b"a\0b".to_vec())).to_vec());
        assert_eq!(decoder.next(), Err(Malformed::Fields(SET_HOSTNAME)));
    }
}
