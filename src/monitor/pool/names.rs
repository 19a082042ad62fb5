//! What machines that are taken from a pool are called.

use crate::api::registry::Registry;
use crate::api::{self, Error};
use crate::config::{Invalid, check_name};

/// Names for the machines of one request.
#[derive(Debug)]
pub(super) enum Names {
    /// One, and this is it.
    Whole(String),
    /// NAME-1 and so on: the first number that may be free.
    Numbered(String, u64),
}

impl Names {
    /// For `count` machines: `name` is the whole name of one, and the beginning of the names of several.
    ///
    /// # Errors
    /// It cannot be a name.
    pub fn of(name: String, count: u32) -> Result<Self, Invalid> {
        let names = if count == 1 { Self::Whole(name) } else { Self::Numbered(name, 1) };
        check_name(&names.current()).map(|()| names)
    }

    /// The first number that may be free, if they are those of `base`.
    pub fn next_of(&self, base: &str) -> Option<u64> {
        match self {
            Self::Numbered(own, number) if own == base => Some(*number),
            _ => None,
        }
    }

    fn current(&self) -> String {
        match self {
            Self::Whole(name) => name.clone(),
            Self::Numbered(base, number) => format!("{base}-{number}"),
        }
    }

    /// Gives `spare` the next name that is free.
    ///
    /// # Errors
    /// There is none, or the spare is not there.
    pub fn give(&mut self, registry: &Registry, spare: &str) -> Result<String, api::Error> {
        loop {
            let name = self.current();
            let renamed = registry.rename(spare, &name);
            if let Self::Numbered(_, number) = self {
                *number += 1;
            }
            match (renamed, &self) {
                (Err(Error::NameTaken(_)), Self::Numbered(..)) => {}
                (renamed, _) => return renamed.map(|()| name),
            }
        }
    }
}
