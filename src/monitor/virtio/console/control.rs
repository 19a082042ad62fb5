//! The control messages of F_MULTIPORT (virtio 1.3, 5.3.6.2): what is said about ports, beside them.
//!
//! What waits to be told is kept as flags per port, not as a list: a driver that asks again and again
//! without giving buffers for the answers costs nothing.

use bitflags::bitflags;

use super::port::Port;
use crate::chardev::WindowSize;

bitflags! {
    /// Messages to the driver, in the order in which they go.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Pending: u8 {
        /// VIRTIO_CONSOLE_PORT_ADD: the port exists.
        const ADD = 1;
        /// VIRTIO_CONSOLE_CONSOLE_PORT: it is a console (Linux: hvc0).
        const CONSOLE = 2;
        /// VIRTIO_CONSOLE_PORT_NAME
        const NAME = 4;
        /// VIRTIO_CONSOLE_PORT_OPEN: whether somebody is at the host's end.
        const OPEN = 8;
        /// VIRTIO_CONSOLE_RESIZE
        const RESIZE = 16;
    }
}

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Size of `struct virtio_console_control`.
pub const HEADER: usize = 8;

fn message(id: usize, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    let mut bytes = (id as u32).to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(rest);
    bytes
}

/// The driver says something. False if it makes no sense.
pub fn heard(ports: &mut [Port], header: [u8; HEADER]) -> bool {
    let [i0, i1, i2, i3, e0, e1, v0, v1] = header;
    let id = u32::from_le_bytes([i0, i1, i2, i3]) as usize;
    let fine = u16::from_le_bytes([v0, v1]) == 1;
    match (u16::from_le_bytes([e0, e1]), ports.get_mut(id)) {
        (DEVICE_READY, _) => {
            if fine {
                ports.iter_mut().for_each(|port| port.pending |= Pending::ADD);
            }
        }
        (PORT_READY, Some(port)) => {
            port.ready = fine;
            if fine {
                port.pending |=
                    if id == 0 { Pending::CONSOLE | Pending::RESIZE } else { Pending::NAME | Pending::OPEN };
            }
        }
        (PORT_OPEN, Some(port)) => port.guest_open = fine,
        _ => return false,
    }
    true
}

/// Takes the next message for the driver off what waits for port `id`. Something must be waiting.
pub fn next(id: usize, port: &mut Port, size: WindowSize) -> Vec<u8> {
    let flag = port.pending.iter().next().unwrap_or(Pending::ADD);
    port.pending -= flag;
    match flag {
        Pending::CONSOLE => message(id, CONSOLE_PORT, 1, &[]),
        Pending::NAME => message(id, PORT_NAME, 1, port.name.as_bytes()),
        Pending::OPEN => {
            port.told_open = port.endpoint.connected();
            message(id, PORT_OPEN, u16::from(port.told_open), &[])
        }
        Pending::RESIZE => {
            // 5.3.6.2: columns first. Older Linux drivers read rows first.
            let [c0, c1] = size.columns.to_le_bytes();
            let [r0, r1] = size.rows.to_le_bytes();
            message(id, RESIZE, 0, &[c0, c1, r0, r1])
        }
        _ => message(id, DEVICE_ADD, 0, &[]),
    }
}
