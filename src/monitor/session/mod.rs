//! [`Session`]: a run of a machine from start to end, over its reboots.
//!
//! Owns what outlives a machine: the name and control socket, the signals, what its devices have on the host, the recorder, the
//! control thread. The command line, the labs, the bench and whatever else runs machines drive it; it knows none of
//! them.

mod defect;
mod files;
mod running;
mod tie;

use std::error;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::api::registry::{Entry, Registry};
use crate::api::server::Server;
use crate::api::signals::Signals;
use crate::api::{self, Control, Pty, Viewers};
use crate::backends::Backends;
use crate::chardev::{Endpoint, Ends};
use crate::config::{OnPanic, OnReboot, VmConfig};
use crate::event_loop::{EventLoop, Registration};
use crate::kvm::Kvm;
use crate::machine::{self, Machine, Origin, Outcome, Shell};
use crate::memory;
use crate::net::switch;
use crate::pool::{Spare, Wanted};
use crate::recorder::Recorder;
use crate::runtime_dir;
use crate::sandbox::{self, Grant, Jail, Needs};
use crate::threads::{OrdersElsewhere, Role};
use crate::vsock::Dialer;
use running::{Asked, Running};
use tie::Tie;

pub use defect::end_on_panic;

/// Why a session could not be, or ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine could not be built or run.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// It cannot have its name, or be controlled.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// It stood ready, and nobody wants it any more.
    #[error("nobody has taken it")]
    Unwanted,
    /// A guest could do more than it should.
    #[error("there is no sandbox")]
    Sandbox(#[from] sandbox::Error),
    /// An [`Observer`] refused.
    #[error(transparent)]
    Observer(Box<dyn error::Error + Send + Sync>),
}

/// Sees each machine of a session: the first, and those that reboots make.
pub trait Observer {
    /// A machine is loaded and runs next.
    ///
    /// # Errors
    /// The machine is not run, and the session is over.
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn error::Error + Send + Sync>>;

    /// It stood ready, and now runs as it was `wanted`.
    ///
    /// # Errors
    /// The machine is killed, and the session is over.
    fn taken(&mut self, wanted: &Wanted) -> Result<(), Box<dyn error::Error + Send + Sync>> {
        let _ = wanted;
        Ok(())
    }

    /// Its run is over.
    fn ended(&mut self, end: &End<'_>);
}

/// One machine of a session, before it runs.
pub struct Built<'a> {
    /// It.
    pub machine: &'a mut Machine,
    /// What leads into it.
    pub ptys: &'a [Pty],
    /// The host ends of its consoles.
    pub ends: &'a Ends,
    /// The way to its guest, if it has a socket device whose connections are ours.
    pub dialer: Option<Dialer>,
}

/// The end of one machine of a session.
pub struct End<'a> {
    /// How it ended.
    pub outcome: &'a Result<Outcome, machine::Error>,
    /// There will be another machine.
    pub reboots: bool,
    /// Whether the session was told to end. Long work asks now and then.
    pub interrupted: &'a dyn Fn() -> bool,
}

/// Who keeps how a run ended, beyond its process.
pub trait Keeper: fmt::Debug + Send + Sync {
    /// This process ends with exit status `status`, and its owner has no say any more. On the control thread.
    fn ends(&self, status: u8);
    /// The same on any thread, in the middle of whatever it did: one that may name no file, and wait for nothing.
    fn ends_at_once(&self, status: u8);
}

/// How a session is controlled from outside.
#[derive(Debug)]
pub struct Controls {
    /// From a stop to a hard end, unless the stop says otherwise.
    pub stop_timeout: Duration,
    /// SIGTERM, SIGINT and SIGHUP are orders to end; else they are the owner's.
    pub takes_signals: bool,
    /// Adds up what the machine does while a viewer is attached.
    pub viewers: Arc<dyn Viewers>,
    /// Called when the control thread starts, before it: for threads of the owner's, which shorter runs do without.
    pub serving: fn(),
    /// Called on the thread of [`Session::run`] when a machine lasts: for what shorter runs, and the start, do without.
    pub lasting: fn(),
    /// Says that memory of the machine is lost, and gives the exit status of this process, which ends with that.
    pub lost: fn(memory::Error) -> u8,
    /// The exit status of this process if it has to be ended because a killed machine does not end by itself.
    pub killed_status: u8,
    /// Keeps how the run ended, if the process has to be ended so.
    pub keeper: Option<Arc<dyn Keeper>>,
    /// Files that the owner writes during the run, beside the machine's own.
    pub outputs: Vec<PathBuf>,
    /// The configuration before it was fitted to this process. Snapshots record it.
    pub original: VmConfig,
    /// The first machine stands ready until its pool wants it, and has no other name until then.
    pub spare: Option<Spare>,
    /// What the threads of this process are confined to, before the guest runs.
    pub jail: Jail,
}

struct Controlled {
    // Dropped first: a signal that has waited meets its handler.
    _orders: OrdersElsewhere,
    server: Option<Server>,
    /// Until there is a server: whoever connects or signals before is kept waiting, not lost.
    unserved: Option<(Entry, Signals)>,
    /// With what it ends.
    tie: Option<Registration>,
    /// Until the first machine is wanted.
    spare: Option<Spare>,
    running: Arc<Running>,
    stop_timeout: Duration,
    serving: fn(),
    lasting: fn(),
    outputs: Vec<PathBuf>,
}

/// See the module's text.
pub struct Session<'a> {
    config: &'a VmConfig,
    recorder: Arc<Recorder>,
    /// What the first machine goes on from; none if it begins as the configuration says.
    saved: Option<Origin>,
    /// What the others begin with, once it was open.
    boot: Option<Origin>,
    /// Once a machine was made with it.
    kvm: Option<Kvm>,
    /// That of the first machine, if it is begun already.
    shell: Option<Result<Shell, machine::Error>>,
    // Dropped in this order: the name is free before anybody learns of the end, and all of them are handlers of the loop.
    controlled: Option<Controlled>,
    backends: Backends,
    events: EventLoop,
    /// How often it was told to end before its last machine ended.
    orders: u32,
    /// The thread that runs it is in the jail.
    is_inside: bool,
}

impl<'a> Session<'a> {
    /// A private session of the machine that `config` describes: no name, no socket, and signals are left alone.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn private(config: &'a VmConfig, recorder: Arc<Recorder>) -> Result<Self, Error> {
        let events = EventLoop::new().map_err(api::Error::Thread)?;
        let backends = Backends::new(events.clone());
        Ok(Self {
            config,
            recorder,
            saved: None,
            boot: None,
            kvm: None,
            shell: None,
            backends,
            controlled: None,
            events,
            orders: 0,
            is_inside: false,
        })
    }

    /// A session under the configuration's name, or a new one, that signals and clients of its control socket reach from now on. Its
    /// first machine begins as the configuration says, or goes on from `saved`.
    ///
    /// # Errors
    /// The name is taken; the host is out of descriptors.
    pub fn controlled(
        config: &'a VmConfig,
        saved: Option<Origin>,
        recorder: Arc<Recorder>,
        mut controls: Controls,
    ) -> Result<Self, Error> {
        // Before anything that a signal would have to undo, and before there is another thread.
        let orders = OrdersElsewhere::from_now_on();
        let refused = defect::end_on_refused(controls.jail.refused, controls.keeper.clone());
        controls.jail.grants.extend(Grant::of(config));
        sandbox::begin(controls.jail, refused)?;
        if matches!(saved, Some(Origin::Saved { .. })) {
            defect::end_on_lost_memory(controls.lost, controls.keeper.clone());
        }
        let shell = Shell::early(config, saved.as_ref(), &recorder);
        let signals = if controls.takes_signals { Signals::take() } else { Signals::take_no_orders() };
        let signals = signals.map_err(api::Error::Thread)?;
        let Controls {
            stop_timeout,
            viewers,
            serving,
            lasting,
            killed_status,
            keeper,
            outputs,
            original,
            spare,
            ..
        } = controls;
        let name = spare.as_ref().map(Spare::name).or(config.name.as_deref());
        let entry = Registry::of_user().register(name)?;
        log::info!("{}: control socket registered", entry.name());
        let needs = Needs::of(config);
        let place = needs.contains(Needs::UNIX).then(|| entry.make_place()).transpose()?;
        if needs.contains(Needs::SWITCH) {
            // Where it is while there is no segment, too.
            let path = switch::segments(entry.folder());
            runtime_dir::make_private(&path).map_err(|source| api::Error::Directory { path, source })?;
        }
        let vsock = entry.vsock();
        let running =
            Arc::new(Running::new(entry.name(), config, original, &vsock, viewers, killed_status, keeper));
        let unserved = Some((entry, signals));
        let controlled = Some(Controlled {
            _orders: orders,
            server: None,
            unserved,
            tie: None,
            spare,
            running,
            stop_timeout,
            serving,
            lasting,
            outputs,
        });
        let mut session = Self::private(config, recorder)?;
        (session.controlled, session.shell, session.saved) = (controlled, shell, saved);
        if let Some(place) = place {
            session.backends.doors.lie_in(place);
        }
        Ok(session)
    }

    /// Gives `role` (`console`, `serial`, `port NAME`) a host end that is open already, whatever the configuration says.
    pub fn put(&mut self, role: &str, end: Endpoint) {
        self.backends.ends.put(role, end);
    }

    /// Whether the session was told to end once more since its last machine ended: for what its owner still has to do then.
    pub fn interrupted(&self) -> bool {
        self.orders() > self.orders
    }

    /// The name under which it is controlled.
    pub fn name(&self) -> Option<&str> {
        self.controlled.as_ref().map(|controlled| controlled.running.name())
    }

    /// Tells those who wait for the end of the run that this process will exit with `status`. They hear it when the session is
    /// dropped.
    pub fn will_exit(&self, status: u8) {
        if let Some(controlled) = &self.controlled {
            controlled.running.will_exit(status);
        }
    }

    fn orders(&self) -> u32 {
        self.controlled.as_ref().map_or(0, |controlled| controlled.running.orders())
    }

    /// Runs the machine, and again after each reboot if the configuration wants that. Signals and clients are served until the
    /// session is dropped.
    ///
    /// # Errors
    /// [`Error`]
    pub fn run(&mut self, observers: &mut [&mut dyn Observer]) -> Result<Outcome, Error> {
        let result = self.run_all(observers);
        if let Some(controlled) = &self.controlled {
            controlled.running.over();
        }
        // The terminal is given back: Ctrl-C is a signal again.
        self.backends = Backends::new(self.events.clone());
        result
    }

    /// For an owner with work after the run that may take its time: orders to end are heard meanwhile, and
    /// [`Session::interrupted`] tells of them.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn linger(&mut self) -> Result<(), Error> {
        self.serve()
    }

    fn run_all(&mut self, observers: &mut [&mut dyn Observer]) -> Result<Outcome, Error> {
        if let Some(Controlled { unserved: Some((entry, _)), .. }) = &self.controlled {
            let needs = Needs::of(self.config);
            // Who can connect to sockets reaches no other machine's.
            let mut grants = vec![match needs.contains(Needs::UNIX) {
                true => Grant::Removal(entry.place()),
                false => Grant::Removal(entry.folder().to_owned()),
            }];
            if needs.contains(Needs::SWITCH) {
                grants.push(Grant::Folder(switch::segments(entry.folder())));
            }
            sandbox::close(grants)?;
        }
        // Other starts do without the thread until they last. One that stands ready first is its pool's affair until then.
        let outputs = self.controlled.as_ref().map_or(&[][..], |controlled| &controlled.outputs);
        let spare = self.controlled.as_ref().and_then(|controlled| controlled.spare.clone());
        let reads_memory = self.saved.as_ref().is_some_and(|origin| origin.reads_memory(self.config));
        if spare.is_none() && (reads_memory || files::may_hang(self.config, outputs)) {
            self.serve()?;
        }
        loop {
            let mut machine = self.load()?;
            let ptys = self.ptys();
            let (ends, dialer) = (&self.backends.ends, self.backends.doors.dialer());
            let mut built = Built { machine: &mut machine, ptys: &ptys, ends, dialer };
            for observer in &mut *observers {
                observer.built(&mut built).map_err(Error::Observer)?;
            }
            // All is open, and nothing of the guest's has run.
            if self.controlled.is_some() && !std::mem::replace(&mut self.is_inside, true) {
                sandbox::lock(&Role::Main)?;
            }
            let wanted = match self.controlled.as_mut().and_then(|controlled| controlled.spare.take()) {
                Some(spare) => Some(self.stand(&spare, &mut machine)?),
                None => None,
            };
            let running = self.controlled.as_ref().map(|controlled| controlled.running.clone());
            if let Some(running) = &running {
                running.built(machine.handle(), ptys);
            }
            let (mut refused, mut served) = (None, Ok(()));
            if let Some((wanted, spare)) = wanted.zip(spare.as_ref()) {
                // Without its pool it runs all the same. Who has it for a command calls its agent next, and what is left to do here can be
                // done meanwhile; others expect to find it whole.
                if wanted.tied {
                    _ = spare.runs();
                }
                if machine.start().is_ok() {
                    match observers.iter_mut().try_for_each(|observer| observer.taken(&wanted)) {
                        Ok(()) => {
                            if !wanted.tied {
                                _ = spare.runs();
                            }
                            // It has long been more than a short run.
                            served = self.serve();
                        }
                        Err(error) => {
                            machine.handle().kill();
                            refused = Some(Error::Observer(error));
                        }
                    }
                }
            }
            let mut outcome = machine.run(&mut || {
                served = self.serve();
                self.controlled.iter().for_each(|controlled| (controlled.lasting)());
            });
            let asked = running.map_or(Asked::Nothing, |running| running.ended());
            let again = match outcome {
                Ok(Outcome::Reset) => self.config.on_reboot == OnReboot::Reset,
                Ok(Outcome::Panic(_)) => self.config.on_panic() == OnPanic::Reset,
                _ => false,
            };
            let reboots = again && asked == Asked::Nothing && served.is_ok();
            // The order came when this machine had just ended by itself: it ends what would follow.
            if again && asked == Asked::Kill {
                outcome = Ok(Outcome::Killed);
            }
            self.orders = self.orders();
            let end = End { outcome: &outcome, reboots, interrupted: &|| self.interrupted() };
            for observer in &mut *observers {
                observer.ended(&end);
            }
            if let Some(error) = refused {
                return Err(error);
            }
            // Why nobody serves says more than that the machine was killed for want of it.
            served?;
            if !reboots {
                return Ok(outcome?);
            }
            // Each of its lives may be too short for it.
            self.serve()?;
            let why = match outcome {
                Ok(Outcome::Panic(_)) => "the guest's kernel panicked",
                _ => "the guest rebooted",
            };
            log::info!("{why}: starting it again");
        }
    }

    /// The next machine, ready to run. It names no file that was opened for an earlier one.
    fn load(&mut self) -> Result<Machine, machine::Error> {
        self.config.validate()?;
        let saved = self.saved.take();
        let origin = match (&saved, &mut self.boot) {
            (Some(saved), boot) => {
                // What a reset starts from may be missing now, and is missed then.
                if Needs::of(self.config).contains(Needs::REBOOTS) {
                    *boot = Origin::of(self.config).ok();
                }
                saved
            }
            (None, Some(boot)) => boot,
            (None, boot @ None) => boot.insert(Origin::of(self.config)?),
        };
        let shell = match self.shell.take() {
            Some(shell) => shell?,
            None => Shell::begin(self.config, Some(origin), self.kvm.clone(), &self.recorder)?,
        };
        let machine = machine::load(self.config, origin, shell, &mut self.backends, &self.recorder)?;
        self.kvm = Some(machine.kvm());
        Ok(machine)
    }

    /// Waits until `machine`, the one of `spare`, is wanted, and takes the name by which it is.
    fn stand(&mut self, spare: &Spare, machine: &mut Machine) -> Result<Wanted, Error> {
        machine.take_seats()?;
        machine.map_ahead();
        let Some(Controlled { unserved: Some((entry, signals)), tie, running, lasting, .. }) =
            &mut self.controlled
        else {
            return Err(Error::Unwanted);
        };
        lasting();
        let (wanted, connection) = spare.wait(signals).ok_or(Error::Unwanted)?;
        // It listens there already.
        entry.renamed(&wanted.name);
        if let Some(running) = Arc::get_mut(running) {
            running.renamed(&wanted.name, &entry.vsock(), self.config);
        }
        if let Some(connection) = connection {
            let added = self.events.add(Tie::new(connection, running.clone()));
            *tie = Some(added.map_err(api::Error::Thread)?);
        }
        Ok(wanted)
    }

    /// Has orders, terminal and serial input served from now on.
    fn serve(&mut self) -> Result<(), Error> {
        let started = self.start_server();
        if let (Err(_), Some(controlled)) = (&started, &self.controlled) {
            controlled.running.kill();
        }
        started
    }

    fn start_server(&mut self) -> Result<(), Error> {
        if let Some(controlled) = &mut self.controlled
            && let Some((entry, signals)) = controlled.unserved.take()
        {
            (controlled.serving)();
            let (running, timeout) = (controlled.running.clone(), controlled.stop_timeout);
            controlled.server = Some(Server::start(&self.events, entry, Some(signals), running, timeout)?);
        }
        Ok(self.events.run(Role::Control).map_err(api::Error::Thread)?)
    }

    fn ptys(&self) -> Vec<Pty> {
        let pty = |(role, place): (&str, String)| {
            let path = place.strip_prefix("pty=")?.into();
            Some(Pty { device: role.to_owned(), path })
        };
        self.backends.ends.list().filter_map(pty).collect()
    }
}
