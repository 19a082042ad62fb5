//! Carries a session's streams until its exit. One thread receives and never waits for anything else; one for each stream in use
//! reads or writes here, where it may be held up as long as its peer likes without holding up the others.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::{Error, Sender, Session, failed};
use crate::protocol::{Exit, MAX_DATA, Malformed, Message, Stream, WINDOW};

/// How much is read or written at once.
const PIECE: usize = 32 << 10;
const _: () = assert!(PIECE <= MAX_DATA);

/// The near ends of a session's streams.
pub struct Streams {
    /// Goes to the command; its end does, too.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Takes its output.
    pub stdout: Box<dyn Write + Send>,
    /// Takes its errors.
    pub stderr: Box<dyn Write + Send>,
}

/// Carries `streams` until the command has ended and all that it wrote is written here.
///
/// The thread that reads `stdin` may be left behind, in a read that nobody ends.
///
/// # Errors
/// The connection is lost, the agent breaks the protocol, or stdin cannot be read.
pub fn run(mut session: Session, streams: Streams) -> Result<Exit, Error> {
    let credit = Arc::new(Gate::default());
    credit.lock().credit = WINDOW;
    let stdin_failed = Arc::new(Mutex::new(None));
    if let Some(stdin) = streams.stdin {
        let (credit, sender, failed) = (credit.clone(), session.sender(), stdin_failed.clone());
        thread::spawn(move || {
            if let Err(error) = send_stdin(stdin, &credit, &sender) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
    }
    let mut out = Output::new(Stream::Stdout, "write to standard output", streams.stdout);
    let mut err = Output::new(Stream::Stderr, "write to standard error", streams.stderr);
    let result = receive(&mut session, &credit, &mut out, &mut err);
    for gate in [&credit, &out.gate, &err.gate] {
        gate.end();
    }
    // What has come is written, however long its reader takes.
    out.written()?;
    err.written()?;
    let exit = result?;
    match stdin_failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(Error::Stream("read standard input", error)),
        None => Ok(exit),
    }
}

fn receive(session: &mut Session, credit: &Gate, out: &mut Output, err: &mut Output) -> Result<Exit, Error> {
    let sender = session.sender();
    loop {
        match session.receive()? {
            None => return Err(Error::Lost(None)),
            Some(Message::Data(stream, bytes)) => {
                output(stream, out, err)?.put(bytes, &sender)?;
            }
            Some(Message::End(stream)) => output(stream, out, err)?.gate.end(),
            Some(Message::Credit(Stream::Stdin, count)) => {
                let mut state = credit.lock();
                state.credit =
                    state.credit.checked_add(count).filter(|sum| *sum <= WINDOW).ok_or(Malformed::Window)?;
                credit.changed.notify_all();
            }
            Some(Message::Stop(Stream::Stdin)) => credit.end(),
            Some(Message::Exit(exit)) => return Ok(exit),
            Some(Message::Failed(reason, text)) => return Err(failed(reason, text)),
            Some(_) => return Err(Malformed::Order.into()),
        }
    }
}

fn output<'a>(stream: Stream, out: &'a mut Output, err: &'a mut Output) -> Result<&'a mut Output, Malformed> {
    match stream {
        Stream::Stdout => Ok(out),
        Stream::Stderr => Ok(err),
        Stream::Stdin => Err(Malformed::Order),
    }
}

/// One of the command's two outputs. Many a command has nothing to say on one of them, and is over sooner without its thread.
struct Output {
    stream: Stream,
    /// What fails where it cannot be written.
    what: &'static str,
    gate: Arc<Gate>,
    /// Until there is something to write.
    end: Option<Box<dyn Write + Send>>,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl Output {
    fn new(stream: Stream, what: &'static str, end: Box<dyn Write + Send>) -> Self {
        Self { stream, what, gate: Arc::default(), end: Some(end), writer: None }
    }

    /// Has `bytes` written.
    ///
    /// # Errors
    /// They are more than the agent has credit for; the host is out of threads.
    fn put(&mut self, bytes: &[u8], sender: &Sender) -> Result<(), Error> {
        let mut state = self.gate.lock();
        if state.ended || state.bytes.len() + bytes.len() > WINDOW as usize {
            return Err(Malformed::Window.into());
        }
        state.bytes.extend(bytes);
        drop(state);
        self.gate.changed.notify_all();
        if let Some(end) = self.end.take() {
            let (stream, gate, sender) = (self.stream, self.gate.clone(), sender.clone());
            let writer = thread::Builder::new().spawn(move || write_output(stream, end, &gate, &sender));
            self.writer = Some(writer.map_err(|error| Error::Stream(self.what, error))?);
        }
        Ok(())
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// It cannot be.
    fn written(self) -> Result<(), Error> {
        let written = self.writer.map_or(Ok(()), |writer| writer.join().unwrap_or(Ok(())));
        written.map_err(|error| Error::Stream(self.what, error))
    }
}

/// What one thread hands another of one stream.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// To be written here; at most a window.
    bytes: VecDeque<u8>,
    /// What the agent takes.
    credit: u32,
    ended: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn wait(&self, until: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !until(&state) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

fn send_stdin(mut stdin: Box<dyn Read + Send>, gate: &Gate, sender: &Sender) -> io::Result<()> {
    let mut bytes = vec![0; PIECE];
    loop {
        // Room first: what was read could not be put back for whoever reads after the command has ended.
        let room = {
            let state = gate.wait(|state| state.ended || state.credit > 0);
            if state.ended {
                return Ok(());
            }
            (state.credit as usize).min(PIECE)
        };
        let count = match stdin.read(&mut bytes[..room]) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = sender.send(&Message::End(Stream::Stdin));
                return Err(error);
            }
        };
        gate.lock().credit -= count as u32;
        // That the connection is gone is for the receiver to say.
        let message = match count {
            0 => Message::End(Stream::Stdin),
            _ => Message::Data(Stream::Stdin, &bytes[..count]),
        };
        if sender.send(&message).is_err() || count == 0 {
            return Ok(());
        }
    }
}

/// Writes what comes. A reader that has gone away is the command's to know: it is told to stop, as a pipe would tell it.
fn write_output(
    stream: Stream,
    mut end: Box<dyn Write + Send>,
    gate: &Gate,
    sender: &Sender,
) -> io::Result<()> {
    let mut piece = Vec::with_capacity(PIECE);
    let mut owed = 0;
    let mut result = Ok(());
    let mut open = true;
    loop {
        {
            let mut state = gate.wait(|state| state.ended || !state.bytes.is_empty());
            if state.bytes.is_empty() {
                break;
            }
            piece.clear();
            let count = state.bytes.len().min(PIECE);
            piece.extend(state.bytes.drain(..count));
            owed += count as u32;
        }
        if open && let Err(error) = end.write_all(&piece).and_then(|()| end.flush()) {
            open = false;
            let _ = sender.send(&Message::Stop(stream));
            if error.kind() != io::ErrorKind::BrokenPipe {
                result = Err(error);
            }
        }
        if owed >= WINDOW / 4 || gate.lock().bytes.is_empty() {
            let _ = sender.send(&Message::Credit(stream, owed));
            owed = 0;
        }
    }
    result
}
