//! The guest's end of a connection: a socket of smoltcp's, and an interface of smoltcp's to itself, so that a packet costs the same
//! however many flows there are.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::ethernet::Frames;
use super::recovery::Recovery;
use super::room::Room;
use super::{Context, Key, offload};

/// Bytes that wait for the other side, each way, at most: as many as a guest can send before a host that is busy gives its
/// acknowledgements, and the vCPU, their turn.
pub const BUFFER: usize = 1 << 20;
/// The same for a connection that is one of many, so that those of all are bounded.
pub const BUFFER_OF_MANY: usize = 128 << 10;

/// The guest's end.
pub struct GuestEnd {
    guest: IpAddr,
    /// Bytes of data that its segments have.
    mss: Option<usize>,
    recovery: Recovery,
    /// The socket's time: it stands still while the connection is open, but for what `recovery` says.
    time: smoltcp::time::Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    /// The socket's buffers: behind `sockets`, for fields are dropped in order.
    _room: Room,
}

/// What smoltcp takes for a network device: one packet in, frames out.
struct Packets<'a> {
    input: Option<&'a [u8]>,
    output: Output<'a>,
}

struct Input<'a>(&'a [u8]);

struct Output<'a> {
    frames: &'a mut Frames,
    guest: IpAddr,
    mss: Option<usize>,
    recovery: &'a mut Recovery,
    now: Instant,
}

impl RxToken for Input<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for &mut Output<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Output { frames, guest, mss, recovery, now } = self;
        frames.tcp(*guest, *mss, len, |bytes| {
            let result = f(bytes);
            recovery.sends(bytes, *now);
            result
        })
    }
}

impl<'p> Device for Packets<'p> {
    type RxToken<'a>
        = Input<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = &'a mut Output<'p>
    where
        Self: 'a;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Input<'_>, &mut Output<'p>)> {
        Some((Input(self.input.take()?), &mut self.output))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<&mut Output<'p>> {
        self.output.frames.has_room().then_some(&mut self.output)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        // What is longer than the guest takes is cut behind.
        capabilities.max_transmission_unit = offload::LONGEST;
        // Nothing on this wire changes a bit, and the guest may have left sums to us. `Frames` has its own way with TCP's.
        capabilities.checksum = unchecked();
        capabilities
    }
}

/// What this side makes of checksums.
pub fn unchecked() -> ChecksumCapabilities {
    let mut sums = ChecksumCapabilities::ignored();
    sums.ipv4 = Checksum::Tx;
    sums
}

impl GuestEnd {
    /// An end of `key`, with `buffer` bytes each way.
    ///
    /// # Errors
    /// The host is out of memory.
    pub fn new(context: &mut Context, key: &Key, buffer: usize) -> io::Result<Self> {
        let (guest, remote) = (key.guest.ip(), key.remote.ip());
        let mut seed = [0; 8];
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::NONBLOCK);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut recovery = Recovery::default();
        let now = context.now;
        let output = Output { frames: &mut context.frames, guest, mss: None, recovery: &mut recovery, now };
        let mut packets = Packets { input: None, output };
        let time = context.clock.smoltcp(now);
        let mut interface = Interface::new(config, &mut packets, time);
        // It is the remote end, and everybody else is behind the guest. There is room for both.
        let all = if remote.is_ipv4() { 32 } else { 128 };
        interface.update_ip_addrs(|own| _ = own.push(IpCidr::new(remote.into(), all)));
        let _ = match remote {
            IpAddr::V4(remote) => interface.routes_mut().add_default_ipv4_route(remote),
            IpAddr::V6(remote) => interface.routes_mut().add_default_ipv6_route(remote),
        };
        let mut room = Room::new(2 * buffer)?;
        // SAFETY: once, and the socket is dropped before the room is: it stays in `sockets`, which is.
        let (from, to) = unsafe { room.bytes() }.split_at_mut(buffer);
        let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(from), tcp::SocketBuffer::new(to));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let socket = sockets.add(socket);
        Ok(Self { guest, mss: None, recovery, time, interface, sockets, socket, _room: room })
    }

    pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.socket)
    }

    /// Waits for the guest to connect to `key`'s other end, as it has begun to.
    pub fn listen(&mut self, key: &Key) -> bool {
        self.socket().listen(key.remote).is_ok()
    }

    /// Connects to the guest's end of `key`; ends if it does not answer for as long as `patience`.
    pub fn connect(&mut self, key: &Key, patience: Duration) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.socket);
        socket.set_timeout(Some(patience.into()));
        socket.connect(self.interface.context(), key.guest, key.remote).is_ok()
    }

    /// Takes a packet of the guest's. What it is answered by goes with what is sent next: more may come in the same batch.
    pub fn take(&mut self, context: &mut Context, input: &[u8]) {
        let raised = offload::raise_mss(input, context.frames.mtu);
        let input = match &raised {
            Some((mss, raised)) => {
                self.mss = Some(*mss);
                raised
            }
            None => input,
        };
        if self.recovery.hears(input, context.now) {
            return;
        }
        self.run_clock(context);
        let (time, mut packets, interface, sockets) = self.parts(context);
        packets.input = Some(input);
        interface.poll_ingress_single(time, &mut packets, sockets);
    }

    /// Sends what is to be sent, and then what is to be sent again.
    pub fn poll(&mut self, context: &mut Context) {
        self.run_clock(context);
        self.send(context);
        let is_late = self.recovery.deadline().is_some_and(|at| at <= context.now);
        if is_late && self.is_open() && context.frames.has_room() {
            if !self.recovery.resends(context.now, context.frames.taken()) {
                return;
            }
            let due = self.interface.poll_at(self.time, &self.sockets);
            self.time = due.map_or(self.time, |due| due.max(self.time));
            self.send(context);
        }
    }

    fn send(&mut self, context: &mut Context) {
        let (time, mut packets, interface, sockets) = self.parts(context);
        let before = packets.output.frames.queued();
        // Each call sends one packet of a socket at most.
        while packets.output.frames.has_room()
            && interface.poll_egress(time, &mut packets, sockets) != PollResult::None
        {}
        let queued = packets.output.frames.queued();
        if queued > before {
            self.recovery.queued(queued);
        }
    }

    /// What a call of smoltcp's takes.
    fn parts<'a>(
        &'a mut self,
        context: &'a mut Context,
    ) -> (smoltcp::time::Instant, Packets<'a>, &'a mut Interface, &'a mut SocketSet<'static>) {
        let Self { guest, mss, recovery, time, interface, sockets, .. } = self;
        let (guest, mss, now) = (*guest, *mss, context.now);
        let output = Output { frames: &mut context.frames, guest, mss, recovery, now };
        (*time, Packets { input: None, output }, interface, sockets)
    }

    /// Both sides have said that they are there.
    fn is_open(&mut self) -> bool {
        use tcp::State::{Listen, SynReceived, SynSent};
        !matches!(self.socket().state(), Listen | SynSent | SynReceived)
    }

    fn run_clock(&mut self, context: &Context) {
        if !self.is_open() {
            self.time = context.clock.smoltcp(context.now);
        }
    }

    /// When there is something to do although nobody has said a word.
    pub fn deadline(&mut self, context: &Context) -> Option<Instant> {
        match self.interface.poll_at(self.time, &self.sockets) {
            Some(at) if at <= self.time => Some(context.now),
            at if !self.is_open() => at.map(|at| context.clock.std(at)),
            _ => self.recovery.deadline(),
        }
    }
}
