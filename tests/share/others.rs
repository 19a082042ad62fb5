//! What somebody else changes in a folder, and how the programs of a guest hear of it that watch theirs (inotify(7)): by the agent's own code.

#[path = "../../guest/agent/src/change.rs"]
mod change;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use self::change::Change;
use crate::mount::{Mounted, available, folder};

/// Has another process run `script` in `dir`.
fn other(dir: &Path, script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).current_dir(dir).status().unwrap().success());
}

/// A program of the guest's that watches the folders and files at `paths`.
struct Program {
    watch: OwnedFd,
    names: BTreeMap<i32, String>,
}

impl Program {
    fn new(mount: &Path, paths: &[&str]) -> Self {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let wanted = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE;
        let add =
            |path: &&str| (inotify::add_watch(&watch, mount.join(path), wanted).unwrap(), (*path).to_owned());
        let names = paths.iter().map(add).collect();
        Self { watch, names }
    }

    /// What it has heard of.
    fn heard(&self) -> Vec<String> {
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(&self.watch, &mut room);
        let mut heard = Vec::new();
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return heard,
                Err(error) => panic!("{error}"),
            };
            let what = match event.events() - ReadFlags::ISDIR {
                ReadFlags::MODIFY => "modify",
                ReadFlags::ATTRIB => "attrib",
                ReadFlags::CLOSE_WRITE => "close",
                ReadFlags::CREATE => "create",
                ReadFlags::DELETE => "delete",
                ReadFlags::DELETE_SELF => "delete-self",
                ReadFlags::MOVED_FROM => "from",
                ReadFlags::MOVED_TO => "to",
                ReadFlags::IGNORED => continue,
                other => panic!("{other:?}"),
            };
            let name =
                event.file_name().map(|name| format!("/{}", name.to_str().unwrap())).unwrap_or_default();
            heard.push(format!("{what} {}{name}", self.names[&event.wd()]));
        }
    }
}

/// All that there is below `path`: what must be the same after nothing has changed.
fn digest(path: &Path) -> Vec<(PathBuf, u32, u64, i64, i64, i64, u64)> {
    let found = fs::symlink_metadata(path).unwrap();
    let times = (found.mtime_nsec(), found.ctime(), found.ctime_nsec());
    let mut all =
        vec![(path.to_owned(), found.mode(), found.ino(), times.0, times.1, times.2, found.nlink())];
    if found.is_dir() {
        let mut below: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        below.sort();
        all.extend(below.iter().flat_map(|path| digest(path)));
    }
    all
}

/// The agent does once more what others have done, until there is no more.
fn repeat(agent: &File, share: &Path) {
    let before = digest(share);
    while let Some(change) = Change::next(agent.as_fd()).unwrap() {
        change.repeat(agent.as_fd());
    }
    assert_eq!(digest(share), before, "the host's files are others than before");
}

/// What the agent is told, but for files that were closed: of another test's process, which has this one's descriptors until it is a program,
/// the host's kernel tells that it closes them.
fn told(agent: &File) -> Vec<(change::Kind, OsString)> {
    let next = || Change::next(agent.as_fd()).unwrap();
    let all = std::iter::from_fn(next).map(|change| (change.kind, change.path));
    all.filter(|(kind, _)| *kind != change::Kind::Written).collect()
}

#[test]
fn programs_of_the_guest_hear_of_what_others_do() {
    if !available("programs_of_the_guest_hear_of_what_others_do") {
        return;
    }
    for (by_user, how) in
        [(false, ""), (true, ",readonly=on"), (true, ",cache=always"), (true, ",cache=never,owners=xattr")]
    {
        let (keep, share) = folder(by_user);
        let beside = keep.path().join("beside");
        fs::create_dir(&beside).unwrap();
        other(
            &share,
            "mkdir dir; echo kept >kept; echo gone >dir/gone; mkdir dir/inner; echo in >dir/inner/file",
        );
        let mount = Mounted::new(&share, how, by_user);
        let guest = mount.path();
        let agent = File::open(&guest).unwrap();
        assert_eq!(Change::next(agent.as_fd()).unwrap(), None);
        let program = Program::new(&guest, &["", "dir", "dir/gone", "kept"]);
        let open = File::open(guest.join("kept")).unwrap();
        for (script, expected) in [
            ("echo a >new", "create /new, modify /new, close /new"),
            ("echo b >>new", "modify /new, close /new"),
            ("chmod 600 new", "attrib /new"),
            ("mv new dir/moved", "from /new, to dir/moved"),
            ("mv dir/moved ../beside/out", "delete dir/moved"),
            ("mv ../beside/out dir/back", "create dir/back"),
            // As editors save a file: the one that was there goes once nobody has it open.
            ("echo replaced >tmp; mv tmp kept", "from /tmp, to /kept, attrib kept"),
            ("rm dir/gone", "attrib dir/gone, delete-self dir/gone, delete dir/gone"),
            (
                "mkdir more; ln -s nowhere link; mkfifo fifo; ln kept hard",
                "create /more, create /link, create /fifo, create /hard",
            ),
            ("rm link hard; rmdir more", "delete /link, delete /hard, delete /more"),
            ("echo x >short; rm short", "delete /short"),
            ("rm -r dir/inner", "delete dir/inner"),
            ("touch dir", "attrib /dir, attrib dir"),
        ] {
            other(&share, script);
            repeat(&agent, &share);
            let heard = program.heard().join(", ");
            assert_eq!(heard, expected, "{script} ({how})");
        }
        assert_eq!(fs::read_to_string(guest.join("kept")).unwrap(), "replaced\n");
        drop(open);
    }
}

/// Its own programs' changes come once, by the guest's kernel, and nobody but the agent asks.
#[test]
fn a_guests_own_changes_are_not_told() {
    if !available("a_guests_own_changes_are_not_told") {
        return;
    }
    let (_keep, share) = folder(true);
    let mount = Mounted::new(&share, "", true);
    let guest = mount.path();
    let agent = File::open(&guest).unwrap();
    assert_eq!(Change::next(agent.as_fd()).unwrap(), None);
    let program = Program::new(&guest, &[""]);
    other(&guest, "echo a >a; mv a b; rm b; mkdir c; echo d >c/d; rm -r c");
    assert!(!program.heard().is_empty());
    assert_eq!(told(&agent), []);
    // More of them than the host's kernel keeps, and then one of somebody else's.
    other(&guest, "seq 20000 | xargs touch");
    other(&share, "echo e >e");
    assert_eq!(told(&agent), [(change::Kind::Made, "e".into()), (change::Kind::Data, "e".into())]);
    // Who asks changes nothing; others do.
    assert!(fs::write(guest.join("x"), "x").is_err());
    other(&guest, "echo x >x");
    assert!(fs::remove_file(guest.join("x")).is_err());
    assert_eq!(fs::read_to_string(share.join("x")).unwrap(), "x\n");
    // Another may ask when the first does not.
    let second = || {
        let guest = guest.clone();
        let asks = move || {
            let agent = File::open(guest).unwrap();
            Change::next(agent.as_fd()).map_err(|error| error.raw_os_error())
        };
        thread::spawn(asks).join().unwrap()
    };
    assert_eq!(second(), Err(Some(libc::EBUSY)));
    drop(agent);
    while second().is_err() {
        thread::yield_now();
    }
    fs::write(guest.join("y"), "y").unwrap();
}
