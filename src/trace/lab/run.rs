//! [`run`]: a lab's guest on the ordinary machine, recorded, with the host's part in it and a limit of time.

use std::error;
use std::fs;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Error, Host, Lab};
use crate::file::Trace;
use crate::recorded::Recorded;
use vmm_monitor::chardev::Endpoint;
use vmm_monitor::config::{CharTarget, Console, Size, VmConfig};
use vmm_monitor::machine::{Handle, Outcome};
use vmm_monitor::memory::layout;
use vmm_monitor::recorder::{Recorder, clock};
use vmm_monitor::session::{Built, End, Observer, Session};
use vmm_monitor::threads::{self, Role};

/// From the guest's byte to the power button: it is to be asleep by then.
const PAUSE: Duration = Duration::from_millis(20);

/// What the host did, and when, in ticks of the recorder's clock.
pub type Act = (u64, String);

/// What came of a lab.
#[derive(Debug)]
pub struct Ran {
    /// The record.
    pub trace: Trace,
    /// How it ended; [`Outcome::Killed`]: its time was over.
    pub outcome: Outcome,
    /// What the guest wrote to the serial port, and to the console.
    pub output: [String; 2],
    /// What the host did.
    pub acts: Vec<Act>,
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
        console: Console(Some(CharTarget::Off)),
        serial: CharTarget::Stdio,
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
    let recorder = Arc::<Recorder>::default();
    let mut recorded = Recorded::new(&config, record.clone().into(), recorder.clone());
    let mut session = Session::private(&config, recorder)?;
    session.put("serial", taker.map_err(host("make a serial port's end"))?);
    session.put("console", screen.map_err(host("make a console's end"))?);
    let mut watch = HostPart { lab, machine, parts: Some((pressed, acts)), thread: None };
    let outcome = session.run(&mut [&mut recorded, &mut watch]);
    recorded.finish(&|| false)?;
    let said = |from: Receiver<Vec<u8>>| from.try_iter().flatten().map(char::from).collect();
    let (outcome, output) = (outcome?, [said(serial), said(console)]);
    Ok(Ran { trace: Trace::read(&record)?, outcome, output, acts: done.try_iter().collect() })
}

/// The host's part: what it does while the guest runs, and the end of a guest whose time is over.
struct HostPart<'a> {
    lab: &'a Lab,
    /// For whoever takes the guest's output.
    machine: Arc<OnceLock<Handle>>,
    /// The wish for the power button, and what is told of the host's acts.
    parts: Option<(Receiver<()>, Sender<Act>)>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Observer for HostPart<'_> {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn error::Error + Send + Sync>> {
        let machine = &*built.machine;
        let handle = machine.handle();
        if self.lab.host == Host::FetchesDirtyLog {
            handle.log_dirty(true)?;
        }
        let _ = self.machine.set(handle.clone());
        // A lab's guest does not reboot.
        let Some((pressed, acts)) = self.parts.take() else { return Ok(()) };
        let (over, ended) = channel::<()>();
        let (host, limit) = (self.lab.host, self.lab.limit);
        let run = move || watch(&handle, host, limit, &pressed, &ended, &acts);
        self.thread = Some((over, threads::spawn(Role::Owner("host"), run)?));
        Ok(())
    }

    fn ended(&mut self, _: &End<'_>) {
        if let Some((over, thread)) = self.thread.take() {
            drop(over);
            let _ = thread.join();
        }
    }
}

/// Does what is asked for while the guest runs, and ends it when its time is over.
fn watch(
    handle: &Handle,
    host: Host,
    limit: Duration,
    pressed: &Receiver<()>,
    ended: &Receiver<()>,
    acts: &Sender<Act>,
) {
    let act = |text: &str| _ = acts.send((clock::ticks(), text.to_owned()));
    if host == Host::PressesPowerButton && pressed.recv_timeout(limit).is_ok() {
        thread::sleep(PAUSE);
        act("presses the power button: writes to the eventfd of pin 5");
        handle.power_button();
    }
    if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
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
        Err(error) => format!("cannot fetch the dirty log: {}", vmm_monitor::error_chain(&error)),
    }
}
