//! What lies in a run's way at every path that it creates or opens: links, pipes, sockets, folders and files, of this user in a folder
//! of its own and of another user in one like /tmp. No victim changes, nothing is waited for, and an error names what is in the way.
//!
//! The kernel refuses some of that by itself where fs.protected_* are set. Where they are not, as in the rig, all of it is vmm's.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, mknodat};

use crate::images::*;
use crate::place::*;
use crate::pool;
use crate::strangers::chatter;

/// Longer than any of these runs takes, on a busy machine too.
const BOUND: Duration = Duration::from_secs(20);
const NOBODY: u32 = 65534;
/// The guest's own exit code.
const ENDED: i32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    /// A symbolic link to a file of this user's.
    Link,
    /// One to a file that is not there.
    Dangling,
    /// One to a folder of this user's.
    FolderLink,
    /// A second name of a file of this user's.
    HardLink,
    /// A link to a socket that this user's process listens on.
    SocketLink,
    /// A named pipe: another user's is read by it.
    Pipe,
    /// A socket that is listened on.
    Socket,
    Folder,
    /// A file that this user may write to.
    Plain,
}

use Planted::*;

const ALL: &[Planted] = &[Link, Dangling, FolderLink, HardLink, Pipe, Socket, Folder, Plain];
const NONE: &[Planted] = &[];

/// Who planted it, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// This user, in a folder of its own.
    Own,
    /// Another, in a folder that all may write to, with the sticky bit.
    Other,
}

/// A path that a run creates or opens.
struct Case {
    /// `@` is the folder that something is planted in; variables of the environment come first.
    arguments: &'static str,
    /// What is planted there, by name; `PID` in it is the number of the process.
    name: &'static str,
    /// With which of this user's the run works. With all others it is refused.
    own: &'static [Planted],
    /// The same of another user's, if that could plant something there.
    other: Option<&'static [Planted]>,
    /// What is planted.
    kinds: &'static [Planted],
    /// What is done in the folder before.
    before: fn(&World, &Path),
}

const fn case(
    arguments: &'static str,
    name: &'static str,
    own: &'static [Planted],
    other: &'static [Planted],
) -> Case {
    Case { arguments, name, own, other: Some(other), kinds: ALL, before: |_, _| {} }
}

/// One in a folder that nobody else may write to.
const fn inside(arguments: &'static str, name: &'static str, own: &'static [Planted]) -> Case {
    Case { arguments, name, own, other: None, kinds: ALL, before: |_, _| {} }
}

/// What lies there, and who listens or reads.
enum Guard {
    Nobody,
    Listener { _held: UnixListener },
    Reader(File),
}

struct World {
    /// Whose machines in the background end with it.
    place: pool::World,
    _listener: UnixListener,
    /// A new folder for each run.
    count: u32,
}

impl World {
    fn new() -> Self {
        let place = pool::World(Place::new());
        place.file("chatter", chatter(10_000));
        place.file("pvh", pvh_kernel(&out(0xf4, 0)));
        place.file("base", vec![b'0'; 16 << 10]);
        fs::create_dir_all(place.path("home/folder")).unwrap();
        // A kernel, a disk by its length, and firmware by its end: what is refused is not refused for its content.
        let mut precious = chatter(10);
        precious.resize(64 << 10, 0);
        precious[(64 << 10) - 16..][..4].copy_from_slice(&[0xb0, 0, 0xe6, 0xf4]); // mov al, 0; out 0xf4, al
        place.file("home/precious", precious);
        place.file("home/folder/precious", "precious, too");
        let _listener = UnixListener::bind(place.path("home/socket")).unwrap();
        Self { place, _listener, count: 0 }
    }

    /// What the victim has.
    fn home(&self) -> Vec<(PathBuf, u32, Vec<u8>)> {
        let names = ["home", "home/folder"].map(|name| self.place.path(name));
        let entries = names.iter().flat_map(|name| fs::read_dir(name).unwrap());
        let mut all: Vec<_> = entries
            .map(|entry| {
                let path = entry.unwrap().path();
                let bytes = fs::read(&path).unwrap_or_default();
                (path.clone(), fs::symlink_metadata(&path).unwrap().mode(), bytes)
            })
            .collect();
        all.sort();
        all
    }

    fn folder(&mut self, who: Who) -> PathBuf {
        self.count += 1;
        let folder = self.place.path(&format!("in-{}", self.count));
        fs::create_dir(&folder).unwrap();
        let mode = if who == Who::Own { 0o700 } else { 0o1777 };
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        folder
    }

    fn plant(&self, what: Planted, who: Who, path: &Path) -> Guard {
        let target = |name: &str| self.place.path(&format!("home/{name}"));
        let mut guard = Guard::Nobody;
        match what {
            Link => symlink(target("precious"), path).unwrap(),
            Dangling => symlink(target("missing"), path).unwrap(),
            FolderLink => symlink(target("folder"), path).unwrap(),
            SocketLink => symlink(target("socket"), path).unwrap(),
            HardLink => return fs::hard_link(target("precious"), path).map(|()| Guard::Nobody).unwrap(),
            Pipe => {
                mknodat(CWD, path, FileType::Fifo, 0o666.into(), 0).unwrap();
                if who == Who::Other {
                    let mut options = File::options();
                    guard =
                        Guard::Reader(options.read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap());
                }
            }
            Socket => guard = Guard::Listener { _held: UnixListener::bind(path).unwrap() },
            Folder => fs::create_dir(path).unwrap(),
            Plain => fs::write(path, "theirs").unwrap(),
        }
        if who == Who::Other {
            lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        guard
    }

    #[track_caller]
    fn run_all(&mut self, prefix: &str, cases: &[Case]) {
        let wrong: Vec<_> = cases.iter().flat_map(|case| self.run(prefix, case)).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// Runs `case` with all that may be planted; what went wrong.
    fn run(&mut self, prefix: &str, case: &Case) -> Vec<String> {
        let own = case.kinds.iter().map(|what| (Who::Own, *what, case.own));
        let other = case.other.filter(|_| is_root()).into_iter();
        let other = other.flat_map(|works| case.kinds.iter().map(move |what| (Who::Other, *what, works)));
        let wrong = own.chain(other).filter_map(|(who, what, works)| {
            let wrong = self.run_one(prefix, case, who, what, works.contains(&what)).err()?;
            Some(format!("{} with {what:?} of {who:?} at {}: {wrong}", case.arguments, case.name))
        });
        wrong.collect()
    }

    fn run_one(
        &mut self,
        prefix: &str,
        case: &Case,
        who: Who,
        what: Planted,
        works: bool,
    ) -> Result<(), String> {
        let folder = self.folder(who);
        let mut child = self.begin(prefix, case.arguments, &folder);
        let path = folder.join(case.name.replace("PID", &child.id().to_string()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap()).unwrap();
        (case.before)(self, &folder);
        let guard = self.plant(what, who, &path);
        let home = self.home();
        drop(child.stdin.take());
        let deadline = Instant::now() + BOUND;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                return Err(format!("it waits: {}", text(&finish(child).stderr)));
            }
            thread::sleep(Duration::from_millis(1));
        }
        judge(&finish(child), works, &path)?;
        let now = self.home();
        // What this user leads elsewhere by a link of its own goes there.
        let led = who == Who::Own && works && what == FolderLink;
        let is_same = if led { home.iter().all(|file| now.contains(file)) } else { now == home };
        if !is_same {
            return Err(format!("the victim had {home:?} and has {now:?}"));
        }
        let mut read = Vec::new();
        if let Guard::Reader(mut reader) = guard {
            let _ = reader.read_to_end(&mut read);
        }
        if read.is_empty() { Ok(()) } else { Err(format!("the other user has read {:?}", text(&read))) }
    }

    /// A process that becomes vmm once its standard input is closed, so that its number is known before.
    fn begin(&self, prefix: &str, arguments: &str, folder: &Path) -> Child {
        let folder = folder.to_str().unwrap();
        let (environment, arguments): (Vec<_>, Vec<_>) = arguments
            .split_whitespace()
            .partition(|word| word.starts_with("XDG_") || word.starts_with("TMP"));
        let mut command = Command::new("sh");
        command.args(["-c", "read -r _; exec \"$0\" \"$@\"", crate::PROGRAM]);
        command.args(prefix.split_whitespace()).args(arguments.iter().map(|word| word.replace('@', folder)));
        self.place.set_up(&mut command);
        for variable in environment {
            let (name, value) = variable.split_once('=').unwrap();
            command.env(name, value.replace('@', folder));
        }
        command.stdin(Stdio::piped()).spawn().unwrap()
    }
}

fn judge(output: &Output, works: bool, path: &Path) -> Result<(), String> {
    let (code, said) = (output.status.code(), text(&output.stderr));
    let expected: &[_] = if works { &[0, ENDED] } else { &[BAD_ARGUMENT, HOST] };
    if !code.is_some_and(|code| expected.contains(&code)) || said.contains("panicked") {
        return Err(format!("exit code {code:?}: {said}"));
    }
    // An error names what is in the way, or what was to be made beside it.
    let name = path.file_name().unwrap().to_str().unwrap();
    let named =
        if name.starts_with(".x") || name.starts_with("x.") { path.with_file_name("x") } else { path.into() };
    // A socket that is listened on is a running machine's, to which a name belongs.
    let named = [path, &named].iter().any(|path| said.contains(path.to_str().unwrap()))
        || name == "v.sock" && said.contains("\"v\"");
    match works || named && said.contains("hint: ") {
        true => Ok(()),
        false => Err(format!("what is in the way is not named: {said}")),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[track_caller]
fn run_all(test: &str, prefix: &str, cases: &[Case]) {
    if !has_kvm(test) {
        return;
    }
    if !is_root() {
        eprintln!("SKIP: what another user plants: needs root, to be another user");
    }
    let mut world = World::new();
    world.run_all(prefix, cases);
}

const GUEST: &str = "--kernel chatter --mem 32M --debug-exit --console off";

#[test]
fn what_is_written_goes_to_no_file_of_others_choice() {
    run_all(
        "what_is_written_goes_to_no_file_of_others_choice",
        GUEST,
        &[
            case("--serial file=@/x", "x", &[Plain], NONE),
            case("--serial file=@/x,max=4K", "x", &[Plain], NONE),
            case("--serial file=@/x,max=4K", "x.1", ALL, ALL),
            case("--port p=file=@/x", "x", &[Plain], NONE),
            case("--net user --net-dump @/x", "x", &[Plain], NONE),
            case("--trace @/x", "x", &[Plain], NONE),
            case("--disk path=base,overlay=@/x", "x", NONE, NONE),
            case("--disk path=base,overlay=@/x", ".x.PID", NONE, NONE),
        ],
    );
}

fn leave_socket(_: &World, folder: &Path) {
    drop(UnixListener::bind(folder.join("x")).unwrap());
}

#[test]
fn nobody_is_spoken_to_or_removed_where_vmm_is_to_listen() {
    run_all(
        "nobody_is_spoken_to_or_removed_where_vmm_is_to_listen",
        GUEST,
        &[
            case("--serial socket=@/x", "x", NONE, NONE),
            // Where one that a killed process has left is moved before it is removed.
            Case { before: leave_socket, ..case("--serial socket=@/x", "x.PID", NONE, NONE) },
            case("--port p=socket=@/x", "x", NONE, NONE),
            case("--gdb unix:@/x", "x", NONE, NONE),
            case("--vsock @/x", "x", NONE, NONE),
            case("--vsock @/x", "x.seqpacket", NONE, NONE),
        ],
    );
}

#[test]
fn nothing_is_read_that_others_lead_to_and_nothing_waited_for() {
    run_all(
        "nothing_is_read_that_others_lead_to_and_nothing_waited_for",
        "--mem 32M --debug-exit --console off",
        &[
            case("--kernel @/x", "x", &[Link, HardLink], &[HardLink]),
            case("--kernel chatter --initrd @/x", "x", &[Link, HardLink, Plain], &[HardLink, Plain]),
            case("--kernel pvh --firmware @/x", "x", &[Link, HardLink], &[HardLink]),
            case(
                "--kernel pvh --firmware --option-rom @/x",
                "x",
                &[Link, HardLink, Plain],
                &[HardLink, Plain],
            ),
            case("--kernel chatter --disk path=@/x", "x", &[Link, HardLink], &[HardLink]),
            case("--kernel chatter --disk path=@/x,readonly", "x", &[Link, HardLink], &[HardLink]),
            case("--kernel chatter --disk path=base,lower=@/x,overlay", "x", NONE, NONE),
            Case {
                kinds: &[Link, Dangling, SocketLink, Pipe, Socket, Folder],
                ..case("--kernel chatter --net socket=@/x", "x", &[Socket, SocketLink], &[Socket])
            },
            Case {
                kinds: &[Link, Dangling, SocketLink, Pipe, Folder],
                ..case("--kernel chatter --net vhost-user=@/x", "x", NONE, NONE)
            },
            // A pipe of this user's may have a writer yet.
            Case {
                kinds: &[Link, Dangling, FolderLink, HardLink, Socket, Folder, Plain],
                ..case("--config @/x", "x", NONE, NONE)
            },
            case("--config @/x/y", "x", NONE, NONE),
        ],
    );
}

#[test]
fn folders_of_a_users_own_are_nobody_elses() {
    run_all(
        "folders_of_a_users_own_are_nobody_elses",
        GUEST,
        &[
            case("XDG_RUNTIME_DIR=@", "vmm", NONE, NONE),
            inside(
                "XDG_RUNTIME_DIR=@ --name v",
                "vmm/v.sock",
                &[Link, Dangling, FolderLink, HardLink, Pipe, Plain],
            ),
            inside("XDG_RUNTIME_DIR=@ --name v --vsock", "vmm/v.d", NONE),
            inside("XDG_RUNTIME_DIR=@ --net switch=lan", "vmm/switch/lan", NONE),
            case("XDG_STATE_HOME=@ -d", "vmm", &[FolderLink, Folder], NONE),
            inside("XDG_RUNTIME_DIR=@ XDG_STATE_HOME=@/s -d --name v", "s/vmm/v", ALL),
            inside(
                "XDG_RUNTIME_DIR=@ XDG_STATE_HOME=@/s -d --name v",
                "s/vmm/.v",
                &[Link, Dangling, FolderLink, Folder],
            ),
            case("XDG_CACHE_HOME=@ --template --boot-marks", "vmm", &[FolderLink, Folder], NONE),
            inside("XDG_CACHE_HOME=@ --template --boot-marks", "vmm/templates", &[FolderLink, Folder]),
        ],
    );
}

/// A folder that another user leads elsewhere: what is named in it is nowhere.
#[test]
fn no_way_leads_over_a_link_of_anothers() {
    const OWN: &[Planted] = &[FolderLink, Folder];
    run_all(
        "no_way_leads_over_a_link_of_anothers",
        GUEST,
        &[
            case("--serial file=@/x/y0", "x", OWN, &[Folder]),
            case("--serial file=@/x/y1,max=4K", "x", OWN, &[Folder]),
            case("--serial socket=@/x/y2", "x", OWN, &[Folder]),
            case("--vsock @/x/y3", "x", OWN, &[Folder]),
            case("--disk path=base,overlay=@/x/o", "x", OWN, &[Folder]),
            case("--disk path=@/x/precious,readonly", "x", NONE, NONE),
        ],
    );
}

#[test]
fn what_is_saved_and_told_goes_to_no_file_of_others_choice() {
    let test = "what_is_saved_and_told_goes_to_no_file_of_others_choice";
    if !has_kvm(test) {
        return;
    }
    let mut world = World::new();
    world.place.file("halt", kernel(&HALT));
    world.place.fails(&format!("{GUEST} --trace record"), ENDED);
    let _guest = world.place.start("v", "--mem 32M");
    world.place.done("snapshot create v saved");
    world.run_all(
        "",
        &[
            case("snapshot create v @/x", "x", NONE, NONE),
            case("snapshot create v @/x", ".x.PID", NONE, NONE),
            case("trace report record --html @/x", "x", &[Plain], NONE),
            case("trace report record --perfetto @/x", "x", &[Plain], NONE),
            Case { before: copy_saved, ..inside("restore @/s -d", "s/working-set", ALL) },
            Case { before: copy_others, ..inside("restore @/s --name w", "s/state", NONE) },
        ],
    );
}

fn copy(world: &World, folder: &Path, names: &[&str]) {
    let _ = fs::create_dir(folder.join("s"));
    for name in names {
        fs::hard_link(world.place.path("saved").join(name), folder.join("s").join(name)).unwrap();
    }
}

fn copy_saved(world: &World, folder: &Path) {
    copy(world, folder, &["config.json", "state", "memory"]);
}

fn copy_others(world: &World, folder: &Path) {
    copy(world, folder, &["config.json", "memory"]);
}
