//! What of the host's files a thread may name (landlock(7)): nothing, but for what a run makes, renames, reads anew or removes when its
//! guest runs already. What is open stays open.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};

use super::{Mode, Needs};
use crate::config::{CharTarget, NetTarget, ShareFrom, VmConfig, Vsock};

/// The kernel's latest rights that are taken away: those of Linux 6.10 and 6.12.
const FILES: ABI = ABI::V5;
const SCOPES: ABI = ABI::V6;

/// What a run needs of the host's files while its guest runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// A file that is read anew now and then, or a folder of such.
    Read(PathBuf),
    /// A folder where files, sockets and folders come, change and go.
    Folder(PathBuf),
    /// A folder where a file begins anew under its name.
    Rotation(PathBuf),
    /// A folder from which the run removes what it has made there.
    Removal(PathBuf),
    /// A folder from which an empty folder goes.
    Departure(PathBuf),
    /// A folder of sockets that are spoken to.
    Sockets(PathBuf),
    /// A device that is opened anew.
    Device(PathBuf),
    /// A folder that the guest has, too: it reads what is there, and, if it is to, changes it.
    Share(PathBuf, bool),
}

impl Grant {
    /// Those of the machine that `config` describes.
    pub fn of(config: &VmConfig) -> Vec<Self> {
        // What the kernel knows of this process: which pages are touched, and what its threads take.
        let mut grants = vec![Self::Read("/proc/self".into()), Self::Read("/proc/cpuinfo".into())];
        if Needs::of(config).contains(Needs::INTERNET) {
            grants.push(Self::resolvers());
        }
        let console = config.console();
        let ends = [&console, &config.serial].into_iter().chain(config.port.iter().map(|port| &port.to));
        for end in ends {
            match end {
                CharTarget::File(file) if file.max.is_some() => grants.push(Self::rotation(&file.path)),
                CharTarget::Socket(path) => grants.push(Self::removal(path)),
                _ => {}
            }
        }
        let dump = config.net_dump.iter().filter(|dump| dump.max.is_some());
        grants.extend(dump.map(|dump| Self::rotation(&dump.path)));
        // A back end that has hung up may be there again after a reset.
        grants.extend(config.net.iter().filter_map(|net| match &net.to {
            NetTarget::VhostUser(path) => Some(Self::Sockets(folder(path))),
            _ => None,
        }));
        // With each reset of its driver's the device is another.
        let by_host = config.vsock.iter().filter(|vsock| vsock.vhost);
        grants.extend(by_host.map(|_| Self::Device(Vsock::HOST_DEVICE.into())));
        let vsock = config.vsock.iter().filter_map(|vsock| vsock.path.as_ref());
        grants.extend(vsock.map(|path| Self::removal(path)));
        grants.extend(config.share.iter().map(|share| match &share.from {
            ShareFrom::Path(path) => {
                Self::Share(path.canonicalize().unwrap_or_else(|_| path.clone()), !share.readonly)
            }
            ShareFrom::VhostUser(path) => Self::Sockets(folder(path)),
        }));
        grants
    }

    /// Where the file at `path` begins anew.
    pub fn rotation(path: &Path) -> Self {
        Self::Rotation(folder(path))
    }

    /// Where the socket at `path` is.
    pub fn removal(path: &Path) -> Self {
        Self::Removal(folder(path))
    }

    /// The host's resolv.conf(5): with its folder where that is somebody's for just that, because most put a new file in its place.
    fn resolvers() -> Self {
        let named = PathBuf::from("/etc/resolv.conf");
        let file = named.canonicalize().unwrap_or(named);
        match file.parent() {
            Some(folder) if folder.starts_with("/run") && folder != Path::new("/run") => {
                Self::Read(folder.to_owned())
            }
            _ => Self::Read(file),
        }
    }

    /// All of the host's files would be in it.
    pub(super) fn is_all(&self) -> bool {
        self.path().canonicalize().is_ok_and(|path| path == Path::new("/"))
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Read(path)
            | Self::Folder(path)
            | Self::Rotation(path)
            | Self::Removal(path)
            | Self::Departure(path)
            | Self::Sockets(path)
            | Self::Device(path)
            | Self::Share(path, _) => path,
        }
    }

    /// It is named below a descriptor alone, and not by its path.
    pub(super) fn is_held(&self) -> bool {
        matches!(self, Self::Share(..))
    }

    fn rights(&self, is_folder: bool) -> BitFlags<AccessFs> {
        match self {
            Self::Read(_) if is_folder => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Read(_) => AccessFs::ReadFile.into(),
            Self::Folder(_) => {
                AccessFs::from_all(FILES)
                    & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::MakeChar | AccessFs::IoctlDev)
            }
            Self::Share(_, writes) if !is_folder => {
                let write = if *writes { AccessFs::WriteFile | AccessFs::Truncate } else { BitFlags::EMPTY };
                write | AccessFs::ReadFile
            }
            Self::Share(_, false) => AccessFs::ReadFile | AccessFs::ReadDir,
            // Character devices for overlay file systems' marks of what is not there; the kernel lets nobody here make others.
            Self::Share(_, true) => {
                AccessFs::from_all(FILES) & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev)
            }
            Self::Rotation(_) => {
                AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile
            }
            Self::Removal(_) => AccessFs::RemoveFile.into(),
            Self::Departure(_) => AccessFs::RemoveDir.into(),
            // Connecting to them is no right of landlock's.
            Self::Sockets(_) => BitFlags::EMPTY,
            Self::Device(_) => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        }
    }
}

/// That of `path`, wherever this process goes.
fn folder(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = path.parent().unwrap_or(Path::new("/"));
    // There are no links and no way back where it is shown.
    folder.canonicalize().unwrap_or_else(|_| folder.to_owned())
}

/// The rules of this process.
struct Rules {
    /// None if the kernel has no landlock.
    ruleset: Option<OwnedFd>,
    /// The kernel knows every right and scope that is taken away.
    complete: bool,
}

static RULES: OnceLock<Rules> = OnceLock::new();

/// What landlock_create_ruleset(2) says of itself, without attributes.
fn ask(what: u32) -> libc::c_long {
    // SAFETY: it takes no memory.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, what) }
}

/// The number of its latest interface.
fn version() -> libc::c_long {
    const VERSION: u32 = 1;
    ask(VERSION)
}

/// What others are kept from. Signals only where the kernel does not take the threads of this process for others, as it did at first
/// (Documentation/userspace-api/landlock.rst, erratum 2).
fn scopes() -> BitFlags<Scope> {
    const ERRATA: u32 = 2;
    const THREADS_ARE_OURS: libc::c_long = 1 << 1;
    let errata = ask(ERRATA);
    match errata > 0 && errata & THREADS_ARE_OURS != 0 {
        true => Scope::from_all(SCOPES),
        false => Scope::AbstractUnixSocket.into(),
    }
}

/// Makes the rules for threads that [`enter`] from now on: they can name only what is at `grants`, signal no other process, and connect to
/// no abstract unix socket of another.
pub(super) fn close(grants: &[Grant], mode: Mode) -> Result<(), Box<dyn Error + Send + Sync>> {
    let level = if mode == Mode::Strict { CompatLevel::HardRequirement } else { CompatLevel::BestEffort };
    let rules = Ruleset::default().set_compatibility(level).handle_access(AccessFs::from_all(FILES))?;
    let mut rules = rules.scope(scopes())?.create()?;
    for grant in grants {
        // What is not there is named by nobody; a file is no folder.
        let Ok(found) = grant.path().metadata() else { continue };
        let rights = grant.rights(found.is_dir());
        let is_file = matches!(grant, Grant::Read(_) | Grant::Device(_) | Grant::Share(..));
        if !rights.is_empty() && (found.is_dir() || is_file) {
            rules = rules.add_rule(PathBeneath::new(PathFd::new(grant.path())?, rights))?;
        }
    }
    let _ = RULES.set(Rules { ruleset: rules.into(), complete: version() >= SCOPES as libc::c_long });
    Ok(())
}

/// Restricts the calling thread. Takes no descriptor, so that it works when the process has none left.
pub(super) fn enter() -> io::Result<()> {
    let Some(Rules { ruleset: Some(ruleset), .. }) = RULES.get() else { return Ok(()) };
    // SAFETY: it takes a descriptor and flags.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The name of this layer as far as the kernel has it, for people.
pub(super) fn layer() -> Option<&'static str> {
    match RULES.get()? {
        Rules { ruleset: None, .. } => None,
        Rules { complete: true, .. } => Some("landlock"),
        Rules { complete: false, .. } => Some("landlock in part"),
    }
}
