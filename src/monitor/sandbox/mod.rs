//! The jail: what a thread of this process may ask of the host's kernel from the moment on when a guest could have taken it over.
//!
//! A guest that breaks out of the monitor finds a process that may not start another, open a file, make a connection or touch
//! another process, unless the machine's configuration needs just that. [`begin`] is called once, while the process has one thread; from
//! then on [`threads::spawn`](crate::threads::spawn) has each thread [enter] with its role's list of system calls before it does anything,
//! and the thread of the first vCPU, and the one that built the machine, enter before the guest runs. There is no way back.
//!
//! Threads share their memory, so whoever owns one can have the others work for it: what holds is what all lists together allow. That
//! they differ keeps mistakes small, and tells what each role is for.
//!
//! What the process may take of the host's CPU time, memory and disks is the kernel's to limit, by its cgroup: [`limits`].

mod calls;
mod files;
mod inherited;
pub mod limits;
mod namespaces;
mod process;
mod refused;
mod seccomp;

use std::io;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bitflags::bitflags;
use rustix::io::Errno;

use crate::config::{
    CharTarget, Net, NetTarget, OnPanic, OnReboot, ParseError, Plug, Share, ShareFrom, VmConfig,
};
use crate::threads::Role;

pub use files::Grant;
pub use limits::Limits;
use namespaces::Root;
pub use namespaces::alone;
pub(crate) use process::close_all_but;
pub use process::{User, owner_of_files, started_by};
pub use refused::Refused;

bitflags! {
    /// What a machine needs of the host while it runs, beyond what all machines do. The lists of calls are made from it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Needs: u32 {
        /// Connections of the guest's to the network (`net=user`).
        const INTERNET = 1;
        /// Connections to unix sockets: the guest's to programs on this host (`vsock`), a segment's (`net=switch`), a back end's.
        const UNIX = 1 << 1;
        /// Rings that the host's kernel serves (`vhost=on`).
        const VHOST = 1 << 2;
        /// A tap or macvtap.
        const TAP = 1 << 3;
        /// Another VM after the guest's resets.
        const REBOOTS = 1 << 4;
        /// Files that begin anew when they are full.
        const ROTATES = 1 << 5;
        /// An image, and threads for it.
        const DISK = 1 << 6;
        /// Connections to the guest by the host's own sockets (`vsock` with `vhost=on`).
        const HOST_VSOCK = 1 << 7;
        /// Segments of this user's (`net=switch`).
        const SWITCH = 1 << 8;
        /// vCPUs with CPUs of their own, which their threads choose when they begin.
        const PINS = 1 << 9;
        /// Something that is opened before the guest runs, and that no jail lets be opened later.
        const OUTSIDE = 1 << 10;
        /// Files in a folder of the host's (`share`).
        const SHARE = 1 << 11;
    }
}

impl Needs {
    /// Of the machine that `config` describes.
    pub fn of(config: &VmConfig) -> Self {
        let mut needs: Self = config.net.iter().map(Self::of_net).collect();
        match &config.vsock {
            // Its agent is called from here, too, when it goes on elsewhere.
            Some(vsock) if vsock.vhost => needs |= Self::VHOST | Self::HOST_VSOCK | Self::UNIX,
            Some(_) => needs |= Self::UNIX,
            None => {}
        }
        needs |= config.share.iter().map(Self::of_share).collect();
        if config.on_reboot == OnReboot::Reset || config.on_panic() == OnPanic::Reset {
            needs |= Self::REBOOTS;
        }
        let console = config.console();
        let ends = [&console, &config.serial].into_iter().chain(config.port.iter().map(|port| &port.to));
        // The agent of a guest may be behind a port.
        if config.port.iter().any(|port| matches!(port.to, CharTarget::Socket(_))) {
            needs |= Self::UNIX;
        }
        let files = ends.filter_map(|end| if let CharTarget::File(file) = end { Some(file) } else { None });
        if files.chain(&config.net_dump).any(|file| file.max.is_some()) {
            needs |= Self::ROTATES;
        }
        needs
    }

    /// Of the network device that `config` describes.
    pub fn of_net(config: &Net) -> Self {
        let needs = match &config.to {
            NetTarget::User(_) => Self::INTERNET,
            NetTarget::Switch(_) => Self::UNIX | Self::SWITCH,
            NetTarget::VhostUser(_) => Self::UNIX,
            // A descriptor may be a tap's.
            NetTarget::Tap(_) | NetTarget::Macvtap(_) | NetTarget::Fd(_) => Self::TAP,
            NetTarget::Socket(_) => Self::empty(),
        };
        if config.vhost { needs | Self::VHOST } else { needs }
    }

    /// Of the shared folder that `config` describes.
    pub fn of_share(config: &Share) -> Self {
        match config.from {
            ShareFrom::Path(_) => Self::SHARE,
            ShareFrom::VhostUser(_) => Self::UNIX,
        }
    }

    /// Of a device that comes while the machine runs.
    pub fn of_plug(plug: &Plug) -> Self {
        match plug {
            // The house has what a disk needs.
            Plug::Disk(_) => Self::empty(),
            Plug::Net(net) => match &net.to {
                NetTarget::User(_) | NetTarget::Switch(_) | NetTarget::Fd(_) if !net.vhost => {
                    Self::of_net(net)
                }
                _ => Self::OUTSIDE,
            },
        }
    }
}

/// Whether there is to be a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// None.
    #[default]
    Off,
    /// The strongest that this host has.
    Auto,
    /// All of it, or nothing runs.
    Strict,
}

impl FromStr for Mode {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "strict" => Ok(Self::Strict),
            _ => Err(ParseError::hinted(format!("unknown sandbox mode {text:?}"), "use auto, strict or off")),
        }
    }
}

/// The jail of a process.
#[derive(Debug, Clone)]
pub struct Jail {
    /// Whether there is one.
    pub mode: Mode,
    /// A call that is on no list fails with EPERM, and is told of: to find out what is missing. Otherwise it ends the process.
    pub goes_on: bool,
    /// Who its threads are to be, if root starts it. Otherwise somebody whom nobody else is.
    pub user: Option<User>,
    /// What the lists are made from.
    pub needs: Needs,
    /// What may be named of the host's files.
    pub grants: Vec<Grant>,
    /// Says that a call was refused, and gives the exit status of the process, which ends with that.
    pub refused: fn(&Refused) -> u8,
}

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct Error {
    what: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
    hint: &'static str,
}

impl Error {
    fn of<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
        hint: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self { what, source: source.into(), hint }
    }

    /// What to try.
    pub fn hint(&self) -> &'static str {
        self.hint
    }
}

const FILTERS: &str =
    "it needs a kernel with CONFIG_SECCOMP_FILTER; without the sandbox, the guest has to be trusted";
const USER: &str = "it needs a user namespace that has more users than a container's, and CAP_SETUID, CAP_SETGID and CAP_SETPCAP; \
                    `sandbox=auto` runs as root without privileges";
const ROOT: &str = "put the output or socket into a folder of its own, and share a folder below /; for a core, start in another folder \
                    than /; `sandbox=off` confines nothing";
const FOLDER: &str = "name a file in a folder of that user's, or drop its limit";
const PROC: &str = "it needs /proc";
const NAMESPACES: &str = "most containers, and users under some AppArmor and sysctl settings, may not create namespaces; \
                          `sandbox=auto` runs without";
const LANDLOCK: &str =
    "it needs Linux 6.12 with landlock among its security modules; `sandbox=auto` runs without";

static JAIL: OnceLock<Jail> = OnceLock::new();
/// What [`close`] has made for [`lock`].
static PREPARED: Mutex<Option<Root>> = Mutex::new(None);

/// From now on this process's threads enter `jail`. To be called while there is one, before anything of a guest's is read. A refused
/// call is the end of the process, which `end` brings about on the thread that made it.
///
/// # Errors
/// The kernel has no such thing, or refuses.
pub fn begin(jail: Jail, end: impl Fn(&Refused) + Send + Sync + 'static) -> Result<(), Error> {
    if jail.mode == Mode::Off {
        return Ok(());
    }
    if let Some(grant) = jail.grants.iter().find(|grant| grant.is_all()) {
        let what = format!("it would have all of {}", grant.path().display());
        return Err(Error::of("confine a run that uses a file directly in the root folder", ROOT)(what));
    }
    process::no_new_privileges(jail.user).map_err(Error::of("forbid new privileges", FILTERS))?;
    if let Some(grant) = jail.grants.iter().find(|grant| jail.user.is_some_and(|user| !user.may_use(grant))) {
        let what = format!("{} is not theirs to write to", grant.path().display());
        return Err(Error::of("rotate an output as that user", FOLDER)(what));
    }
    if (jail.mode == Mode::Strict && started_by().is_root() || jail.user.is_some()) && !process::has_user() {
        return Err(Error::of("become a user of its own", USER)(Errno::PERM));
    }
    inherited::note().map_err(Error::of("list open files", PROC))?;
    inherited::forget_environment();
    let left = namespaces::leave().map_err(Error::of("create namespaces", NAMESPACES))?;
    had(jail.mode, "create namespaces", "namespaces", left.map_err(io::Error::from))?;
    refused::listen(end).map_err(Error::of("listen for refused system calls", FILTERS))?;
    // The first is all that there is.
    let _ = JAIL.set(jail);
    Ok(())
}

/// Has the jail, if there is one, be ready to hide all files but its grants and `more`: to be called before a thread [enters](enter), and
/// when all of them are there. The calling thread, and those that it starts from now on, get no capability by running a program.
///
/// # Errors
/// The kernel has no such thing, and the jail is to be strict; or refuses.
pub fn close(more: impl IntoIterator<Item = Grant>) -> Result<(), Error> {
    let Some(jail) = JAIL.get() else { return Ok(()) };
    process::empty_bounding_set().map_err(Error::of("drop privileges", FILTERS))?;
    let grants: Vec<_> = jail.grants.iter().cloned().chain(more).collect();
    files::close(&grants, jail.mode).map_err(Error::of("restrict access to files", LANDLOCK))?;
    let apart = namespaces::set_apart();
    had(jail.mode, "create namespaces", "namespaces but that of mounts", apart)?;
    *prepared() = had_root(jail.mode, Root::new(&grants))?.flatten();
    Ok(())
}

fn prepared() -> MutexGuard<'static, Option<Root>> {
    PREPARED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What came of `trying` to do `what`. On a host that refuses the process goes on without it, which is `less`, unless the jail is to be
/// strict; not so for want of descriptors, which it can be given.
fn had<T>(mode: Mode, what: &'static str, less: &str, trying: io::Result<T>) -> Result<Option<T>, Error> {
    trying.map(Some).or_else(|error| without(mode, what, less, error).map(|()| None))
}

#[cold]
fn without(mode: Mode, what: &'static str, less: &str, error: io::Error) -> Result<(), Error> {
    if mode == Mode::Strict || Errno::from_io_error(&error) == Some(Errno::MFILE) {
        return Err(Error::of(what, NAMESPACES)(error));
    }
    log::info!("sandbox: running without {less}: {error}");
    Ok(())
}

fn had_root<T>(mode: Mode, trying: io::Result<T>) -> Result<Option<T>, Error> {
    had(mode, "change to an empty root", "a root of its own", trying)
}

/// The calling thread, which has set all up, enters, and has all others find nothing but the jail's grants from now on. All that is to be
/// opened is open.
///
/// # Errors
/// The kernel refuses.
pub fn lock(role: &Role) -> Result<(), Error> {
    let Some(jail) = JAIL.get() else { return Ok(()) };
    inherited::close();
    process::limit().map_err(Error::of("lower resource limits", PROC))?;
    let prepared = prepared().take();
    if let Some(prepared) = prepared {
        had_root(jail.mode, prepared.enter())?;
    }
    enter(role)
}

/// The calling thread, which is for `role`, asks the host's kernel for nothing else from now on. Nothing happens if there is no jail.
///
/// # Errors
/// The kernel refuses: the thread must do nothing for a guest.
pub fn enter(role: &Role) -> Result<(), Error> {
    let Some(jail) = JAIL.get() else { return Ok(()) };
    files::enter().map_err(Error::of("restrict access to files", LANDLOCK))?;
    had(jail.mode, "share namespaces", "namespaces on this thread but that of mounts", namespaces::follow())?;
    process::drop_privileges().map_err(Error::of("drop privileges", FILTERS))?;
    seccomp::apply(role, jail.needs).map_err(Error::of("limit system calls", FILTERS))
}

/// Whether the jail of this process has what these `needs` are for.
pub fn allows(needs: Needs) -> bool {
    JAIL.get().is_none_or(|jail| jail.needs.contains(needs))
}

/// What the jail of this process is made of, for people.
pub fn layers() -> String {
    if JAIL.get().is_none() {
        return "off".to_owned();
    }
    let user = process::has_user().then_some("own user");
    let layers = [Some("seccomp"), files::layer(), namespaces::layer(), Some("no capabilities"), user];
    layers.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
