//! [`Server`]: what serves the rings of a port's pairs of queues, if not the monitor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::{HEADER, Head, Interfaces, Link, Offloads, Vhost, Wire};
use crate::event_loop::Event;
use crate::memory::{Buffers, GuestRam, Slices};
use crate::vhost::{FrontEnd, Ring};

/// Who moves the frames between the guest's rings and the links.
#[derive(Debug, Clone, Default)]
pub enum Server {
    /// The device, by [`Wire`].
    #[default]
    Monitor,
    /// The host's kernel.
    Kernel {
        /// One for each pair.
        pairs: Vec<Arc<Vhost>>,
        /// Tell when a link may have lost its other end.
        interfaces: Arc<Interfaces>,
    },
    /// Another process, whose frames go where it likes (vhost-user).
    BackEnd(Arc<FrontEnd>),
}

impl Server {
    /// How many pairs are served by others.
    pub fn pairs(&self) -> usize {
        match self {
            Self::Monitor => 0,
            Self::Kernel { pairs, .. } => pairs.len(),
            Self::BackEnd(back_end) => back_end.broken().len(),
        }
    }

    /// Of each pair that is served by others, what is readable when one of its rings has been found broken.
    pub fn broken(&self) -> Vec<&Event> {
        match self {
            Self::Monitor => Vec::new(),
            Self::Kernel { pairs, .. } => pairs.iter().map(|vhost| vhost.broken()).collect(),
            Self::BackEnd(back_end) => back_end.broken().iter().collect(),
        }
    }

    /// What is readable when a link may have lost its other end, where this process moves no frame that would tell.
    pub fn interfaces(&self) -> Option<&Interfaces> {
        match self {
            Self::Kernel { interfaces, .. } => Some(interfaces),
            _ => None,
        }
    }

    /// Whether it was another process, which is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::BackEnd(back_end) if !back_end.is_up())
    }

    /// Has others begin with `rings`, those of each pair, the receiving one first.
    ///
    /// # Errors
    /// They do not take them. Nothing is served then.
    pub fn start(
        &self,
        ram: &GuestRam,
        features: u64,
        rings: Vec<[Option<Ring<'_>>; 2]>,
        links: &[Link],
    ) -> io::Result<()> {
        match self {
            Self::Monitor => Ok(()),
            Self::Kernel { pairs, .. } => {
                let all = pairs.iter().zip(&rings).zip(links);
                let started =
                    all.map(|((vhost, rings), link)| vhost.start(ram, features, rings, link.as_fd()));
                let started = started.collect::<io::Result<()>>();
                if started.is_err() {
                    self.stop();
                }
                started
            }
            Self::BackEnd(back_end) => {
                let rings = (0..).zip(rings.into_iter().flatten());
                let rings: Vec<_> = rings.filter_map(|(index, ring)| Some((index, ring?))).collect();
                back_end.start(ram, features, &rings)
            }
        }
    }

    /// Takes the rings back. Of each, its index and that of the next available entry.
    pub fn stop(&self) -> Vec<(usize, u16)> {
        match self {
            Self::Monitor => Vec::new(),
            Self::Kernel { pairs, .. } => {
                let mut all = Vec::new();
                for (pair, vhost) in pairs.iter().enumerate() {
                    match vhost.stop() {
                        Ok(next) => all.extend([(2 * pair, next[0]), (2 * pair + 1, next[1])]),
                        Err(error) => log::error!("vhost-net: take a pair of queues back: {error}"),
                    }
                }
                all
            }
            Self::BackEnd(back_end) => {
                back_end.stop().into_iter().map(|(index, next)| (index as usize, next)).collect()
            }
        }
    }
}

/// The link of a pair of queues whose frames this process never sees: it knows only whether the back end is there.
pub struct Unseen {
    pub back_end: Arc<FrontEnd>,
    pub pair: usize,
}

impl Wire for Unseen {
    fn fd(&self) -> BorrowedFd<'_> {
        self.back_end.fd()
    }

    fn is_up(&self) -> bool {
        self.back_end.is_up()
    }

    fn set_attached(&mut self, on: bool) {
        self.back_end.set_enabled(self.pair, on);
    }

    /// Any: the back end's features say which.
    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn send(&mut self, _: &[u8; HEADER], _: &Buffers) -> bool {
        true
    }

    fn receive(&mut self, _: &mut Head, _: &Slices) -> Option<usize> {
        None
    }
}
