//! The serial port: a 16550 (vm-superio's registers) at COM1 over a host end.
//!
//! Used by the guest as ttyS0, most of all for early output. A vCPU never waits for the host: what a stalled host
//! end does not take is kept, bounded, and the line status says "busy" until it is gone, so that the guest waits. A worker
//! brings input and takes the kept output away.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};

use crate::bus::{Busy, Device, Effect, lock};
use crate::chardev::{Endpoint, Interest};
use crate::event_loop::{self, EventLoop, Handler, Registration, Sources};
use crate::guest_warn;
use crate::state::{StateError, Stateful};
use crate::vm::Interrupt;

const IER: u8 = 1;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
/// Interrupt enable: received data; all that there are.
const IER_RECEIVE: u8 = 1;
const IER_ALL: u8 = 0xf;
/// Line status: room for output; all output gone.
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
/// A divisor latch is at offsets 0 and 1 while this bit of the line control register is set.
const LCR_DLAB: u8 = 0x80;
/// Loopback bit of the modem control register: the host end is cut off.
const MCR_LOOP: u8 = 0x10;

/// Output kept from which on the port says that it is busy.
const BUSY: usize = 64;
/// Output kept at most. A driver that writes to a busy port all the same (Linux's console does, after 10 ms a
/// byte) gets this far; what comes then is lost, and counted.
const KEPT: usize = 4096;
/// How long the end of the machine waits for the last of the output.
const LAST_WORDS: Duration = Duration::from_millis(200);

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.trigger();
        Ok(())
    }
}

/// Where the registers write to.
struct Output {
    endpoint: Endpoint,
    kept: VecDeque<u8>,
    lost: u64,
}

impl Output {
    fn flush(&mut self) {
        while !self.kept.is_empty() {
            let taken = self.endpoint.write(self.kept.as_slices().0);
            if taken == 0 {
                return;
            }
            self.kept.drain(..taken);
        }
    }
}

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = if self.kept.is_empty() { self.endpoint.write(data) } else { 0 };
        let rest = &data[taken..];
        let fits = rest.len().min(KEPT - self.kept.len());
        self.kept.extend(&rest[..fits]);
        if fits < rest.len() {
            self.lost += (rest.len() - fits) as u64;
            guest_warn!("serial port: {} bytes lost: the guest writes while the port is busy", self.lost);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Inner {
    uart: Uart<Line, NoEvents, Output>,
    interrupt: Arc<dyn Interrupt>,
}

impl Inner {
    fn output(&mut self) -> &mut Output {
        self.uart.writer_mut()
    }

    /// Says what the worker should wait for. After everything that may change it.
    fn wait(&mut self) {
        let loops = self.uart.state().modem_control & MCR_LOOP != 0;
        let input = !loops && self.uart.fifo_capacity() > 0;
        let output = self.output();
        output.endpoint.want(Interest { input, output: !output.kept.is_empty() });
    }

    /// Moves input and kept output along.
    fn turn(&mut self) {
        self.output().endpoint.service();
        let busy = self.busy();
        self.output().flush();
        if busy && !self.busy() {
            self.room_again();
        }
        let mut bytes = [0; 64];
        let room = self.uart.fifo_capacity().min(bytes.len());
        if room > 0 && self.uart.state().modem_control & MCR_LOOP == 0 {
            let len = self.output().endpoint.read(&mut bytes[..room]);
            if let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..len]) {
                // It was asked for its room just now.
                log::error!("serial port: input lost: {error}");
            }
        }
        self.wait();
    }

    fn busy(&mut self) -> bool {
        self.output().kept.len() >= BUSY
    }

    /// Raises the transmitter's interrupt, which the registers do on a write to the interrupt enable register
    /// (offset 1, unless the divisor latch is there).
    fn room_again(&mut self) {
        let state = self.uart.state();
        if state.line_control & LCR_DLAB == 0 {
            let _ = self.uart.write(IER, state.interrupt_enable);
        }
    }
}

/// The serial port. It works as soon as it is built, but for input, which starts with [`Device::resume`].
pub struct SerialPort {
    inner: Arc<Mutex<Inner>>,
    endpoint: Endpoint,
    /// Serves the input.
    events: EventLoop,
    served: Option<Registration>,
}

/// [`SerialPort`]'s saved state. Register names as in the crate that emulates them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
    kept: Vec<u8>,
}

impl SerialPort {
    /// A port at `endpoint` that raises `interrupt`; `events` serves its input.
    pub fn new(endpoint: Endpoint, interrupt: Arc<dyn Interrupt>, events: EventLoop) -> Self {
        let output = Output { endpoint: endpoint.clone(), kept: VecDeque::new(), lost: 0 };
        let uart = Uart::new(Line(interrupt.clone()), output);
        Self { inner: Arc::new(Mutex::new(Inner { uart, interrupt })), endpoint, events, served: None }
    }
}

struct Service {
    inner: Arc<Mutex<Inner>>,
    endpoint: Endpoint,
}

impl Handler for Service {
    fn start(&mut self, sources: &mut Sources<'_, '_>) -> io::Result<()> {
        sources.add(&self.endpoint, 0, event_loop::Interest::INPUT)
    }

    fn ready(&mut self, _: u32, _: &mut Sources<'_, '_>) {
        lock(&self.inner).turn();
    }
}

impl Device for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let ([byte], Ok(offset @ 0..8)) = (data, u8::try_from(offset)) else { return };
        let inner = &mut *lock(&self.inner);
        let full = inner.uart.fifo_capacity() == 0;
        *byte = inner.uart.read(offset);
        if offset == LSR {
            if inner.busy() {
                *byte &= !LSR_THRE;
            }
            if !inner.output().kept.is_empty() {
                *byte &= !LSR_TEMT;
            }
        }
        if full && inner.uart.fifo_capacity() > 0 {
            inner.wait();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let ([byte], Ok(offset @ 0..8)) = (data, u8::try_from(offset)) {
            let inner = &mut *lock(&self.inner);
            let idle = inner.output().kept.is_empty();
            // The only errors there are come from the output, which makes none, and from the interrupt's infallible
            // trigger.
            let _ = inner.uart.write(offset, *byte);
            // A driver writes the line control register before anything else, a program that only prints never.
            // Who wants input has opened the port; all interrupts at once are how a driver looks for the register.
            let wants_input = byte & IER_RECEIVE != 0 && byte & IER_ALL != IER_ALL;
            match offset {
                LCR => inner.output().endpoint.set_up_anew(),
                IER if wants_input && inner.uart.state().line_control & LCR_DLAB == 0 => {
                    inner.output().endpoint.opened();
                }
                _ => {}
            }
            if offset == MCR || idle != inner.output().kept.is_empty() {
                inner.wait();
            }
        }
        Effect::None
    }

    fn pause(&mut self, _deadline: Instant) -> Result<(), Busy> {
        self.served = None;
        lock(&self.inner).output().flush();
        Ok(())
    }

    fn resume(&mut self) {
        if self.served.is_some() {
            return;
        }
        lock(&self.inner).turn();
        let service = Service { inner: self.inner.clone(), endpoint: self.endpoint.clone() };
        match self.events.add(service) {
            Ok(served) => self.served = Some(served),
            Err(error) => log::error!("serial port: {error}: there is no input"),
        }
    }
}

impl Drop for SerialPort {
    /// The guest may have written its last words a moment ago: a reader that is only slow still gets them.
    fn drop(&mut self) {
        self.served = None;
        let inner = &mut *lock(&self.inner);
        let end = Instant::now() + LAST_WORDS;
        loop {
            inner.output().flush();
            let left = end.saturating_duration_since(Instant::now());
            if inner.output().kept.is_empty() || left.is_zero() {
                break;
            }
            inner.output().endpoint.want(Interest { input: false, output: true });
            let mut fds = [PollFd::new(&self.endpoint, PollFlags::IN)];
            let _ = poll(&mut fds, Timespec::try_from(left).ok().as_ref());
            inner.output().endpoint.service();
        }
        let left = inner.output().kept.len();
        if left > 0 {
            log::warn!("serial port: the last {left} bytes of output are lost: nobody reads");
        }
    }
}

/// Between [`Device::pause`] and [`Device::resume`].
impl Stateful for SerialPort {
    type State = State;

    fn save(&self) -> State {
        let inner = &mut *lock(&self.inner);
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = inner.uart.state();
        State {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
            kept: inner.output().kept.iter().copied().collect(),
        }
    }

    fn restore(&mut self, state: State) -> Result<(), StateError> {
        if state.kept.len() > KEPT {
            return Err(StateError::Invalid(format!("serial port: {} bytes kept", state.kept.len())));
        }
        let inner = &mut *lock(&self.inner);
        let registers = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        let output = Output { endpoint: self.endpoint.clone(), kept: state.kept.into(), lost: 0 };
        let line = Line(inner.interrupt.clone());
        inner.uart = Uart::from_state(&registers, line, NoEvents, output)
            .map_err(|error| StateError::Invalid(format!("serial port: {error}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::vm::fake::FakeInterrupt;

    fn port() -> (SerialPort, UnixStream, Arc<FakeInterrupt>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let interrupt = Arc::<FakeInterrupt>::default();
        let port =
            SerialPort::new(Endpoint::from_stream(ours).unwrap(), interrupt.clone(), event_loop::running());
        (port, theirs, interrupt)
    }

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut byte = [0xff];
        port.read(offset, &mut byte);
        byte[0]
    }

    fn until(mut done: impl FnMut() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < end, "nothing happened for 10 s");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn output_goes_out_at_once_and_odd_accesses_do_nothing() {
        let (mut port, mut theirs, _) = port();
        for byte in b"hello" {
            assert_eq!(port.write(0, &[*byte]), Effect::None);
        }
        let mut got = [0; 5];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        port.write(0, b"xy");
        let mut wide = [0xff; 2];
        port.read(5, &mut wide);
        assert_eq!((wide, read(&mut port, 8)), ([0xff; 2], 0xff));
    }

    #[test]
    fn who_speaks_or_wants_input_has_opened_the_port_and_who_looks_for_it_has_not() {
        let (mut port, _theirs, _) = port();
        let openers = |port: &SerialPort| port.endpoint.openers();
        for (offset, byte, count) in [
            // A driver that finds the port and has no use for it.
            (LCR, 3, 0),
            (IER, 0, 0),
            (IER, 0xf, 0),
            (IER, 0, 0),
            // A boot program, which only speaks.
            (0, b'a', 1),
            (0, b'b', 1),
            // A kernel, quiet; and one that is not.
            (LCR, 3 | LCR_DLAB, 1),
            (IER, 1, 1),
            (LCR, 3, 1),
            (IER, 5, 2),
            (0, b'c', 2),
            (LCR, 3, 2),
            (0, b'd', 3),
        ] {
            port.write(offset.into(), &[byte]);
            assert_eq!(openers(&port), count, "{offset} {byte:#x}");
        }
    }

    #[test]
    fn input_comes_in_as_the_guest_reads_it_whatever_its_length() {
        let (mut port, mut theirs, interrupt) = port();
        port.resume();
        port.write(IER.into(), &[1]);
        let sent: Vec<u8> = (0..10_000u32).map(|i| (i % 253) as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || theirs.write_all(&copy).map(|()| theirs));
        let mut got = Vec::new();
        until(|| {
            while read(&mut port, LSR.into()) & 1 != 0 {
                got.push(read(&mut port, 0));
            }
            got.len() == sent.len()
        });
        assert!(got == sent && interrupt.count() > 0);
        drop(writer.join().unwrap());
    }

    #[test]
    fn a_stalled_host_end_makes_the_port_busy_and_its_return_interrupts() {
        let (mut port, mut theirs, interrupt) = port();
        port.resume();
        let mut sent = 0u32;
        while read(&mut port, LSR.into()) & LSR_THRE != 0 {
            port.write(0, &[sent as u8]);
            sent += 1;
            assert!(sent < 10_000_000, "never busy");
        }
        assert!(lock(&port.inner).output().kept.len() >= BUSY);
        // The driver waits for room by interrupt.
        port.write(IER.into(), &[2]);
        read(&mut port, 2);
        let before = interrupt.count();
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; sent as usize];
            theirs.read_exact(&mut got).map(|()| (got, theirs))
        });
        until(|| interrupt.count() > before);
        until(|| read(&mut port, LSR.into()) & (LSR_THRE | LSR_TEMT) == LSR_THRE | LSR_TEMT);
        let (got, _theirs) = reader.join().unwrap().unwrap();
        assert!((0..sent).zip(&got).all(|(i, byte)| i as u8 == *byte));
    }

    #[test]
    fn a_guest_that_does_not_care_that_the_port_is_busy_costs_bounded_memory() {
        let (mut port, theirs, _) = port();
        for _ in 0..2_000_000 {
            port.write(0, b"x");
        }
        let mut inner = lock(&port.inner);
        let output = inner.output();
        assert!(output.kept.len() == KEPT && output.kept.capacity() < 2 * KEPT && output.lost > 0);
        drop(inner);
        drop(theirs);
    }

    #[test]
    fn the_state_goes_over_with_input_and_output_that_wait() {
        let (mut port, mut theirs, _) = port();
        theirs.write_all(b"typed").unwrap();
        port.write(7, &[0x5a]);
        port.resume();
        until(|| read(&mut port, LSR.into()) & 1 != 0);
        while read(&mut port, LSR.into()) & LSR_THRE != 0 {
            port.write(0, b"o");
        }
        port.pause(Instant::now()).unwrap();
        let state = port.save();
        assert!(state.kept.len() >= BUSY && state.in_buffer == b"typed");
        let (mut fresh, mut theirs, _) = self::port();
        fresh.restore(state.clone()).unwrap();
        assert_eq!(fresh.save(), state);
        fresh.resume();
        let mut got = vec![0; state.kept.len()];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(got, state.kept);
        assert_eq!((read(&mut fresh, 0), read(&mut fresh, 7)), (b't', 0x5a));
        let broken = State { kept: vec![0; KEPT + 1], ..state.clone() };
        assert!(fresh.restore(broken).is_err());
        assert!(fresh.restore(State { in_buffer: vec![0; 65], ..state }).is_err());
    }

    #[test]
    fn the_last_output_reaches_a_slow_reader() {
        let (mut port, mut theirs, _) = port();
        let mut sent = 0;
        while read(&mut port, LSR.into()) & LSR_THRE != 0 {
            port.write(0, b"x");
            sent += 1;
        }
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).map(|_| got.len())
        });
        drop(port);
        assert_eq!(reader.join().unwrap().unwrap(), sent);
    }

    #[test]
    fn loopback_cuts_the_host_end_off() {
        let (mut port, mut theirs, _) = port();
        port.resume();
        port.write(MCR.into(), &[MCR_LOOP]);
        theirs.write_all(b"outside").unwrap();
        port.write(0, b"L");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(read(&mut port, 0), b'L');
        assert_eq!(read(&mut port, LSR.into()) & 1, 0);
        port.write(MCR.into(), &[0]);
        until(|| read(&mut port, LSR.into()) & 1 != 0);
        assert_eq!(read(&mut port, 0), b'o');
    }
}
