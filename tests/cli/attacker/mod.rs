//! What somebody finds who has broken out of a guest: each thread of a machine that runs is taken over, one after the other, and makes
//! the calls that an attacker would, on files, processes and machines that are there. With `--sandbox off` nearly all of them succeed.

mod captive;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use captive::{Argument, Captive, Made, Refusal};

use crate::counting::*;
use crate::images::*;
use crate::place::*;
use crate::starter::Starter;

/// What there is to reach.
struct Prey {
    folder: PathBuf,
    /// A process that the attacker's starter may signal and trace.
    process: i32,
    /// The control socket of another machine.
    socket: PathBuf,
    /// The machine's own descriptor of the folder that it shares.
    shared: i32,
}

impl Prey {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

struct Attack {
    name: &'static str,
    attempt: fn(&Captive, &Prey) -> Made,
}

/// `attack!("name", |by, prey| the last call of it)`, or a call with its arguments.
macro_rules! attack {
    ($name:literal, $attempt:expr) => {
        Attack { name: $name, attempt: $attempt }
    };
    ($name:literal, $number:expr, $($argument:expr),*) => {
        Attack { name: $name, attempt: |by, _| by.call($number, [$(Argument::from($argument)),*]) }
    };
}

fn open(by: &Captive, path: &Path, flags: i32) -> Made {
    by.call(libc::SYS_openat, [libc::AT_FDCWD.into(), path.into(), flags.into(), 0o600.into()])
}

/// `struct sockaddr_un`, and its length.
fn unix_address(path: &Path) -> [Argument; 2] {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend(path.as_os_str().as_encoded_bytes());
    address.push(0);
    let length = address.len() as i64;
    [address.into(), length.into()]
}

/// `struct perf_event_attr` of one that needs no hardware.
fn software_event() -> Vec<u8> {
    let mut event = vec![0; 128];
    event[0] = 1;
    event
}

fn attacks() -> Vec<Attack> {
    const AT: i32 = libc::AT_FDCWD;
    vec![
        // Files.
        attack!("read /etc/passwd", |by, _| open(by, Path::new("/etc/passwd"), libc::O_RDONLY)),
        attack!("list /etc", |by, _| open(by, Path::new("/etc"), libc::O_RDONLY | libc::O_DIRECTORY)),
        attack!("write to a disk that it was not given", |by, prey| {
            open(by, &prey.at("other"), libc::O_RDWR)
        }),
        attack!("write to its own disk by name", |by, prey| open(by, &prey.at("disk"), libc::O_RDWR)),
        attack!("make a file", |by, prey| open(by, &prey.at("made"), libc::O_WRONLY | libc::O_CREAT)),
        attack!("remove a file", |by, prey| {
            by.call(libc::SYS_unlinkat, [AT.into(), (&*prey.at("victim")).into(), 0.into()])
        }),
        attack!("change a file's mode", |by, prey| {
            by.call(libc::SYS_chmod, [(&*prey.at("other")).into(), 0o777.into()])
        }),
        attack!("make a symbolic link", |by, prey| {
            by.call(libc::SYS_symlink, ["/etc/passwd".into(), (&*prey.at("link")).into()])
        }),
        attack!("make a hard link", |by, prey| {
            by.call(libc::SYS_link, [(&*prey.at("other")).into(), (&*prey.at("second")).into()])
        }),
        attack!("rewrite its own code", |by, _| open(by, Path::new("/proc/self/mem"), libc::O_RDWR)),
        attack!("read what lies beside a shared folder", |by, prey| {
            by.call(
                libc::SYS_openat,
                [prey.shared.into(), "../other".into(), libc::O_RDONLY.into(), 0.into()],
            )
        }),
        attack!("change the mode of what lies beside a shared folder", |by, prey| {
            by.call(libc::SYS_fchmodat, [prey.shared.into(), "../other".into(), 0o600.into()])
        }),
        // Processes.
        attack!("open the memory of another process", |by, prey| {
            open(by, Path::new(&format!("/proc/{}/mem", prey.process)), libc::O_RDWR)
        }),
        attack!("read the memory of another process", |by, prey| {
            by.call(
                libc::SYS_process_vm_readv,
                [prey.process.into(), 0.into(), 0.into(), 0.into(), 0.into(), 0.into()],
            )
        }),
        attack!("trace another process", |by, prey| {
            by.call(
                libc::SYS_ptrace,
                [(libc::PTRACE_SEIZE as i64).into(), prey.process.into(), 0.into(), 0.into()],
            )
        }),
        attack!("signal another process", |by, prey| by
            .call(libc::SYS_kill, [prey.process.into(), 0.into()])),
        attack!("take a descriptor of another process", |by, prey| {
            let process = by.call(libc::SYS_pidfd_open, [prey.process.into(), 0.into()])?;
            by.call(libc::SYS_pidfd_getfd, [process.into(), 0.into(), 0.into()])
        }),
        attack!("run a program", |by, prey| {
            by.call(libc::SYS_execve, [(&*prey.at("program")).into(), 0.into(), 0.into()])
        }),
        // One that the kernel refuses for what these flags mean, after it has let a process be made at all.
        attack!("fork", libc::SYS_clone, libc::SIGCHLD | libc::CLONE_SIGHAND, 0, 0, 0, 0),
        attack!("run code of its own", |by, _| {
            let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            by.call(
                libc::SYS_mmap,
                [0.into(), 4096.into(), access.into(), anonymous.into(), (-1).into(), 0.into()],
            )
        }),
        // Other machines.
        attack!("make a VM", |by, prey| {
            let kvm = open(by, &prey.at("kvm"), libc::O_RDWR)
                .or_else(|_| open(by, Path::new("/dev/kvm"), libc::O_RDWR))?;
            by.call(libc::SYS_ioctl, [kvm.into(), 0xae01.into(), 0.into()])
        }),
        attack!("connect to another machine", |by, prey| {
            let socket =
                by.call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0.into()])?;
            let [address, length] = unix_address(&prey.socket);
            by.call(libc::SYS_connect, [socket.into(), address, length])
        }),
        attack!("remove another machine's socket", |by, prey| {
            by.call(libc::SYS_unlink, [(&*prey.socket).into()])
        }),
        // The network.
        attack!("open a connection", libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
        attack!("listen to the network", libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0),
        attack!("ask the kernel by netlink", libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0),
        // The host.
        attack!("become root", libc::SYS_setresuid, 0, 0, 0),
        attack!("mount", libc::SYS_mount, "none", "/", "no file system", 0, 0),
        attack!("change the root", libc::SYS_chroot, "/"),
        attack!("make namespaces", libc::SYS_unshare, libc::CLONE_NEWUTS),
        attack!("make namespaces of users", libc::SYS_unshare, libc::CLONE_NEWUSER),
        attack!("load a program into the kernel", libc::SYS_bpf, 0, vec![0; 128], 128),
        attack!("make an io_uring", libc::SYS_io_uring_setup, 1, vec![0; 120]),
        attack!("handle faults", libc::SYS_userfaultfd, libc::O_CLOEXEC),
        attack!("count the kernel's events", libc::SYS_perf_event_open, software_event(), 0, -1, -1, 0),
        attack!("search keys", libc::SYS_keyctl, 0, -3, 1),
        attack!("change a limit of another process", |by, prey| {
            let none = vec![0; 16];
            let limit = libc::RLIMIT_CORE as i32;
            by.call(libc::SYS_prlimit64, [prey.process.into(), limit.into(), none.into(), 0.into()])
        }),
        attack!("be open to debuggers", libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0),
        attack!("forget a signal", libc::SYS_rt_sigaction, libc::SIGSYS, vec![0; 32], 0, 8),
    ]
}

/// What the kernel did, or refused for no reason of who asks: [`attacks`] say what they can have for an answer.
fn is_done(made: Made) -> bool {
    match made {
        Ok(_) => true,
        Err(Refusal::Filter) => false,
        Err(Refusal::Errno(errno)) => {
            !matches!(errno, libc::EPERM | libc::EACCES | libc::ENOENT | libc::ECONNREFUSED | libc::EROFS)
        }
    }
}

/// One who starts machines, and what is there for them.
struct Scene {
    place: Place,
    starter: Option<Starter>,
    process: OnceCell<Running>,
}

impl Scene {
    /// None, with words why, where `test` cannot have that.
    fn new(test: &str, starter: Option<Starter>) -> Option<Self> {
        let scene = Self { place: Place::new(), starter, process: OnceCell::new() };
        let place = &scene.place;
        place.file("count", kernel(&COUNTING));
        for name in ["disk", "other"] {
            place.file(name, vec![0; 1 << 20]);
        }
        fs::create_dir(place.path("shared")).unwrap();
        place.file("program", "neither a program nor a script");
        fs::set_permissions(place.path("program"), fs::Permissions::from_mode(0o755)).unwrap();
        scene.renew();
        match starter {
            Some(Starter::User | Starter::UserWithoutNamespaces) => {
                drop(place.give_to_nobody(test)?);
            }
            Some(Starter::RootOfContainer | Starter::RootWithoutCapabilities) | None => {}
        }
        Some(scene)
    }

    /// What an attack may have removed is there.
    fn renew(&self) {
        self.place.file("victim", "");
    }

    /// `program`, which the starter starts here.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        self.place.set_up(&mut command);
        if let Some(starter) = self.starter {
            // SAFETY: the child has one thread; that it allocates is no harm where the parent's other threads do not.
            unsafe { command.pre_exec(move || starter.enter()) };
        }
        command
    }

    fn vmm(&self, arguments: &str) -> Command {
        let theirs = self.place.path("vmm");
        let mut command = match theirs.exists() {
            true => self.command(&theirs),
            false => self.command(Path::new(crate::PROGRAM)),
        };
        if self.place.path("kvm").exists() {
            command.env("VMM_KVM", self.place.path("kvm"));
        }
        command.args(arguments.split_whitespace());
        command
    }

    fn start(&self, name: &str, more: &str) -> Running {
        let run =
            format!("--kernel count --mem 32M --serial file=said-{name} --console off --name {name} {more}");
        let guest = Running::new(self.vmm(&run));
        await_words(&self.place, &format!("said-{name}"), 3);
        guest
    }

    /// Its `layers`, as `vmm status` names them.
    fn layers(&self, name: &str) -> String {
        let output = finish(self.vmm(&format!("status {name} --json")).spawn().unwrap());
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        status["sandbox"].as_str().unwrap().to_owned()
    }

    /// The names of the attacks that succeed, by each thread of `guest`'s that `is_wanted`.
    fn attack(&self, guest: &Running, is_wanted: fn(&str) -> bool) -> HashMap<String, Vec<&'static str>> {
        let other = self.start("w", "");
        let mut sleep = self.command(Path::new("sleep"));
        sleep.arg("600");
        // To be over after whoever has come to trace it.
        let process = self.process.get_or_init(|| Running::new(sleep));
        let prey = Prey {
            folder: self.place.dir.path().to_owned(),
            process: process.pid(),
            socket: self.place.path("run/vmm/w.sock"),
            shared: descriptor(guest.pid(), &self.place.path("shared")),
        };
        assert!(prey.socket.exists());
        let mut found = HashMap::new();
        for (thread, name) in Captive::names(guest.pid()).into_iter().filter(|(_, name)| is_wanted(name)) {
            self.renew();
            let Some(captive) = Captive::take(guest.pid(), thread) else { continue };
            let attacks = attacks().into_iter();
            let done = attacks.filter(|attack| is_done((attack.attempt)(&captive, &prey)));
            found.insert(name, done.map(|attack| attack.name).collect());
        }
        drop(other);
        found
    }
}

/// A descriptor that the process `pid` has of the folder at `path`.
fn descriptor(pid: i32, path: &Path) -> i32 {
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let found = all.into_iter().find(|fd| identity(fd) == identity(path)).expect("it shares the folder");
    found.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

const RUN: &str = "--cpus 2 --disk disk --rng --net user --vsock --share shared";

/// What a thread may do by its role, of what an attacker would.
fn may(thread: &str, layers: &str, attack: &str) -> bool {
    let is_house = matches!(thread, "vmm" | "control" | "errand");
    match attack {
        // The child that saves memory.
        "fork" => is_house,
        "open a connection" => is_house || thread.contains("net"),
        "ask the kernel by netlink" => is_house,
        "change the mode of what lies beside a shared folder" => {
            (is_house || thread.contains("fs")) && !layers.contains("namespaces")
        }
        "connect to another machine" => {
            (is_house || thread.contains("vsock")) && !layers.contains("namespaces")
        }
        _ => false,
    }
}

#[test]
fn whoever_owns_a_thread_of_a_machine_finds_nothing() {
    let test = "whoever_owns_a_thread_of_a_machine_finds_nothing";
    if !has_kvm(test) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIP: {test}: needs root, to be others");
    }
    let others = [
        Starter::User,
        Starter::UserWithoutNamespaces,
        Starter::RootOfContainer,
        Starter::RootWithoutCapabilities,
    ];
    for starter in [None].into_iter().chain(others.map(Some)) {
        let Some(scene) = Scene::new(test, starter) else { continue };
        let guest = scene.start("v", RUN);
        let layers = scene.layers("v");
        eprintln!("{starter:?}: {layers}");
        let found = scene.attack(&guest, |_| true);
        assert!(found.len() > 3 && found.contains_key("vcpu1") && found.contains_key("control"), "{found:?}");
        for (thread, done) in found {
            let names = attacks().into_iter().map(|attack| attack.name);
            let expected: Vec<_> = names.filter(|attack| may(&thread, &layers, attack)).collect();
            assert_eq!(done, expected, "{starter:?} {thread}");
        }
        // It is none the worse for that, until it is caught.
        let before = await_words(&scene.place, "said-v", 3).len();
        until("more of the guest's", || fs::read(scene.place.path("said-v")).unwrap().len() > before);
        let vcpu = Captive::names(guest.pid()).into_iter().find(|(_, name)| name == "vcpu0").unwrap();
        Captive::take(guest.pid(), vcpu.0).unwrap().make(libc::SYS_execve);
        let output = guest.finish();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(REFUSED), "{said}");
        assert!(said.contains("refused system call execve") && said.contains("of thread vcpu0"), "{said}");
    }
}

/// So that the other test can fail.
#[test]
fn without_a_sandbox_whoever_owns_a_thread_has_it_all() {
    let test = "without_a_sandbox_whoever_owns_a_thread_has_it_all";
    if !has_kvm(test) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIP: {test}: needs root, who may do it all");
    }
    let scene = Scene::new(test, None).unwrap();
    let guest = scene.start("v", &format!("{RUN} --sandbox off"));
    let found = scene.attack(&guest, |name| name == "vcpu0");
    let all: Vec<_> = attacks().iter().map(|attack| attack.name).collect();
    assert_eq!(found["vcpu0"], all);
}
