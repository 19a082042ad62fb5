//! [`Key`]: all that a machine depends on which was saved when its guest had booted. A machine with the same key would boot to the
//! same; with another it may not.

use std::fs::{File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};

use super::{Error, network_of_one};
use crate::config::{CharTarget, Console, Firmware, NetTarget, Overlay, VmConfig};
use crate::kvm::Signature;

/// File systems tell times by the kernel's tick. A file that has changed within one may change once more and have the same time.
const TICK: Duration = Duration::from_millis(20);

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The configuration, without what each run may have of its own.
    config: String,
    /// What the guest begins with, by what it is.
    files: Vec<(String, FileId)>,
    host: Signature,
    /// The file of this program.
    program: FileId,
}

/// A file as it was at one time. That of another content differs, unless somebody wrote to the disk below the file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    /// When its content changed, and when anything of it did: seconds and nanoseconds.
    times: [(i64, i64); 2],
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        let found = std::fs::metadata(path)?;
        match found.is_file() {
            true => Ok(Self::from(&found)),
            false => Err(io::Error::other("it is not a regular file, so nobody can tell whether it changes")),
        }
    }
}

impl From<&Metadata> for FileId {
    fn from(found: &Metadata) -> Self {
        let times = [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())];
        Self { device: found.dev(), inode: found.ino(), size: found.size(), times }
    }
}

impl Key {
    /// That of the machine which `config` describes.
    ///
    /// # Errors
    /// It cannot be saved, or others could not go on from it beside one another; one of its files cannot be told from others.
    pub fn of(config: &VmConfig) -> Result<Self, Error> {
        if network_of_one(config).is_some() {
            return Err(Error::Unsupported("a network that one machine alone can be on"));
        }
        if config.vsock.iter().any(|vsock| vsock.vhost) {
            return Err(Error::Unsupported(
                "an address among the host's sockets, which one machine alone can have",
            ));
        }
        if config.disk.iter().any(|disk| !disk.readonly && disk.overlay != Some(Overlay::Temporary)) {
            return Err(Error::Unsupported("a disk whose writes are kept outside of it"));
        }
        let files = files(config).map(|(what, path)| {
            let id = FileId::of(&path).map_err(super::file("tell the content of", &path))?;
            Ok((format!("{what} {}", path.display()), id))
        });
        let program = Path::new("/proc/self/exe");
        Ok(Self {
            files: files.collect::<Result<_, Error>>()?,
            config: own(config.clone()),
            host: Signature::of_host(),
            program: FileId::of(program).map_err(super::file("tell the content of", program))?,
        })
    }

    /// The same, once no file of it can change without that showing.
    ///
    /// # Errors
    /// As for [`Key::of`].
    pub fn settled(config: &VmConfig) -> Result<Self, Error> {
        loop {
            let key = Self::of(config)?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let age = |(seconds, nanoseconds): (i64, i64)| {
                let then = Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
                now.checked_sub(then)
            };
            let ages = key.files.iter().flat_map(|(_, file)| file.times).filter_map(age);
            match ages.min().and_then(|age| TICK.checked_sub(age)) {
                Some(rest) => std::thread::sleep(rest),
                None => return Ok(key),
            }
        }
    }

    /// A name for all keys of this configuration, whatever becomes of its files.
    pub fn name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.config.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// What has changed since `earlier`, in words.
    pub fn changes(&self, earlier: &Self) -> Vec<&str> {
        let file = |(what, file)| {
            (!earlier.files.contains(&(String::clone(what), FileId::clone(file)))).then_some(what)
        };
        let files = self.files.iter().map(|(what, id)| (what, id)).filter_map(file).map(String::as_str);
        let others = [
            (self.config != earlier.config, "its configuration"),
            (self.host != earlier.host, "this host's processor or kernel"),
            (self.program != earlier.program, "vmm itself"),
        ];
        files.chain(others.into_iter().filter_map(|(changed, what)| changed.then_some(what))).collect()
    }
}

/// The files of a key, held: they can be looked at when nothing has a name any more.
#[derive(Debug)]
pub struct Held(Vec<OwnedFd>);

impl Held {
    /// Those of the machine that `config` describes, which has `key` if nothing has changed since.
    ///
    /// # Errors
    /// Something has; it cannot be opened.
    pub fn of(config: &VmConfig, key: &Key) -> Result<Self, Error> {
        let hold = |(_, path): (_, PathBuf)| {
            let held = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            held.map_err(|error| super::file("open", &path)(error.into()))
        };
        let held = Self(files(config).map(hold).collect::<Result<_, _>>()?);
        // They have the key's names now, and are the key's files.
        match Key::of(config)?.changes(key).first() {
            Some(what) => Err(Error::Changed((*what).to_owned())),
            None => held.check(key).map(|()| held),
        }
    }

    /// Whether they are as they were when they had this key.
    ///
    /// # Errors
    /// One has changed.
    pub fn check(&self, key: &Key) -> Result<(), Error> {
        for (file, (what, id)) in self.0.iter().zip(&key.files) {
            let path = Path::new(what);
            // A descriptor of a path alone is looked at like any.
            let now = File::from(file.try_clone().map_err(super::file("look at", path))?).metadata();
            if FileId::from(&now.map_err(super::file("look at", path))?) != *id {
                return Err(Error::Changed(what.clone()));
            }
        }
        Ok(())
    }
}

/// What `config` without what a run has of its own says: its name, and where on the host its ends are.
fn own(mut config: VmConfig) -> String {
    config.make_absolute();
    (config.name, config.net_dump) = (None, None);
    config.vsock.iter_mut().for_each(|vsock| vsock.path = None);
    for net in &mut config.net {
        if let NetTarget::User(network) = &mut net.to {
            network.publish.clear();
        }
    }
    // Whether there is one is the guest's to see, and no more.
    let end = |end: CharTarget| if end == CharTarget::Off { end } else { CharTarget::Stdio };
    config.console = Console(Some(end(config.console())));
    config.serial = end(config.serial);
    for port in &mut config.port {
        port.to = end(port.to.clone());
    }
    serde_json::to_string(&config).unwrap_or_default()
}

/// The files that the guest begins with.
fn files(config: &VmConfig) -> impl Iterator<Item = (&'static str, PathBuf)> {
    let firmware = match &config.firmware {
        Some(Firmware::File(path)) => Some(path),
        Some(Firmware::BuiltIn) | None => None,
    };
    let kernel = config.kernel.iter().map(|path| ("kernel", path));
    let others = config.initrd.iter().map(|path| ("initrd", path));
    let others = others.chain(firmware.into_iter().map(|path| ("firmware", path)));
    let roms = config.option_rom.iter().map(|path| ("option ROM", path));
    let disks = config.disk.iter().flat_map(|disk| disk.files()).map(|(what, path)| (what, path.to_owned()));
    let files = kernel.chain(others).chain(roms).map(|(what, path)| (what, path.clone()));
    files.chain(disks).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> VmConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_a_run_has_of_its_own_makes_no_other_machine_and_all_else_does() {
        let plain = own(config(r#"{"kernel": "k", "vsock": "cid=3", "net": ["user"], "port": ["p=pty"]}"#));
        for same in [
            r#"{"kernel": "k", "name": "n", "vsock": "/tmp/v,cid=3", "net": ["user,publish=80:80"], "port": ["p=socket=/s"],
                "console": "file=c", "net_dump": "d"}"#,
            r#"{"kernel": "./k", "vsock": "cid=3", "net": ["user"], "port": ["p=stdio"], "console": "pty"}"#,
        ] {
            assert_eq!(own(config(same)), plain, "{same}");
        }
        for other in [
            r#"{"kernel": "l", "vsock": "cid=3", "net": ["user"], "port": ["p=pty"]}"#,
            r#"{"kernel": "k", "vsock": "cid=4", "net": ["user"], "port": ["p=pty"]}"#,
            r#"{"kernel": "k", "vsock": "cid=3", "net": ["user,dns=10.0.0.1"], "port": ["p=pty"]}"#,
            r#"{"kernel": "k", "vsock": "cid=3", "net": ["user"], "port": ["q=pty"]}"#,
            r#"{"kernel": "k", "vsock": "cid=3", "net": ["user"], "port": ["p=pty"], "console": "off"}"#,
            r#"{"kernel": "k", "vsock": "cid=3", "net": ["user"], "port": ["p=pty"], "serial": "pty"}"#,
            r#"{"kernel": "k", "vsock": "cid=3", "net": ["user"], "port": ["p=pty"], "cmdline": "quiet"}"#,
        ] {
            assert_ne!(own(config(other)), plain, "{other}");
        }
    }

    #[test]
    fn a_file_that_was_written_to_or_replaced_is_another_although_its_size_and_time_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        let json = format!(r#"{{"kernel": "{}"}}"#, path.display());
        std::fs::write(&path, "one").unwrap();
        let first = Key::settled(&config(&json)).unwrap();
        assert_eq!(Key::of(&config(&json)).unwrap(), first);
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        let changed = |write: &dyn Fn()| {
            let before = Key::settled(&config(&json)).unwrap();
            write();
            std::fs::File::open(&path).unwrap().set_modified(time).unwrap();
            let after = Key::of(&config(&json)).unwrap();
            assert_eq!(after.changes(&before), [format!("kernel {}", path.display())]);
            assert_eq!(after.name(), before.name());
        };
        changed(&|| std::fs::write(&path, "two").unwrap());
        changed(&|| {
            std::fs::write(dir.path().join("l"), "two").unwrap();
            std::fs::rename(dir.path().join("l"), &path).unwrap();
        });
    }

    #[test]
    fn what_cannot_be_told_from_others_or_be_twice_has_none() {
        for (json, word) in [
            (r#"{"kernel": "/dev/null"}"#, "not a regular file"),
            (r#"{"kernel": "/nowhere/k"}"#, "No such file"),
            (r#"{"net": ["tap=t"]}"#, "one machine alone"),
            (r#"{"vsock": "vhost=on,cid=9"}"#, "one machine alone"),
            (r#"{"disk": ["d"]}"#, "kept outside"),
            (r#"{"firmware": "/dev/null"}"#, "not a regular file"),
        ] {
            let error = Key::of(&config(json)).unwrap_err();
            assert!(crate::error_chain(&error).contains(word), "{json}: {error}");
        }
    }
}
