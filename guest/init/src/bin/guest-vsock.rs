//! Talks to the host over vsock: `guest-vsock [-q] WHAT PORT [NUMBER]`; `-q` for messages.
//!
//! - `connect`, `listen`: standard input goes there, and what comes to standard output.
//! - `echo`: NUMBER callers, one after the other, get back what they send.
//! - `send`: NUMBER KiB, in writes of 64 KiB. `take`: all that comes.
//! - `many`: NUMBER connections at once, each with a byte there and back.
//!
//! A failure ends it with the error's number as exit code.
#![no_std]
#![no_main]

#[path = "freestanding/mod.rs"]
mod freestanding;

use core::ffi::CStr;

use guest_init::console::{complain, say, stdio};
use guest_init::kernel::exit;
use guest_init::mounts::Text;
use guest_init::vsock::{accept, connect, end_output, listen};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, read, write};

/// The longest message.
const PIECE: usize = 64 << 10;
/// Connections at once.
const MOST: usize = 1000;

static mut BUFFER: [u8; PIECE] = [0; PIECE];

/// Called by `_start` with the stack as the kernel left it: argc, argv, NULL.
///
/// # Safety
/// `stack` must be that stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn entry(stack: *const usize) -> ! {
    let mut words: [&[u8]; 4] = [b""; 4];
    // SAFETY: the kernel's layout (System V ABI for x86-64, 3.4.1): argc, and so many C strings.
    let (argc, argv) = unsafe { (stack.read(), stack.add(1).cast::<*const core::ffi::c_char>()) };
    for (at, word) in (1..argc).zip(&mut words) {
        // SAFETY: below argc.
        *word = unsafe { CStr::from_ptr(argv.add(at).read()) }.to_bytes();
    }
    let messages = words[0] == b"-q";
    let [what, port, number] = if messages { [1, 2, 3] } else { [0, 1, 2] }.map(|at: usize| words[at]);
    // SAFETY: the one thread's, and nobody else refers to it.
    let buffer = unsafe { &mut *(&raw mut BUFFER) };
    match run(what, decimal(port), decimal(number), messages, buffer) {
        Ok(()) => exit(0),
        Err(error) => {
            complain(what, port, error);
            exit(error.raw_os_error() as u8)
        }
    }
}

fn decimal(text: &[u8]) -> u32 {
    text.iter().fold(0, |number, digit| number * 10 + u32::from(digit.wrapping_sub(b'0')))
}

fn run(what: &[u8], port: u32, number: u32, messages: bool, buffer: &mut [u8]) -> Result<(), Errno> {
    match what {
        b"connect" => pipe(connect(port, messages)?.as_fd(), buffer),
        b"listen" => pipe(accept(listening(port, messages)?.as_fd())?.as_fd(), buffer),
        b"echo" => {
            let listener = listening(port, messages)?;
            (0..number).try_for_each(|_| echo(accept(listener.as_fd())?.as_fd(), buffer))
        }
        b"send" => {
            let socket = connect(port, messages)?;
            for _ in 0..number.div_ceil(PIECE as u32 >> 10) {
                write_all(socket.as_fd(), buffer)?;
            }
            end_output(socket.as_fd());
            read(&socket, &mut buffer[..1]).map(drop)
        }
        b"take" => {
            let socket = connect(port, messages)?;
            let mut kib = 0;
            let mut rest = 0;
            while let n @ 1.. = read(&socket, &mut *buffer)? {
                rest += n;
                (kib, rest) = (kib + (rest >> 10) as u32, rest & 1023);
            }
            say(&[b"took ", Text::<12>::decimal(kib).bytes(), b" KiB"]);
            Ok(())
        }
        b"many" => many(port, number, messages),
        _ => Err(Errno::INVAL),
    }
}

fn listening(port: u32, messages: bool) -> Result<OwnedFd, Errno> {
    let listener = listen(port, messages)?;
    say(&[b"listening"]);
    Ok(listener)
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        bytes = &bytes[write(to, bytes)?..];
    }
    Ok(())
}

fn echo(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(), Errno> {
    while let n @ 1.. = read(socket, &mut *buffer)? {
        write_all(socket, &buffer[..n])?;
    }
    Ok(())
}

/// Both ways, until the other end has sent all.
fn pipe(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(), Errno> {
    let mut sends = true;
    loop {
        let wanted = if sends { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            [PollFd::from_borrowed_fd(socket, PollFlags::IN), PollFd::from_borrowed_fd(stdio(0), wanted)];
        let count = if sends { 2 } else { 1 };
        poll(&mut fds[..count], None)?;
        let [came, typed] = [!fds[0].revents().is_empty(), sends && !fds[1].revents().is_empty()];
        if came {
            match read(socket, &mut *buffer)? {
                0 => return Ok(()),
                n => write_all(stdio(1), &buffer[..n])?,
            }
        }
        if typed {
            match read(stdio(0), &mut *buffer)? {
                0 => {
                    sends = false;
                    end_output(socket);
                }
                n => write_all(socket, &buffer[..n])?,
            }
        }
    }
}

fn many(port: u32, number: u32, messages: bool) -> Result<(), Errno> {
    let mut sockets: [Option<OwnedFd>; MOST] = [const { None }; MOST];
    let sockets = sockets.get_mut(..number as usize).ok_or(Errno::INVAL)?;
    for socket in &mut *sockets {
        *socket = Some(connect(port, messages)?);
    }
    for (socket, byte) in sockets.iter().flatten().zip((0..=255).cycle()) {
        write_all(socket.as_fd(), &[byte])?;
    }
    for (socket, byte) in sockets.iter().flatten().zip((0..=255).cycle()) {
        let mut back = [0];
        if read(socket, &mut back)? != 1 || back != [byte] {
            return Err(Errno::BADMSG);
        }
    }
    say(&[b"connections: ", Text::<12>::decimal(number).bytes()]);
    Ok(())
}
