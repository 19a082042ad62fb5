//! [`Ends`]: the host ends that one configuration names, opened once and kept over the guest's resets.

use super::{Endpoint, Error, Escape, terminal};
use crate::config::Where;

/// Host ends by what they serve: `console`, `serial`, `port NAME`. Opened on first use, in the order of use.
#[derive(Debug, Default)]
pub struct Ends(Vec<(String, Endpoint)>);

impl Ends {
    /// The end for `role`, opened now if this is the first time that it is asked for.
    ///
    /// # Errors
    /// As [`Endpoint::open`].
    pub fn get(&mut self, role: &str, place: &Where) -> Result<Endpoint, Error> {
        if let Some((_, end)) = self.0.iter().find(|(name, _)| name == role) {
            return Ok(end.clone());
        }
        let end = Endpoint::open(place)?;
        self.0.push((role.to_owned(), end.clone()));
        Ok(end)
    }

    /// The end for `role`, if it is open.
    pub fn get_open(&self, role: &str) -> Option<Endpoint> {
        self.0.iter().find(|(name, _)| name == role).map(|(_, end)| end.clone())
    }

    /// Gives `role` an end that is open already, whatever the configuration will say.
    pub fn put(&mut self, role: &str, end: Endpoint) {
        self.0.push((role.to_owned(), end));
    }

    /// Has `act` called when a person types an escape sequence at whichever end is a terminal.
    pub fn on_escape(&self, act: impl FnMut(Escape) + Send + Clone + 'static) {
        self.0.iter().for_each(|(_, end)| end.on_escape(act.clone()));
    }

    /// What is open, by role, as the configuration writes it, pseudo-terminals with their path.
    pub fn list(&self) -> impl Iterator<Item = (&str, String)> {
        self.0.iter().map(|(role, end)| (role.as_str(), end.to_string()))
    }
}

impl Drop for Ends {
    /// Whoever still holds an end, the terminal is given back when the run that opened it is over.
    fn drop(&mut self) {
        if self.0.iter().any(|(_, end)| end.is_terminal()) {
            terminal::restore();
        }
    }
}
