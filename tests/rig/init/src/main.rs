//! The first process of the machine that the rig starts: prepares the kernel, tells the rig that
//! it is ready (a snapshot is taken there), takes one request, runs it and reports how it ended.
//! Knows nothing of QEMU or of how the machine was started. Linked statically: it runs from an
//! initramfs that holds nothing else but kernel modules.

mod job;
mod system;

use rig_init::{CONTROL_PORT, EXIT_RIG, Frame, REQUEST_FILE, Request};
use std::fs::{self, File};
use std::io;
use std::sync::Mutex;
use std::time::Duration;

/// The stream to the rig; the lock keeps the frames of several threads apart.
type Control = Mutex<File>;

fn main() {
    if std::process::id() != 1 {
        eprintln!("rig-init is the first process of the rig's machine, not a command");
        std::process::exit(EXIT_RIG);
    }
    let error = match system::prepare().and_then(|()| system::port(CONTROL_PORT)) {
        Ok(control) => {
            let control = Mutex::new(control);
            match serve(&control) {
                // The rig ends the machine when it has read the exit code.
                Ok(()) => loop {
                    std::thread::sleep(Duration::from_secs(3600));
                },
                Err(error) => {
                    let _ = send(&control, &Frame::Note(format!("{error}")));
                    error
                }
            }
        }
        Err(error) => error,
    };
    eprintln!("rig-init: {error}");
    system::stop();
}

fn send(control: &Control, frame: &Frame) -> io::Result<()> {
    let mut stream = control.lock().map_err(|_| io::ErrorKind::BrokenPipe)?;
    frame.write(&mut *stream)
}

fn serve(control: &Control) -> io::Result<()> {
    for note in system::load_modules()? {
        send(control, &Frame::Note(note))?;
    }
    let mut requests = control.lock().map_err(|_| io::ErrorKind::BrokenPipe)?.try_clone()?;
    let request = match fs::read(REQUEST_FILE) {
        Ok(bytes) => Request::decode(&bytes)?,
        Err(_) => {
            send(control, &Frame::Ready)?;
            match Frame::read(&mut requests)? {
                Frame::Request(request) => *request,
                other => return Err(io::Error::other(format!("no request but {other:?}"))),
            }
        }
    };
    system::enter(&request)?;
    let code = job::run(request, control, requests)?;
    system::sync();
    send(control, &Frame::Exit(code))
}
