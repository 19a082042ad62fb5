//! Runs the requested command, carries its input and output, and reaps every process until it
//! has ended. Called by `main.rs` once, when the host's root is the root.

use crate::system::{self, check};
use crate::{Control, send};
use rig_init::{EXIT_CANNOT_EXECUTE, EXIT_NOT_FOUND, Frame, Request, STDIN_PORT};
use std::ffi::{CStr, OsStr};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

/// What is read from the command and sent at once, in bytes.
const CHUNK: usize = 64 << 10;

/// How much output is still taken once the command has ended, in bytes: what an enlarged pipe may
/// hold at most by default. A process that stays behind and writes cannot delay the end further.
const REMAINDER: usize = 1 << 20;

type ToFrame = fn(Vec<u8>) -> Frame;

/// Runs the command; its exit code, or 128 and the signal that ended it.
pub fn run(request: Request, control: &Control, mut requests: File) -> io::Result<i32> {
    let mut command = command_of(&request);
    let mut outputs: Vec<(File, ToFrame)> = Vec::new();
    let mut input = None;
    let mut terminal = None;
    if let Some((rows, columns)) = request.terminal {
        let (master, slave) = open_terminal()?;
        resize(&master, rows, columns)?;
        command.stdin(slave.try_clone()?);
        command.stdout(slave.try_clone()?);
        command.stderr(slave);
        terminal = Some(master.try_clone()?);
        input = Some(master.try_clone()?);
        outputs.push((master, Frame::Stdout));
    } else {
        let (out, out_end) = io::pipe()?;
        let (err, err_end) = io::pipe()?;
        command.stdout(out_end).stderr(err_end);
        outputs.push((OwnedFd::from(out).into(), Frame::Stdout));
        outputs.push((OwnedFd::from(err).into(), Frame::Stderr));
        if request.stdin {
            let (read_end, write_end) = io::pipe()?;
            command.stdin(read_end);
            input = Some(OwnedFd::from(write_end).into());
        } else {
            command.stdin(Stdio::null());
        }
    }
    let stdin_port = match input {
        Some(_) => Some(system::port(STDIN_PORT)?),
        None => None,
    };

    send(control, &Frame::Started)?;
    let child = match command.spawn() {
        Ok(child) => child.id() as libc::pid_t,
        Err(error) => {
            let name = String::from_utf8_lossy(&request.args[0]).into_owned();
            let line = format!("rig: {name}: {error}\n");
            send(control, &Frame::Stderr(line.into_bytes()))?;
            return Ok(match error.kind() {
                io::ErrorKind::NotFound => EXIT_NOT_FOUND,
                _ => EXIT_CANNOT_EXECUTE,
            });
        }
    };
    drop(command); // with it this process's copies of the command's ends

    if let (Some(port), Some(input)) = (stdin_port, input) {
        thread::spawn(move || feed(port, input));
    }
    if let Some(terminal) = terminal {
        thread::spawn(move || {
            while let Ok(frame) = Frame::read(&mut requests) {
                if let Frame::Resize(rows, columns) = frame {
                    let _ = resize(&terminal, rows, columns);
                }
            }
        });
    }
    let (mut ended, end) = io::pipe()?;
    thread::spawn(move || reap(child, end));
    relay(outputs, &ended, control)?;
    let mut code = [0; 4];
    ended.read_exact(&mut code)?;
    Ok(i32::from_le_bytes(code))
}

fn command_of(request: &Request) -> Command {
    let mut args = request.args.iter().map(|arg| OsStr::from_bytes(arg));
    let mut command = Command::new(args.next().unwrap_or_default());
    command.args(args).env_clear();
    for entry in &request.env {
        // A name may begin with `=`, so the search starts behind the first byte.
        if let Some(at) = entry.iter().skip(1).position(|&byte| byte == b'=') {
            let (name, value) = entry.split_at(at + 1);
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(&value[1..]));
        }
    }
    // The host's runtime directory stays outside; this one is the machine's own.
    command.env("XDG_RUNTIME_DIR", "/run/user/0");
    let limits = request.limits.clone();
    let umask = request.umask as libc::mode_t;
    let terminal = request.terminal.is_some();
    // SAFETY: the closure only makes system calls that are safe between fork and exec.
    unsafe {
        command.pre_exec(move || {
            check(libc::setsid())?;
            if terminal {
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            for &(which, soft, hard) in &limits {
                let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
                // A limit beyond what this kernel allows stays as it is here.
                libc::setrlimit(which, &limit);
            }
            libc::umask(umask);
            Ok(())
        })
    };
    command
}

/// Sends what the command writes until it has ended and nothing is left. A process that stays
/// behind may hold the other end open: that does not delay the end.
fn relay(mut outputs: Vec<(File, ToFrame)>, ended: &impl AsRawFd, control: &Control) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut remainder = REMAINDER;
    loop {
        let mut polled: Vec<libc::pollfd> = outputs
            .iter()
            .map(|(file, _)| file.as_raw_fd())
            .chain([ended.as_raw_fd()])
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        // SAFETY: pointer and length are those of one vector.
        check(unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) })?;
        let over = polled.pop().is_some_and(|end| end.revents != 0);
        let mut ready = polled.iter().map(|fd| fd.revents != 0);
        let mut quiet = true;
        let mut failure = None;
        outputs.retain_mut(|(file, frame)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            quiet = false;
            match file.read(&mut buffer) {
                // A terminal that no process holds any more reads as an error.
                Ok(0) | Err(_) => false,
                Ok(count) => {
                    if over {
                        remainder = remainder.saturating_sub(count);
                    }
                    failure = failure.take().or(send(control, &frame(buffer[..count].to_vec())).err());
                    true
                }
            }
        });
        match failure {
            Some(error) => return Err(error),
            None if over && (quiet || remainder == 0) => return Ok(()),
            None => (),
        }
    }
}

/// Carries standard input to the command until its end.
fn feed(mut port: File, mut input: File) {
    while let Ok(Frame::Stdin(bytes)) = Frame::read(&mut port) {
        if bytes.is_empty() {
            return;
        }
        // A command that reads no further is no reason to stop the stream of the port.
        let _ = input.write_all(&bytes);
    }
}

/// Waits for every process, and tells `end` how the command ended.
fn reap(command: libc::pid_t, mut end: io::PipeWriter) {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        match unsafe { libc::wait(&mut status) } {
            -1 => thread::sleep(std::time::Duration::from_millis(10)),
            pid if pid == command => {
                let code = match libc::WIFSIGNALED(status) {
                    true => 128 + libc::WTERMSIG(status),
                    false => libc::WEXITSTATUS(status),
                };
                let _ = end.write_all(&code.to_le_bytes());
            }
            _ => (),
        }
    }
}

/// A new pseudo-terminal: the side of this process and the side of the command.
fn open_terminal() -> io::Result<(File, File)> {
    // SAFETY: posix_openpt takes flags only.
    let master = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    check(master)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let master = unsafe { File::from_raw_fd(master) };
    // SAFETY: both calls take an open descriptor of a pseudo-terminal.
    unsafe {
        check(libc::grantpt(master.as_raw_fd()))?;
        check(libc::unlockpt(master.as_raw_fd()))?;
    }
    let mut name = [0; 64];
    // SAFETY: the buffer and its length belong together.
    let error = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: ptsname_r wrote a string that ends in NUL within the buffer.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    let slave = OpenOptions::new().read(true).write(true).open(OsStr::from_bytes(name.to_bytes()))?;
    Ok((master, slave))
}

fn resize(terminal: &File, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) })
}
