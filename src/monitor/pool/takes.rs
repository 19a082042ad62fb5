//! [`Takes`]: what clients have asked a pool for, until each has its answer.

use std::collections::{BTreeSet, VecDeque};

use super::names::Names;
use crate::api::protocol::Taken;

/// A client's request for machines.
#[derive(Debug)]
pub(super) struct Take {
    pub client: u32,
    pub names: Names,
    /// See [`super::Wanted`].
    pub renew: bool,
    /// They end with the client's connection.
    pub tied: bool,
    /// Machines without a spare so far.
    left: u32,
    /// Spares that have not said yet that they run.
    awaited: u32,
    /// Names in the order in which they were given.
    given: Vec<String>,
    /// Those of machines that run.
    ran: BTreeSet<String>,
    /// Of several reasons the first is told.
    error: Option<String>,
}

impl Take {
    /// For `count` machines that are called by `names`, which are to `renew` themselves, and `tied` to the client.
    pub fn new(client: u32, names: Names, count: u32, (renew, tied): (bool, bool)) -> Self {
        let (given, ran) = (Vec::new(), BTreeSet::new());
        Self { client, names, renew, tied, left: count, awaited: 0, given, ran, error: None }
    }

    /// A spare has its next name, and is to run.
    pub fn gave(&mut self, name: &str) {
        self.given.push(name.to_owned());
        self.left = self.left.saturating_sub(1);
        self.awaited += 1;
    }

    /// It gets no more, and `why`.
    pub fn end(&mut self, why: &str) {
        self.fail(why);
        self.left = 0;
    }

    fn fail(&mut self, why: &str) {
        self.error.get_or_insert_with(|| why.to_owned());
    }

    fn is_done(&self) -> bool {
        self.left == 0 && self.awaited == 0
    }

    fn answer(mut self) -> (u32, Taken) {
        self.given.retain(|name| self.ran.contains(name));
        (self.client, Taken { names: self.given, error: self.error })
    }
}

/// In the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Takes(VecDeque<Take>);

impl Takes {
    /// # Errors
    /// In words: the client has asked already.
    pub fn add(&mut self, take: Take) -> Result<(), String> {
        if self.0.iter().any(|other| other.client == take.client) {
            return Err("a request of this client's is under way".to_owned());
        }
        self.0.push_back(take);
        Ok(())
    }

    /// Whose turn it is.
    pub fn first(&mut self) -> Option<&mut Take> {
        self.0.iter_mut().find(|take| take.left > 0)
    }

    /// Machines that are still to be given.
    pub fn wanted(&self) -> usize {
        self.0.iter().map(|take| take.left as usize).sum()
    }

    /// The client is gone.
    pub fn cut_off(&mut self, client: u32) {
        self.0.iter_mut().filter(|take| take.client == client).for_each(|take| take.left = 0);
    }

    /// What became of the machine that was given to `client` as `name`.
    pub fn became(&mut self, client: u32, name: String, result: Result<(), &str>) {
        let Some(take) = self.0.iter_mut().find(|take| take.client == client) else { return };
        take.awaited = take.awaited.saturating_sub(1);
        match result {
            Ok(()) => _ = take.ran.insert(name),
            Err(why) => take.fail(&format!("{name}: {why}")),
        }
    }

    /// Removes those that are owed nothing more. Whom to answer, and what.
    pub fn done(&mut self) -> Vec<(u32, Taken)> {
        let (done, open): (VecDeque<_>, _) = std::mem::take(&mut self.0).into_iter().partition(Take::is_done);
        self.0 = open;
        done.into_iter().map(Take::answer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(client: u32, count: u32) -> Take {
        Take::new(client, Names::of("m".to_owned(), count).unwrap(), count, (false, false))
    }

    #[test]
    fn a_client_hears_of_those_that_run_in_the_order_of_their_names() {
        let mut takes = Takes::default();
        takes.add(of(7, 2)).unwrap();
        takes.add(of(8, 3)).unwrap();
        assert!(takes.add(of(8, 1)).is_err());
        assert_eq!((takes.wanted(), takes.first().unwrap().client), (5, 7));
        takes.first().unwrap().gave("a");
        takes.first().unwrap().gave("b");
        takes.became(7, "b".to_owned(), Ok(()));
        assert_eq!((takes.done(), takes.first().unwrap().client), (vec![], 8));
        takes.became(7, "a".to_owned(), Ok(()));
        let names = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(takes.done(), [(7, Taken { names, error: None })]);

        takes.first().unwrap().gave("c");
        takes.first().unwrap().end("no more");
        takes.became(8, "c".to_owned(), Err("it burnt"));
        let error = Some("no more".to_owned());
        assert_eq!(takes.done(), [(8, Taken { names: vec![], error })]);
        // Nobody is left to hear of what such a client was given.
        takes.add(of(9, 2)).unwrap();
        takes.cut_off(9);
        assert_eq!((takes.wanted(), takes.done().len()), (0, 1));
        takes.became(9, "d".to_owned(), Ok(()));
    }
}
