//! What is printed and typed: virtio-console (virtio 1.3, 5.3) and COM1, whichever are there.

use crate::entry::{inb, outb};
use crate::virtio::{self, Queue};
use core::fmt;

/// The device's kind.
pub const KIND: u32 = 3;
const COM1: u16 = 0x3f8;
/// Line status: a byte has come; one can be sent.
const STATUS: u16 = COM1 + 5;
const RECEIVED: u8 = 1;
const CAN_SEND: u8 = 0x20;
/// How often to look whether the serial port can send before the byte is lost.
const PATIENCE: u32 = 100_000;

struct Virtio {
    receive: Queue,
    transmit: Queue,
    typed: [u8; 32],
    /// Which of `typed` come next.
    unread: core::ops::Range<usize>,
    receiving: bool,
}

/// Both consoles.
pub struct Console {
    virtio: Option<Virtio>,
    serial: bool,
    line: [u8; 160],
    length: usize,
}

/// Prints a line.
macro_rules! say {
    ($console:expr, $($what:tt)*) => {{
        let _ = core::fmt::Write::write_fmt($console, format_args!("{}\r\n", format_args!($($what)*)));
    }};
}
pub(crate) use say;

impl Console {
    /// Sets up what is there.
    pub fn open() -> Self {
        let virtio =
            virtio::devices(KIND).next().and_then(|device| device.open()).map(|[receive, transmit]| Virtio {
                receive,
                transmit,
                typed: [0; 32],
                unread: 0..0,
                receiving: false,
            });
        Self { virtio, serial: inb(STATUS) != 0xff, line: [0; 160], length: 0 }
    }

    /// Prints what has been written.
    pub fn flush(&mut self) {
        let length = core::mem::take(&mut self.length);
        let line = self.line.get(..length).unwrap_or_default();
        if line.is_empty() {
            return;
        }
        if let Some(virtio) = &mut self.virtio {
            virtio.transmit.submit(&[(line.as_ptr() as u64, line.len() as u32, false)]);
            if virtio.transmit.wait().is_none() {
                self.virtio = None;
            }
        }
        if self.serial {
            for byte in line {
                let _ = (0..PATIENCE).find(|_| inb(STATUS) & CAN_SEND != 0);
                outb(COM1, *byte);
            }
        }
    }

    /// The next byte that was typed, if there is one. Cannot be called once memory moves: a buffer stays with the device.
    pub fn typed(&mut self) -> Option<u8> {
        if let Some(virtio) = &mut self.virtio {
            if virtio.receiving
                && let Some(count) = virtio.receive.done()
            {
                virtio.unread = 0..(count as usize).min(virtio.typed.len());
                virtio.receiving = false;
            }
            if let Some(at) = virtio.unread.next() {
                // SAFETY: an element of it, which the device has written.
                return virtio.typed.get(at).map(|byte| unsafe { (byte as *const u8).read_volatile() });
            }
            if !virtio.receiving {
                virtio.receive.submit(&[(virtio.typed.as_mut_ptr() as u64, virtio.typed.len() as u32, true)]);
                virtio.receiving = true;
            }
        }
        (self.serial && inb(STATUS) & RECEIVED != 0).then(|| inb(COM1))
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.length == self.line.len() {
                self.flush();
            }
            self.line[self.length] = byte;
            self.length += 1;
            if byte == b'\n' {
                self.flush();
            }
        }
        Ok(())
    }
}
