//! The view on a terminal: keys, refreshes, and the terminal as it was before, however it ends.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::session::{KEEP_ALIVE, Look, Reading, Session};
use super::{ended, view};
use vmm_command::{Code, Failure};
use vmm_monitor::api::client::Client;
use vmm_monitor::api::signals::Signals;
use vmm_monitor::api::{self, Error};
use vmm_trace::live::rates::Order;
use vmm_trace::reasons::Shown;

/// How long a key, a signal or news may have to wait.
const TURN: Duration = Duration::from_millis(50);
/// The first look is over a shorter time, so that there is something to see.
const FIRST: Duration = Duration::from_millis(300);

/// The terminal while it is ours. A panic gives it back as well, before it is told (a hook that ratatui sets).
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> io::Result<Self> {
        // Should only half of it succeed, that half is undone.
        ratatui::try_init().inspect_err(|_| ratatui::restore()).map(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Not `restore`, which writes to stderr if the terminal is gone.
        let _ = ratatui::try_restore();
    }
}

/// What the keys change, and what stays as it was asked for.
#[derive(Debug, Default)]
pub struct Settings {
    /// What comes first.
    pub order: Order,
    /// The view stands still.
    pub paused: bool,
    /// The explanations are shown.
    pub help: bool,
    /// Whose hardware reasons are shown; absent: both vendors' where they fit, else the host's.
    pub shown: Option<Shown>,
}

/// Shows the view until somebody quits or the machine ends.
pub fn run(session: Session, interval: Duration, shown: Option<Shown>) -> Result<Code, Failure> {
    let mut signals = Signals::take().map_err(api::Error::Thread)?;
    let (client, mut names) = session.split();
    let news = ask(client, interval).map_err(api::Error::Thread)?;
    let mut screen = Screen::open().context("cannot take over the terminal").map_err(host)?;
    let (mut settings, mut before, mut look) =
        (Settings { shown, ..Settings::default() }, None::<Reading>, None::<Look>);
    let mut draw = true;
    loop {
        match news.try_recv() {
            Ok(Ok(now)) => {
                if let Some(before) = before.as_ref().filter(|_| !settings.paused) {
                    look = Some(names.look(before, &now));
                    draw = true;
                }
                before = Some(now);
            }
            Ok(Err(error)) => {
                drop(screen);
                return ended(error);
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Ok(Code::Success),
        }
        if draw {
            let frame = screen.0.draw(|frame| view::draw(frame, look.as_ref(), &settings));
            frame.context("cannot draw on the terminal").map_err(host)?;
            draw = false;
        }
        if event::poll(TURN).context("cannot read the keyboard").map_err(host)? {
            match event::read().context("cannot read the keyboard").map_err(host)? {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('c' | 'd') if control => return Ok(Code::Success),
                        KeyCode::Char('q') => return Ok(Code::Success),
                        KeyCode::Char('h' | '?') => settings.help = !settings.help,
                        KeyCode::Esc => settings.help = false,
                        KeyCode::Char('p' | ' ') => settings.paused = !settings.paused,
                        KeyCode::Char('s') => {
                            settings.order = match settings.order {
                                Order::Count => Order::Time,
                                Order::Time => Order::Count,
                            }
                        }
                        _ => {}
                    }
                    draw = true;
                }
                Event::Resize(..) => draw = true,
                _ => {}
            }
        }
        if !signals.wishes().is_empty() {
            return Ok(Code::Success);
        }
    }
}

fn host(error: anyhow::Error) -> Failure {
    Failure::new(Code::Host, error)
}

/// Asks the monitor every `interval` on a thread of its own: keys must not wait for a monitor that does not answer. The thread ends
/// with whoever listens, or with the process.
fn ask(mut client: Client, interval: Duration) -> io::Result<Receiver<Result<Reading, Error>>> {
    let (told, news) = sync_channel(1);
    let run = move || {
        let mut next = Instant::now();
        let mut pause = interval.min(FIRST);
        loop {
            let (answer, due) = (Reading::by(&mut client), Instant::now() >= next);
            let over = answer.is_err();
            if due || over {
                if told.send(answer).is_err() || over {
                    return;
                }
                next = Instant::now() + pause;
                pause = interval;
            }
            thread::sleep(next.saturating_duration_since(Instant::now()).min(KEEP_ALIVE));
        }
    };
    thread::Builder::new().name("ask".to_owned()).spawn(run)?;
    Ok(news)
}
