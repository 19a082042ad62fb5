//! [`run`]: a lab's guest on the ordinary machine, recorded, with the host's part in it and a limit of time.

use std::fs;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use super::{Error, Host, Lab};
use crate::chardev::Endpoint;
use crate::config::{Console, Size, VmConfig, Where};
use crate::machine::{self, Ends, Handle, Outcome};
use crate::memory::layout;
use crate::recorder::{Recorder, clock};
use crate::trace::file::{Header, Trace};
use crate::trace::recording::{Recording, Start};

/// From the guest's byte to the power button: it is to be asleep by then.
const PAUSE: Duration = Duration::from_millis(20);

/// What came of a lab.
#[derive(Debug)]
pub struct Ran {
    /// The record.
    pub trace: Trace,
    /// How it ended; [`Outcome::Killed`]: its time was over.
    pub outcome: Outcome,
    /// What the guest wrote to the serial port, and to the console.
    pub output: [String; 2],
    /// What the host did, and when, in ticks of the recorder's clock.
    pub acts: Vec<(u64, String)>,
}

/// Runs `lab`; `folder` gets the guest and the record.
///
/// # Errors
/// [`Error`]
pub fn run(lab: &Lab, folder: &Path) -> Result<Ran, Error> {
    let host = |what| move |source| Error::Host { what, source };
    let (kernel, record) = (folder.join("guest"), folder.join("record"));
    fs::write(&kernel, lab.image).map_err(host("write the guest to a file"))?;
    let mut config = VmConfig {
        kernel: Some(kernel),
        cmdline: Some(String::new()),
        console: Console(Some(Where::Off)),
        serial: Where::Stdio,
        rng: true,
        debug_exit: Some(layout::DEBUG_EXIT as u16),
        ..VmConfig::default()
    };
    config.mem.size = Size::mib(32);
    (lab.machine)(&mut config);

    // The guest stands still while the taker has its byte: it is called by the vCPU's thread.
    let machine = Arc::<OnceLock<Handle>>::default();
    let (acts, done) = channel();
    let (written, serial) = channel();
    let (button, pressed) = channel();
    let (what, handle, log) = (lab.host, machine.clone(), acts.clone());
    let taker = Endpoint::from_taker(move |bytes| {
        let _ = written.send(bytes.to_vec());
        let Some(handle) = handle.get() else { return };
        match what {
            Host::Watches => {}
            Host::PressesPowerButton => _ = button.send(()),
            Host::FetchesDirtyLog => {
                let text = fetch(handle);
                let _ = log.send((clock::ticks(), text));
            }
        }
    });
    let (shown, console) = channel();
    let screen = Endpoint::from_taker(move |bytes| _ = shown.send(bytes.to_vec()));
    let mut ends = Ends::default();
    ends.put("serial", taker.map_err(host("make a serial port's end"))?);
    ends.put("console", screen.map_err(host("make a console's end"))?);

    let recorder = Arc::<Recorder>::default();
    let start = Start::now();
    let mut built = machine::build(&config, &mut ends, &recorder)?;
    let handle = built.handle();
    if lab.host == Host::FetchesDirtyLog {
        handle.log_dirty(true)?;
    }
    let _ = machine.set(handle.clone());
    let header = Header::of(&config, handle.buses());
    let recording = Recording::start(
        &record.clone().into(),
        header,
        recorder,
        start,
        built.counters(),
        handle.ram().clone(),
    )?;
    let (over, ended) = channel::<()>();
    let outcome = thread::scope(|scope| {
        let handle = &handle;
        scope.spawn(move || watch(handle, lab, &pressed, &ended, &acts));
        let outcome = built.run(|| ());
        drop(over);
        outcome
    });
    recording.finish()?;
    let said = |from: Receiver<Vec<u8>>| from.try_iter().flatten().map(char::from).collect();
    let (outcome, output) = (outcome?, [said(serial), said(console)]);
    Ok(Ran { trace: Trace::read(&record)?, outcome, output, acts: done.try_iter().collect() })
}

/// Does what is asked for while the guest runs, and ends it when its time is over.
fn watch(
    handle: &Handle,
    lab: &Lab,
    pressed: &Receiver<()>,
    ended: &Receiver<()>,
    acts: &Sender<(u64, String)>,
) {
    let act = |text: &str| _ = acts.send((clock::ticks(), text.to_owned()));
    if lab.host == Host::PressesPowerButton && pressed.recv_timeout(lab.limit).is_ok() {
        thread::sleep(PAUSE);
        act("presses the power button: writes to the eventfd of pin 9");
        handle.power_button();
    }
    if ended.recv_timeout(lab.limit) == Err(RecvTimeoutError::Timeout) {
        act("ends the run: its time is over");
        handle.kill();
    }
}

/// The dirty log, as a sentence.
fn fetch(handle: &Handle) -> String {
    match handle.take_dirty() {
        Ok(dirty) => {
            let pages: Vec<_> = dirty.pages().map(|page| format!("{page:#x}")).collect();
            match pages.len() {
                0 => "fetches the dirty log: no page".to_owned(),
                1 => format!("fetches the dirty log: 1 page, {}", pages[0]),
                count => format!("fetches the dirty log: {count} pages, {}", pages.join(", ")),
            }
        }
        Err(error) => format!("cannot fetch the dirty log: {}", crate::error_chain(&error)),
    }
}
