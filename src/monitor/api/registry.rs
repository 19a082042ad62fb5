//! Names of running virtual machines: one socket each in a directory of the user's own.
//!
//! A name is alive if something listens on its socket; what is left of a killed monitor is cleaned up by whoever meets
//! it. Every change to the directory happens under its lock, so that two starts cannot both clean up and take one name. It
//! stays when the last name is given back: making and removing it costs each start and end more than all else that they do here.
//!
//! A machine that can connect to unix sockets has a folder of its own beside its name, and when its guest runs it can no longer reach
//! this directory: whoever breaks out of its monitor finds nobody else's socket. It cannot remove its own either. That is left, like the
//! names of the killed, to whoever comes next.
//!
//! Beside machines, pools and their spares listen here, under names that no machine can have: `NAME@pool` and `NAME@1` to begin with.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, fchmod, flock, fstat, mkdir, open,
    renameat_with, unlink,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, shutdown,
    socket_with, sockopt::socket_peercred,
};
use rustix::process::geteuid;

use super::Error;
use crate::{runtime_dir, vsock};

/// How long to wait for another process to let go of the directory, or for room in a socket's queue.
const PATIENCE: Duration = Duration::from_secs(2);
/// What follows a name in that of its socket.
const SOCKET: &str = ".sock";
/// What follows a name in that of its folder.
const PLACE: &str = ".d";
/// The sockets there that a monitor makes.
const VSOCK: [&str; 2] = [vsock::SOCKET, "vsock.seqpacket"];
/// Folders that may be there before a start looks whose they are.
const PLACES: u64 = 64;
/// What follows the name of a pool.
const POOL: &str = "@pool";
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// The directory of control sockets.
#[derive(Debug, Clone)]
pub struct Registry {
    path: PathBuf,
}

/// A name that is ours, and the socket that listens on it. Dropping it gives both back.
///
/// The socket has one descriptor, which is among the first that a process opens. Linux closes those of a process that is killed from
/// the highest on down: when the name of one is free, the sockets and locks are too that it had under that name.
#[derive(Debug)]
pub struct Entry {
    registry: Registry,
    name: String,
    listener: UnixListener,
    inode: (u64, u64),
}

/// The directory's lock.
struct Locked(OwnedFd);

impl Drop for Locked {
    fn drop(&mut self) {
        // Not left to closing: a forked child may hold the same description for longer.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Registry {
    /// The user's: see [`runtime_dir::of_user`].
    pub fn of_user() -> Self {
        Self::at(runtime_dir::of_user())
    }

    /// The one in `path`, which need not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket of `name`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{SOCKET}"))
    }

    /// The folder of `name`.
    fn place(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}{PLACE}"))
    }

    /// Where the socket device of `name` is if nobody says where.
    pub fn vsock(&self, name: &str) -> PathBuf {
        self.place(name).join(VSOCK[0])
    }

    /// Takes `name`, or a generated one that is free, and listens on it.
    ///
    /// # Errors
    /// The name is taken, or the directory or socket cannot be made.
    pub fn register(&self, name: Option<&str>) -> Result<Entry, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let locked = self.lock(true)?;
            if fstat(&locked.0).is_ok_and(|stat| stat.st_nlink > PLACES) {
                self.look(&locked)?;
            }
            let generated;
            let wanted = match name {
                Some(name) => name,
                None => {
                    generated = generate_name();
                    &generated
                }
            };
            match self.listen(&locked, wanted) {
                Err(Error::NameTaken(_)) if name.is_none() && Instant::now() < deadline => {}
                result => return result,
            }
        }
    }

    /// Takes `name` for a pool.
    ///
    /// # Errors
    /// As [`Registry::register`] has them.
    pub fn register_pool(&self, name: &str) -> Result<Entry, Error> {
        self.register(Some(&of_pool(name))).map_err(|error| match error {
            Error::NameTaken(_) => Error::PoolTaken(name.to_owned()),
            error => error,
        })
    }

    fn listen(&self, _: &Locked, name: &str) -> Result<Entry, Error> {
        let path = self.socket(name);
        let failed = |what| {
            let path = path.clone();
            move |source: Errno| Error::Socket { what, path, source: source.into() }
        };
        let address = address(&path).map_err(failed("make"))?;
        let socket = nonblocking_socket().map_err(failed("make"))?;
        // The file that bind makes takes its mode from the socket, so it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("protect"))?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                if self.alive(name)? {
                    return Err(Error::NameTaken(name.to_owned()));
                }
                log::info!("removing {}, which nobody listens on any more", path.display());
                unlink(&path).map_err(failed("remove stale"))?;
                bind(&socket, &address).map_err(failed("make"))?;
            }
            result => result.map_err(failed("make"))?,
        }
        listen(&socket, BACKLOG).map_err(failed("listen on"))?;
        let stat = rustix::fs::lstat(&path).map_err(failed("find"))?;
        Ok(Entry {
            registry: self.clone(),
            name: name.to_owned(),
            listener: socket.into(),
            inode: (stat.st_dev, stat.st_ino),
        })
    }

    /// Has what listens as `from` be called `to` from now on.
    ///
    /// # Errors
    /// The name is taken, or the directory or socket cannot be used.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let _locked = self.lock(false)?;
        let (old, path) = (self.socket(from), self.socket(to));
        let failed =
            |source: Errno| Error::Socket { what: "rename", path: path.clone(), source: source.into() };
        address(&path).map_err(failed)?;
        let rename = || renameat_with(CWD, &old, CWD, &path, RenameFlags::NOREPLACE);
        let renamed = match rename() {
            Err(Errno::EXIST) if self.alive(to)? => return Err(Error::NameTaken(to.to_owned())),
            Err(Errno::EXIST) => unlink(&path).and_then(|()| rename()),
            renamed => renamed,
        };
        renamed.map_err(failed)?;
        self.clear(to);
        match renameat_with(CWD, self.place(from), CWD, self.place(to), RenameFlags::NOREPLACE) {
            // It has none.
            Err(Errno::NOENT) => Ok(()),
            renamed => renamed.map_err(failed),
        }
    }

    /// The names of the virtual machines that are alive, sorted. Removes what dead ones left.
    ///
    /// # Errors
    /// The directory is there but cannot be used.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let mut names = self.all_names()?;
        names.retain(|name| !name.contains('@'));
        Ok(names)
    }

    /// The names of the pools that are alive, sorted. Removes what dead ones left.
    ///
    /// # Errors
    /// The directory is there but cannot be used.
    pub fn pools(&self) -> Result<Vec<String>, Error> {
        let names = self.all_names()?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(POOL)).map(str::to_owned).collect())
    }

    fn all_names(&self) -> Result<Vec<String>, Error> {
        match self.lock(false) {
            Err(Error::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Vec::new())
            }
            locked => self.look(&locked?),
        }
    }

    /// [`Registry::all_names`].
    fn look(&self, _: &Locked) -> Result<Vec<String>, Error> {
        let failed = |source| Error::Directory { path: self.path.clone(), source };
        let (mut names, mut files) = (Vec::new(), BTreeSet::new());
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            files.extend(entry.map_err(failed)?.file_name().into_string());
        }
        let pools =
            files.iter().filter_map(|file| file.strip_suffix(SOCKET)).filter(|name| name.ends_with(POOL));
        let alive: BTreeSet<_> = pools.filter(|pool| self.alive(pool).unwrap_or(true)).collect();
        for file in &files {
            // A pool that is alive cleans up after its spares. To probe one would fill the queue that it does not serve yet.
            if let Some((pool, rest)) = file.split_once('@')
                && !rest.starts_with("pool.")
                && alive.contains(&*of_pool(pool))
            {
                continue;
            }
            if let Some(name) = file.strip_suffix(PLACE) {
                if matches!(self.alive(name), Ok(false)) {
                    self.clear(name);
                }
                continue;
            }
            let Some(name) = file.strip_suffix(SOCKET) else { continue };
            // No name of ours, and it would be shown.
            if !name.chars().all(|c| c.is_ascii_graphic()) {
                continue;
            }
            match self.alive(name) {
                Ok(true) => names.push(name.to_owned()),
                Ok(false) => {
                    let _ = fs::remove_file(self.socket(name));
                }
                Err(error) => log::warn!("{error}"),
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Removes what is left of `name`, if it is dead.
    pub fn forget(&self, name: &str) {
        let locked = self.lock(false);
        if locked.is_err() || !matches!(self.alive(name), Ok(false)) {
            return;
        }
        // It may be about to end, and has them open still.
        VSOCK.iter().for_each(|file| drop(fs::remove_file(self.place(name).join(file))));
        self.clear(name);
        let _ = fs::remove_file(self.socket(name));
    }

    /// Removes the folder of `name`, which is dead, unless others have put something there.
    fn clear(&self, name: &str) {
        let place = self.place(name);
        for path in VSOCK.map(|file| place.join(file)) {
            // Whose name is gone may be about to end.
            if self.try_connect(&path).err() == Some(Errno::CONNREFUSED) {
                let _ = fs::remove_file(path);
            }
        }
        let _ = fs::remove_dir(place);
    }

    /// Connects to `name`. Where the directory is (`/tmp/vmm-UID`), somebody else may have been first: so directory and socket
    /// must be this user's alone, and so must the process behind it.
    ///
    /// # Errors
    /// Nothing of this name is alive, it does not take connections, or it is another user's.
    pub fn connect(&self, name: &str) -> Result<UnixStream, Error> {
        self.connect_by(name, Instant::now() + PATIENCE)
    }

    /// [`Registry::connect`], waiting until `deadline` at most where too many have connected already.
    ///
    /// # Errors
    /// As for that.
    pub fn connect_by(&self, name: &str, deadline: Instant) -> Result<UnixStream, Error> {
        let path = self.socket(name);
        if name.is_empty() || name.contains('/') {
            return Err(Error::NoSuchVm(name.to_owned()));
        }
        self.check_socket(name)?;
        loop {
            match self.try_connect(&path) {
                Ok(stream) => {
                    let peer = socket_peercred(&stream);
                    let peer = peer.map_err(|source| Error::Socket {
                        what: "ask who serves",
                        path,
                        source: source.into(),
                    })?;
                    return match peer.uid == geteuid() {
                        true => Ok(stream),
                        false => Err(Error::Stranger {
                            name: name.to_owned(),
                            what: "another user's process serves it",
                        }),
                    };
                }
                Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(Error::NoSuchVm(name.to_owned())),
                Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                Err(Errno::AGAIN) => return Err(Error::NoAnswer(name.to_owned())),
                Err(source) => return Err(Error::Socket { what: "connect to", path, source: source.into() }),
            }
        }
    }

    /// The socket of `name` is one, in a directory and with an owner and a mode as [`Registry::register`] makes them.
    fn check_socket(&self, name: &str) -> Result<(), Error> {
        let stranger = |what| Err(Error::Stranger { name: name.to_owned(), what });
        let absent = || Error::NoSuchVm(name.to_owned());
        let directory = match self.open() {
            Err(Error::Directory { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(absent());
            }
            directory => directory?,
        };
        // A name that is too long is told by who connects.
        let stat = match rustix::fs::statat(&directory, format!("{name}.sock"), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Err(absent()),
            Err(_) => return Ok(()),
            Ok(stat) => stat,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket if stat.st_uid != geteuid().as_raw() => {
                stranger("its socket belongs to another user")
            }
            FileType::Socket if stat.st_mode & 0o077 != 0 => stranger("its socket is open to other users"),
            FileType::Socket => Ok(()),
            _ => stranger("what stands in the socket's place is none"),
        }
    }

    /// The directory, if it is this user's alone.
    fn open(&self) -> Result<OwnedFd, Error> {
        let failed = |source: Errno| Error::Directory { path: self.path.clone(), source: source.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = open(&self.path, flags, Mode::empty()).map_err(failed)?;
        let stat = fstat(&directory).map_err(failed)?;
        if stat.st_uid != geteuid().as_raw() {
            return Err(Error::Unsafe { path: self.path.clone(), what: "belongs to another user" });
        }
        if stat.st_mode & 0o077 != 0 {
            return Err(Error::Unsafe { path: self.path.clone(), what: "is open to other users" });
        }
        Ok(directory)
    }

    fn try_connect(&self, path: &Path) -> Result<UnixStream, Errno> {
        let socket = nonblocking_socket()?;
        connect(&socket, &address(path)?)?;
        Ok(socket.into())
    }

    /// Someone listens on the socket of `name`. A full queue is a sign of life too.
    ///
    /// # Errors
    /// The socket cannot be asked.
    pub fn alive(&self, name: &str) -> Result<bool, Error> {
        let path = self.socket(name);
        match self.try_connect(&path) {
            Ok(_) | Err(Errno::AGAIN) => Ok(true),
            Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
            Err(source) => Err(Error::Socket { what: "probe", path, source: source.into() }),
        }
    }

    /// Locks the directory, making it first if asked to.
    fn lock(&self, create: bool) -> Result<Locked, Error> {
        let failed = |source: Errno| Error::Directory { path: self.path.clone(), source: source.into() };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let directory = match self.open() {
                Err(Error::Directory { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && create && Instant::now() < deadline =>
                {
                    match mkdir(&self.path, Mode::RWXU) {
                        Ok(()) | Err(Errno::EXIST) => continue,
                        Err(error) => return Err(failed(error)),
                    }
                }
                directory => directory?,
            };
            let stat = fstat(&directory).map_err(failed)?;
            // The lock is held for microseconds; a holder that was stopped must not stop everyone else.
            while let Err(error) = flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                if !matches!(error, Errno::WOULDBLOCK | Errno::INTR) || Instant::now() > deadline {
                    return Err(failed(error));
                }
                thread::sleep(Duration::from_micros(500));
            }
            let locked = Locked(directory);
            // Removed, or removed and made again, while we waited for it: a lock that protects nothing.
            match rustix::fs::lstat(&self.path) {
                Ok(now) if (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino) => return Ok(locked),
                _ if Instant::now() < deadline => {}
                Ok(_) => return Err(failed(Errno::WOULDBLOCK)),
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

impl Entry {
    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is, and those of this user's other machines.
    pub fn folder(&self) -> &Path {
        self.registry.path()
    }

    /// Makes its own folder.
    ///
    /// # Errors
    /// It cannot be made, or is another user's.
    pub fn make_place(&self) -> Result<(PathBuf, OwnedFd), Error> {
        let path = self.place();
        match runtime_dir::make_private(&path) {
            Ok(folder) => Ok((path, folder)),
            Err(source) => Err(Error::Directory { path, source }),
        }
    }

    /// Where that is.
    pub fn place(&self) -> PathBuf {
        self.registry.place(&self.name)
    }

    /// Where its socket device is if nobody says where.
    pub fn vsock(&self) -> PathBuf {
        self.registry.vsock(&self.name)
    }

    /// It was given another name: see [`Registry::rename`].
    pub fn renamed(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    /// The socket, which does not block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Entry {
    /// Gives the name back, without waiting for anybody. Nothing happens the second time.
    ///
    /// No lock is needed: nobody else takes the name while somebody listens, which is until then.
    pub fn give_back(&self) {
        // Ours only: someone may have removed the file and started another of this name.
        let path = self.registry.socket(&self.name);
        let stat = rustix::fs::lstat(&path);
        if stat.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.inode) {
            let _ = unlink(&path);
            let _ = rustix::fs::rmdir(self.place());
        }
        // Where they have to stay, the name is free by this.
        let _ = shutdown(&self.listener, Shutdown::Both);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// The name under which the pool called `name` is registered.
pub fn of_pool(name: &str) -> String {
    format!("{name}{POOL}")
}

/// That of the `number`th spare that the pool called `name` has made.
pub fn of_spare(name: &str, number: u32) -> String {
    format!("{name}@{number}")
}

fn nonblocking_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn address(path: &Path) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)
}

/// A short name that can be said aloud. Not a secret, and not unique by itself.
pub fn generate_name() -> String {
    const FIRST: [&str; 32] = [
        "amber", "bold", "brave", "brisk", "calm", "clear", "clever", "cosy", "crisp", "dapper", "eager",
        "early", "fair", "fleet", "fond", "gentle", "glad", "happy", "keen", "kind", "late", "light",
        "lucky", "mellow", "merry", "neat", "nimble", "proud", "quiet", "swift", "warm", "wise",
    ];
    const SECOND: [&str; 32] = [
        "badger", "beaver", "bison", "crane", "crow", "dolphin", "falcon", "finch", "fox", "gecko", "goose",
        "hare", "heron", "ibis", "jay", "koala", "lark", "lemur", "lynx", "marten", "mole", "newt", "otter",
        "owl", "panda", "raven", "robin", "seal", "stork", "swan", "tapir", "wren",
    ];
    let mut random = [0u8; mem::size_of::<u32>()];
    if rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::NONBLOCK) != Ok(random.len()) {
        random = std::process::id().to_le_bytes();
    }
    let [a, b, c, _] = random.map(usize::from);
    format!("{}-{}-{c:02x}", FIRST[a % 32], SECOND[b % 32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("vmm"));
        (dir, registry)
    }

    #[test]
    fn a_name_is_taken_while_its_owner_lives() {
        let (_dir, registry) = registry();
        assert!(registry.names().unwrap().is_empty());
        assert!(!registry.path().exists(), "listing makes nothing");
        let entry = registry.register(Some("a")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(registry.path()), mode(&registry.socket("a"))), (0o700, 0o600));
        assert!(matches!(registry.register(Some("a")), Err(Error::NameTaken(name)) if name == "a"));
        let other = registry.register(None).unwrap();
        assert_eq!(registry.names().unwrap().len(), 2);
        drop(entry);
        assert_eq!(registry.names().unwrap(), [other.name()]);
        assert!(matches!(registry.connect("a"), Err(Error::NoSuchVm(_))));
        drop(other);
        assert_eq!(fs::read_dir(registry.path()).unwrap().count(), 0, "the last one out leaves no file");
    }

    #[test]
    fn what_a_killed_monitor_left_is_cleaned_up() {
        let (_dir, registry) = registry();
        // As after SIGKILL: the file stays, and nobody listens.
        let leave = |name| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(registry.path()).unwrap();
            drop(UnixListener::bind(registry.socket(name)).unwrap());
        };
        leave("a");
        let entry = registry.register(Some("a")).unwrap();
        registry.connect("a").unwrap();
        leave("b");
        assert_eq!(registry.names().unwrap(), ["a"]);
        assert!(!registry.socket("b").exists());
        // Its folder, too; not one in which somebody lives, under whatever name.
        let leave = |name: &str, file: &str| {
            let place = registry.place(name);
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&place).unwrap();
            UnixListener::bind(place.join(file)).unwrap()
        };
        drop(leave("c", "vsock"));
        let alive = leave("d", "vsock.seqpacket");
        let programs = leave("e", "vsock_5000");
        assert_eq!(registry.names().unwrap(), ["a"]);
        let left = ["c", "d", "e"].map(|name| registry.place(name).exists());
        assert_eq!(left, [false, true, true]);
        drop((alive, programs));
        assert_eq!(registry.names().unwrap(), ["a"]);
        assert!(!registry.place("d").exists());
        // Somebody else's socket under our name is not ours to remove.
        fs::remove_file(registry.socket("a")).unwrap();
        let usurper = UnixListener::bind(registry.socket("a")).unwrap();
        drop(entry);
        assert!(registry.socket("a").exists());
        drop(usurper);
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let (dir, registry) = registry();
        fs::create_dir(registry.path()).unwrap();
        fs::set_permissions(registry.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(registry.register(None), Err(Error::Unsafe { .. })));
        fs::remove_dir(registry.path()).unwrap();
        symlink(dir.path(), registry.path()).unwrap();
        assert!(matches!(registry.register(None), Err(Error::Directory { .. })));
    }

    #[test]
    fn a_client_connects_to_nothing_that_others_could_have_put_there() {
        let (dir, registry) = registry();
        let entry = registry.register(Some("a")).unwrap();
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let stranger = |wanted: &str| match registry.connect("a") {
            Err(Error::Stranger { what, .. } | Error::Unsafe { what, .. }) => {
                assert!(what.contains(wanted), "{what}")
            }
            other => panic!("{wanted}: {other:?}"),
        };
        registry.connect("a").unwrap();
        chmod(registry.path(), 0o755);
        stranger("open to other users");
        chmod(registry.path(), 0o700);
        chmod(&registry.socket("a"), 0o666);
        stranger("open to other users");
        chmod(&registry.socket("a"), 0o600);
        // The same socket by another way.
        fs::rename(registry.socket("a"), dir.path().join("b.sock")).unwrap();
        symlink(dir.path().join("b.sock"), registry.socket("a")).unwrap();
        stranger("is none");
        fs::rename(dir.path().join("b.sock"), registry.socket("a")).unwrap();
        registry.connect("a").unwrap();
        if geteuid().is_root() {
            use std::os::unix::fs::chown;
            chown(registry.socket("a"), Some(65534), None).unwrap();
            stranger("another user");
            chown(registry.path(), Some(65534), None).unwrap();
            stranger("another user");
            chown(registry.path(), Some(0), None).unwrap();
        }
        drop(entry);
    }

    #[test]
    fn a_name_too_long_for_a_socket_is_an_error_with_a_hint() {
        let (_dir, registry) = registry();
        let error = registry.register(Some(&"x".repeat(200))).unwrap_err();
        assert!(error.hint().unwrap().contains("too long"), "{error}");
    }

    #[test]
    fn racing_starts_get_the_name_once() {
        let (_dir, registry) = registry();
        for _ in 0..20 {
            let barrier = std::sync::Barrier::new(8);
            let winners = thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    registry.register(Some("x"))
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
                threads.into_iter().filter_map(|t| t.join().unwrap().ok()).collect::<Vec<_>>()
            });
            assert_eq!(winners.len(), 1);
        }
        assert_eq!(fs::read_dir(registry.path()).unwrap().count(), 0);
    }
}
