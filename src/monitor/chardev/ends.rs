//! [`Ends`]: the host ends that one configuration names, opened once and kept over the guest's resets.

use super::{Endpoint, Error, Escape, terminal};
use crate::config::CharTarget;
use crate::event_loop::EventLoop;

/// Host ends by what they serve: `console`, `serial`, `port NAME`. Opened on first use, in the order of use.
#[derive(Debug)]
pub struct Ends {
    events: EventLoop,
    open: Vec<(String, Endpoint)>,
}

impl Ends {
    /// None are open yet. `events` reads the terminal, and serves the devices that need no thread of their own.
    pub fn new(events: EventLoop) -> Self {
        Self { events, open: Vec::new() }
    }

    /// Who serves them.
    pub fn events(&self) -> &EventLoop {
        &self.events
    }

    /// The end for `role`, opened now if this is the first time that it is asked for.
    ///
    /// # Errors
    /// As [`Endpoint::open`].
    pub fn get(&mut self, role: &str, place: &CharTarget) -> Result<Endpoint, Error> {
        if let Some((_, end)) = self.open.iter().find(|(name, _)| name == role) {
            return Ok(end.clone());
        }
        let end = Endpoint::open(place, &self.events)?;
        self.open.push((role.to_owned(), end.clone()));
        Ok(end)
    }

    /// The end for `role`, if it is open.
    pub fn get_open(&self, role: &str) -> Option<Endpoint> {
        self.open.iter().find(|(name, _)| name == role).map(|(_, end)| end.clone())
    }

    /// Gives `role` an end that is open already, whatever the configuration will say.
    pub fn put(&mut self, role: &str, end: Endpoint) {
        self.open.push((role.to_owned(), end));
    }

    /// Has `act` called when a person types an escape sequence at whichever end is a terminal.
    pub fn on_escape(&self, act: impl FnMut(Escape) + Send + Clone + 'static) {
        self.open.iter().for_each(|(_, end)| end.on_escape(act.clone()));
    }

    /// What the guest writes to console and serial port from now on.
    pub fn last_words(&self) -> LastWords {
        let told = self.open.iter().filter(|(role, _)| role == "console" || role == "serial");
        LastWords(told.map(|(_, end)| end.clone()).inspect(Endpoint::forget).collect())
    }

    /// What is open, by role, as the configuration writes it, pseudo-terminals with their path.
    pub fn list(&self) -> impl Iterator<Item = (&str, String)> {
        self.open.iter().map(|(role, end)| (role.as_str(), end.to_string()))
    }
}

/// What a guest wrote last to its console and its serial port, for who wants to know how it ended.
#[derive(Debug)]
pub struct LastWords(Vec<Endpoint>);

impl LastWords {
    /// The last few KiB of each, as text.
    pub fn texts(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|end| String::from_utf8_lossy(&end.tail()).into_owned())
    }
}

impl Drop for Ends {
    /// Whoever still holds an end, the terminal is given back when the run that opened it is over.
    fn drop(&mut self) {
        if self.open.iter().any(|(_, end)| end.is_terminal()) {
            terminal::restore();
        }
    }
}
