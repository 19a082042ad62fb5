//! [`Session`]: a viewer's connection to a virtual machine, with the guest's symbols.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use vmm_command::Failure;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::{Error, Status};
use vmm_trace::live::Sample;
use vmm_trace::live::rates::Rates;
use vmm_trace::symbols::Symbols;

/// A viewer that does not ask for so long may be cut off as one that is gone.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Attached. Dropping it detaches.
pub struct Session {
    client: Client,
    names: Names,
}

/// A machine's status and counters at one moment.
#[derive(Debug)]
pub struct Reading {
    /// What it is.
    pub status: Status,
    /// What it has been doing.
    pub sample: Sample,
}

impl Reading {
    /// Asks for it, and waits for the answer.
    pub fn by(client: &mut Client) -> Result<Self, Error> {
        client.sample().map(|(status, sample)| Self { status, sample })
    }
}

/// What is shown of one interval.
#[derive(Debug, Clone, Serialize)]
pub struct Look {
    /// The virtual machine, at the interval's end.
    #[serde(flatten)]
    pub status: Status,
    /// Its run is being recorded to a file as well.
    pub recorded: bool,
    /// Who looks.
    pub viewers: usize,
    /// Where the names of places are from; or why there are none.
    pub symbols: String,
    /// What happened.
    #[serde(flatten)]
    pub rates: Rates,
}

impl Session {
    /// Attaches to the virtual machine called `name`.
    pub fn attach(name: &str, symbols: Option<Option<PathBuf>>) -> Result<Self, Failure> {
        let names = Names::new(symbols)?;
        let mut client = Client::connect(&Registry::of_user(), name)?;
        // Each vCPU's thread makes itself known at its next exit, which the first sample asks for: that takes a moment.
        let deadline = Instant::now() + Duration::from_millis(200);
        loop {
            let Reading { status, sample } = Reading::by(&mut client)?;
            let known = sample.vcpus.values().filter(|vcpu| vcpu.cpu_ns.is_some()).count();
            if known >= status.cpus as usize || Instant::now() >= deadline {
                return Ok(Self { client, names });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks, and waits for the answer.
    pub fn sample(&mut self) -> Result<Reading, Error> {
        Reading::by(&mut self.client)
    }

    /// The connection and the names, for two threads.
    pub fn split(self) -> (Client, Names) {
        (self.client, self.names)
    }

    /// What happened from `before` to `now`.
    pub fn look(&mut self, before: &Reading, now: &Reading) -> Look {
        self.names.look(before, now)
    }
}

/// The guest's symbols, as far as they are known.
pub struct Names {
    symbols: Symbols,
    /// Given by the user, so they stay, whatever kernel runs.
    given: bool,
    /// Those beside the kernel are wanted. The monitor says which that is, so it takes the user's word to look there.
    beside: bool,
    kernel: Option<PathBuf>,
    /// From which the kernel's place was found out.
    code: Vec<(u64, Vec<u8>)>,
    source: String,
}

impl Names {
    fn new(given: Option<Option<PathBuf>>) -> Result<Self, Failure> {
        let beside = given == Some(None);
        let symbols = given.flatten().map(|path| Symbols::read(&path)).transpose()?;
        let (given, source) = (symbols.is_some(), "no symbols".to_owned());
        let symbols = symbols.unwrap_or_default();
        Ok(Self { symbols, given, beside, kernel: None, code: Vec::new(), source })
    }

    /// What happened from `before` to `now`.
    pub fn look(&mut self, before: &Reading, now: &Reading) -> Look {
        self.update(&now.sample);
        Look {
            status: now.status.clone(),
            recorded: now.sample.recorded,
            viewers: now.sample.viewers,
            symbols: self.source.clone(),
            rates: Rates::between(&before.sample, &now.sample, &self.symbols),
        }
    }

    fn update(&mut self, sample: &Sample) {
        if !self.given && self.kernel != sample.kernel {
            self.kernel.clone_from(&sample.kernel);
            let wanted = self.kernel.as_deref().filter(|_| self.beside);
            self.symbols = wanted.and_then(Symbols::beside).unwrap_or_default();
            self.code.clear();
            self.source = match &self.kernel {
                Some(_) if !self.beside => "no symbols (--symbols)".to_owned(),
                Some(kernel) => format!("no symbols in or beside {}", kernel.display()),
                None => "no symbols".to_owned(),
            };
        }
        let Some(path) = self.symbols.source.clone() else { return };
        if self.code == sample.code && !self.code.is_empty() {
            return;
        }
        self.code.clone_from(&sample.code);
        self.source = path;
        let code = self.code.iter().map(|(address, bytes)| (*address, bytes.as_slice()));
        if let Err(error) = self.symbols.find_shift(None, code) {
            self.source = super::in_short(&error);
            if !self.given {
                self.symbols = Symbols::default();
            }
        }
    }
}
