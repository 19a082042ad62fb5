//! What somebody who has taken over a thread of the monitor may ask the kernel for, from each role: system calls as they would be made
//! from there. That the kernel hears of each outside shows that the tests can fail.

mod starter;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{c_long, syscall};
use vmm_monitor::sandbox::{self, Grant, Jail, Mode, Needs, Refused};
use vmm_monitor::threads::{self, Role};

use starter::Starter;

static REFUSED: AtomicUsize = AtomicUsize::new(0);
static LAST: Mutex<Option<Refused>> = Mutex::new(None);

fn note(call: &Refused) -> u8 {
    REFUSED.fetch_add(1, Ordering::SeqCst);
    *LAST.lock().unwrap() = Some(*call);
    16
}

/// A call that means no harm by its arguments, and would do harm by others.
struct Attempt {
    name: &'static str,
    call: fn() -> c_long,
    /// Who may make it all the same, and why is in `calls.rs`.
    by: fn(&Role, Needs) -> bool,
}

const NOBODY: fn(&Role, Needs) -> bool = |_, _| false;
const HOUSE: fn(&Role, Needs) -> bool =
    |role, _| matches!(role, Role::Main | Role::Control | Role::Errand | Role::Owner(_));

macro_rules! attempt {
    ($name:literal, $by:expr, $($argument:expr),+) => {
        Attempt {
            name: $name,
            // SAFETY: none of these reads or writes memory, but the strings and buffers that are given.
            call: || unsafe { syscall($($argument as c_long),+) },
            by: $by,
        }
    };
}

const NOTHING: *const u8 = std::ptr::null();
/// No descriptor.
const NONE: i32 = -1;

fn attempts() -> Vec<Attempt> {
    const MISSING: *const u8 = c"/nonexistent/vmm".as_ptr().cast();
    vec![
        // Other programs, and other processes.
        attempt!("execve", NOBODY, libc::SYS_execve, MISSING, NOTHING, NOTHING),
        attempt!("execveat", NOBODY, libc::SYS_execveat, NONE, MISSING, NOTHING, NOTHING, 0),
        attempt!("ptrace", NOBODY, libc::SYS_ptrace, libc::PTRACE_ATTACH, 0, 0, 0),
        attempt!("process_vm_readv", NOBODY, libc::SYS_process_vm_readv, 0, NOTHING, 0, NOTHING, 0, 0),
        attempt!("process_vm_writev", NOBODY, libc::SYS_process_vm_writev, 0, NOTHING, 0, NOTHING, 0, 0),
        attempt!("pidfd_open", NOBODY, libc::SYS_pidfd_open, 0, 0),
        attempt!("pidfd_getfd", NOBODY, libc::SYS_pidfd_getfd, NONE, 0, 0),
        attempt!("kill", HOUSE, libc::SYS_kill, libc::pid_t::MAX, 0),
        attempt!("tgkill of another", NOBODY, libc::SYS_tgkill, 1, 1, 0),
        attempt!("tkill", NOBODY, libc::SYS_tkill, libc::pid_t::MAX, 0),
        attempt!("fork", HOUSE, libc::SYS_clone, libc::SIGCHLD | libc::CLONE_PARENT | libc::CLONE_SIGHAND, 0),
        attempt!(
            "vfork's clone",
            NOBODY,
            libc::SYS_clone,
            libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_NEWNS,
            0
        ),
        attempt!("setns", NOBODY, libc::SYS_setns, NONE, 0),
        attempt!("unshare", NOBODY, libc::SYS_unshare, 0),
        // Code of one's own.
        attempt!("mmap of code", NOBODY, libc::SYS_mmap, 0, 0, libc::PROT_EXEC, libc::MAP_PRIVATE, NONE, 0),
        attempt!("mprotect to code", NOBODY, libc::SYS_mprotect, 1, 4096, libc::PROT_READ | libc::PROT_EXEC),
        attempt!("pkey_mprotect", NOBODY, libc::SYS_pkey_mprotect, 1, 4096, libc::PROT_EXEC, 0),
        attempt!("personality", NOBODY, libc::SYS_personality, 0xffff_ffffu32),
        // The file system's shape.
        attempt!("mount", NOBODY, libc::SYS_mount, NOTHING, MISSING, NOTHING, 0, NOTHING),
        attempt!("umount2", NOBODY, libc::SYS_umount2, MISSING, 0),
        attempt!("pivot_root", NOBODY, libc::SYS_pivot_root, MISSING, MISSING),
        attempt!("chroot", NOBODY, libc::SYS_chroot, MISSING),
        attempt!("open_tree", NOBODY, libc::SYS_open_tree, NONE, MISSING, 0),
        attempt!("fsopen", NOBODY, libc::SYS_fsopen, NOTHING, 0),
        attempt!("mknod", NOBODY, libc::SYS_mknod, MISSING, 0, 0),
        attempt!("chmod", NOBODY, libc::SYS_chmod, MISSING, 0),
        attempt!("chown", NOBODY, libc::SYS_chown, MISSING, 0, 0),
        attempt!("link", NOBODY, libc::SYS_link, MISSING, MISSING),
        attempt!("symlink", NOBODY, libc::SYS_symlink, MISSING, MISSING),
        attempt!("setxattr", NOBODY, libc::SYS_setxattr, MISSING, NOTHING, NOTHING, 0, 0),
        attempt!("open_by_handle_at", NOBODY, libc::SYS_open_by_handle_at, NONE, NOTHING, 0),
        attempt!("chdir", NOBODY, libc::SYS_chdir, MISSING),
        attempt!("openat2", HOUSE, libc::SYS_openat2, NONE, MISSING, NOTHING, 0),
        attempt!(
            "openat",
            |role, needs| HOUSE(role, needs) || names_files(role),
            libc::SYS_openat,
            NONE,
            MISSING,
            0
        ),
        attempt!("unlink", |role, needs| HOUSE(role, needs) || names_files(role), libc::SYS_unlink, MISSING),
        // Connections.
        attempt!(
            "socket of the internet",
            |role, needs| uses_internet(role, needs),
            libc::SYS_socket,
            libc::AF_INET,
            -1,
            0
        ),
        attempt!("socket of packets", NOBODY, libc::SYS_socket, libc::AF_PACKET, -1, 0),
        attempt!("socket of the kernel's ciphers", NOBODY, libc::SYS_socket, libc::AF_ALG, -1, 0),
        attempt!("socket of other guests", NOBODY, libc::SYS_socket, libc::AF_VSOCK, -1, 0),
        attempt!("socket of netlink", HOUSE, libc::SYS_socket, libc::AF_NETLINK, -1, 0),
        attempt!(
            "socket",
            |role, needs| HOUSE(role, needs) && needs.contains(Needs::UNIX) || connects(role),
            libc::SYS_socket,
            libc::AF_UNIX,
            -1,
            0
        ),
        attempt!(
            "connect",
            |role, needs| {
                HOUSE(role, needs) && needs.contains(Needs::UNIX)
                    || connects(role)
                    || uses_internet(role, needs)
            },
            libc::SYS_connect,
            NONE,
            NOTHING,
            0
        ),
        // The kernel's own machinery.
        attempt!("bpf", NOBODY, libc::SYS_bpf, 0, NOTHING, 0),
        attempt!("io_uring_setup", NOBODY, libc::SYS_io_uring_setup, 0, NOTHING),
        attempt!("perf_event_open", NOBODY, libc::SYS_perf_event_open, NOTHING, 0, 0, NONE, 0),
        attempt!("keyctl", NOBODY, libc::SYS_keyctl, u32::MAX, 0, 0, 0, 0),
        attempt!("add_key", NOBODY, libc::SYS_add_key, NOTHING, NOTHING, NOTHING, 0, 0),
        attempt!("request_key", NOBODY, libc::SYS_request_key, NOTHING, NOTHING, NOTHING, 0),
        attempt!("userfaultfd", NOBODY, libc::SYS_userfaultfd, u32::MAX),
        attempt!("init_module", NOBODY, libc::SYS_init_module, NOTHING, 0, NOTHING),
        attempt!("finit_module", NOBODY, libc::SYS_finit_module, NONE, NOTHING, 0),
        attempt!("kexec_load", NOBODY, libc::SYS_kexec_load, 0, u32::MAX, NOTHING, 0),
        attempt!("reboot", NOBODY, libc::SYS_reboot, 0, 0, 0, NOTHING),
        attempt!("swapon", NOBODY, libc::SYS_swapon, MISSING, 0),
        attempt!("ioperm", NOBODY, libc::SYS_ioperm, 0, 0, 0),
        attempt!("iopl", NOBODY, libc::SYS_iopl, 0),
        attempt!("modify_ldt", NOBODY, libc::SYS_modify_ldt, u32::MAX, NOTHING, 0),
        attempt!("settimeofday", NOBODY, libc::SYS_settimeofday, NOTHING, NOTHING),
        attempt!("syslog", NOBODY, libc::SYS_syslog, u32::MAX, NOTHING, 0),
        attempt!("fanotify_init", NOBODY, libc::SYS_fanotify_init, u32::MAX, 0),
        attempt!("inotify_init1", NOBODY, libc::SYS_inotify_init1, u32::MAX),
        attempt!("mbind", NOBODY, libc::SYS_mbind, 0, 0, 0, NOTHING, 0, 0),
        attempt!("msgget", NOBODY, libc::SYS_msgget, 0, 0),
        attempt!("shmget", NOBODY, libc::SYS_shmget, 0, 0, 0),
        attempt!("mq_open", NOBODY, libc::SYS_mq_open, MISSING, 0, 0, NOTHING),
        attempt!("setuid", NOBODY, libc::SYS_setuid, u32::MAX),
        attempt!("setgroups", NOBODY, libc::SYS_setgroups, u32::MAX, NOTHING),
        // More of what it has.
        attempt!(
            "KVM_CREATE_VM",
            |role, needs| HOUSE(role, needs) && needs.contains(Needs::REBOOTS),
            libc::SYS_ioctl,
            NONE,
            0xae01,
            0
        ),
        attempt!("TIOCSTI", NOBODY, libc::SYS_ioctl, NONE, libc::TIOCSTI, NOTHING),
        attempt!("TIOCSCTTY", NOBODY, libc::SYS_ioctl, NONE, libc::TIOCSCTTY, 0),
        attempt!("FS_IOC_SETFLAGS", NOBODY, libc::SYS_ioctl, NONE, 0x4008_6602, NOTHING),
        attempt!("fcntl F_SETOWN", NOBODY, libc::SYS_fcntl, NONE, libc::F_SETOWN, 0),
        attempt!("prctl PR_SET_DUMPABLE", NOBODY, libc::SYS_prctl, libc::PR_SET_DUMPABLE, 2, 0, 0, 0),
        attempt!("prctl PR_SET_MM", NOBODY, libc::SYS_prctl, libc::PR_SET_MM, 0, 0, 0, 0),
        attempt!("sigaction of SIGSYS", NOBODY, libc::SYS_rt_sigaction, libc::SIGSYS, NOTHING, NOTHING, 8),
        attempt!("setrlimit", NOBODY, libc::SYS_setrlimit, u32::MAX, NOTHING),
        attempt!("prlimit64 of another", NOBODY, libc::SYS_prlimit64, i32::MAX, 0, NOTHING, NOTHING),
        attempt!("sched_setscheduler", NOBODY, libc::SYS_sched_setscheduler, 0, u32::MAX, NOTHING),
        attempt!(
            "sched_setaffinity",
            |role, needs| HOUSE(role, needs) && needs.contains(Needs::PINS),
            libc::SYS_sched_setaffinity,
            0,
            0,
            NOTHING
        ),
        attempt!("sched_setaffinity of another", NOBODY, libc::SYS_sched_setaffinity, i32::MAX, 0, NOTHING),
        // By another name: x32's numbers.
        attempt!("x32's read", NOBODY, 0x4000_0000i64, NONE, NOTHING, 0),
    ]
}

fn names_files(role: &Role) -> bool {
    matches!(role, Role::Device(_, needs) if needs.intersects(Needs::INTERNET | Needs::UNIX))
}

fn connects(role: &Role) -> bool {
    matches!(role, Role::Device(_, needs) if needs.contains(Needs::UNIX))
}

fn uses_internet(role: &Role, needs: Needs) -> bool {
    match role {
        Role::Device(_, own) => own.contains(Needs::INTERNET),
        role => HOUSE(role, needs) && needs.contains(Needs::INTERNET),
    }
}

/// Makes each attempt, and tells which the kernel has heard of.
fn heard() -> Vec<&'static str> {
    let heard = |attempt: &Attempt| {
        let before = REFUSED.load(Ordering::SeqCst);
        let result = (attempt.call)();
        let refused = REFUSED.load(Ordering::SeqCst) > before;
        assert!(!refused || result == -1, "{}", attempt.name);
        assert!(
            !refused || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM),
            "{}",
            attempt.name
        );
        !refused
    };
    attempts().iter().filter(|attempt| heard(attempt)).map(|attempt| attempt.name).collect()
}

/// Places of each kind, and one that is none.
struct Files(PathBuf);

impl Files {
    const KINDS: [&str; 5] = ["read", "own", "rotates", "removes", "none"];

    fn in_folder(folder: &Path) -> Self {
        for kind in Self::KINDS {
            fs::create_dir(folder.join(kind)).unwrap();
            fs::write(folder.join(kind).join("file"), "old").unwrap();
        }
        Self(folder.to_owned())
    }

    fn grants(&self) -> Vec<Grant> {
        let at = |kind| self.0.join(kind);
        vec![
            Grant::Read(at("read")),
            Grant::Folder(at("own")),
            Grant::Rotation(at("rotates")),
            Grant::Removal(at("removes")),
            Grant::Read(at("missing")),
            // A file is no folder of anything.
            Grant::Folder(at("none/file")),
        ]
    }

    /// To be called inside, by a role that may name files.
    fn are_as_they_may_be(self) {
        if !sandbox::layers().contains("landlock,") {
            eprintln!(
                "SKIP: files_are_out_of_reach: this kernel's landlock is older than Linux 6.12, or off"
            );
            return;
        }
        let all = |try_it: &dyn Fn(&Path) -> io::Result<()>| {
            let may = |kind: &&str| match try_it(&self.0.join(kind)) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => false,
                Err(error) => panic!("{kind}: {error}"),
            };
            Self::KINDS.into_iter().filter(may).collect::<Vec<_>>()
        };
        assert_eq!(all(&|at| fs::read(at.join("file")).map(drop)), ["read", "own"]);
        assert_eq!(all(&|at| fs::read_dir(at).map(drop)), ["read", "own"]);
        assert_eq!(all(&|at| fs::write(at.join("file"), "new")), ["own", "rotates"]);
        assert_eq!(all(&|at| fs::write(at.join("another"), "new")), ["own", "rotates"]);
        assert_eq!(all(&|at| fs::create_dir(at.join("folder"))), ["own"]);
        assert_eq!(all(&|at| fs::rename(at.join("file"), at.join("file.1"))), ["own", "rotates"]);
        let removed = |at: &Path| {
            let there = ["file", "file.1"].into_iter().find(|name| at.join(name).exists()).unwrap();
            fs::remove_file(at.join(there))
        };
        assert_eq!(all(&removed), ["own", "rotates", "removes"]);
        // Whoever waits for this test.
        let parent = rustix::process::getppid().unwrap();
        assert_eq!(rustix::process::test_kill_process(parent), Err(rustix::io::Errno::PERM));
        for path in ["/etc/passwd", "/dev/kvm", "/proc/1/status", "/"] {
            let error = File::open(path).map(drop).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{path}: {error}");
        }
    }
}

/// One test, because a process has one jail.
#[test]
fn each_role_reaches_what_it_is_for_and_nothing_else() {
    let all: Vec<_> = attempts().iter().map(|attempt| attempt.name).collect();
    let outside = std::thread::spawn(heard).join().unwrap();
    assert_eq!(outside, all, "without a jail the kernel hears of all");

    let needs = Needs::INTERNET;
    let dir = tempfile::tempdir().unwrap();
    let files = Files::in_folder(dir.path());
    let jail =
        Jail { mode: Mode::Auto, goes_on: true, user: None, needs, grants: files.grants(), refused: note };
    sandbox::begin(jail, |_| ()).unwrap();
    sandbox::close([]).unwrap();
    let device = |needs| Role::Device("device".to_owned(), needs);
    let roles = [
        Role::Vcpu(0),
        device(Needs::empty()),
        device(Needs::DISK),
        device(Needs::INTERNET),
        device(Needs::UNIX),
        device(Needs::VHOST),
        device(Needs::TAP),
        Role::Disk("disk".to_owned()),
        Role::Output,
        Role::Log,
        Role::Fetch,
        Role::Main,
        Role::Control,
        Role::Errand,
        Role::Owner("owner"),
    ];
    for role in roles {
        let found = threads::spawn(role.clone(), heard).unwrap().join().unwrap();
        let may = |attempt: &&Attempt| (attempt.by)(&role, needs);
        let expected: Vec<_> = attempts().iter().filter(may).map(|attempt| attempt.name).collect();
        assert_eq!(found, expected, "{role:?}");
        let status = threads::spawn(role.clone(), || {
            std::fs::File::from(rustix::stdio::stdin().try_clone_to_owned().unwrap()).metadata().map(drop)
        });
        status.unwrap().join().unwrap().unwrap();
    }
    let last = LAST.lock().unwrap().unwrap().to_string();
    assert!(last.contains("the sandbox refused system call") && last.contains("of thread"), "{last}");

    // What is inside stays inside: threads that such a thread starts, whatever their role.
    let inner = threads::spawn(Role::Errand, || {
        threads::spawn(Role::Disk("inner".to_owned()), heard).unwrap().join()
    });
    assert_eq!(inner.unwrap().join().unwrap().unwrap(), Vec::<&str>::new());
    let wider = threads::spawn(device(Needs::DISK), || threads::spawn(Role::Main, heard).unwrap().join());
    assert_eq!(wider.unwrap().join().unwrap().unwrap(), Vec::<&str>::new());
    threads::spawn(Role::Errand, move || files.are_as_they_may_be()).unwrap().join().unwrap();
    let capabilities =
        threads::spawn(Role::Log, || rustix::thread::capabilities(None).unwrap()).unwrap().join().unwrap();
    assert!(capabilities.permitted.is_empty() && capabilities.effective.is_empty(), "{capabilities:?}");
    eprintln!("layers: {}", sandbox::layers());
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn it_is_the_same_whoever_starts_it() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIP: it_is_the_same_whoever_starts_it: needs root, to be others");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let this = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &this).unwrap();
    for starter in [
        Starter::User,
        Starter::UserWithoutNamespaces,
        Starter::RootOfContainer,
        Starter::RootWithoutCapabilities,
    ] {
        let mut command = Command::new(&this);
        command.args(["--exact", "each_role_reaches_what_it_is_for_and_nothing_else", "--nocapture"]);
        command.current_dir("/").env("TMPDIR", "/tmp");
        // SAFETY: the child has one thread; that it allocates is no harm where the parent's other threads do not.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, move || starter.enter()) };
        let ended = command.output().unwrap();
        let said = text(&ended.stderr) + &text(&ended.stdout);
        assert!(ended.status.success() && said.contains("1 passed"), "{starter:?}: {said}");
        eprintln!(
            "{starter:?}: {}",
            said.lines().find(|line| line.starts_with("layers")).unwrap_or_default()
        );
    }
}

/// For the next test, in a process of its own.
#[test]
#[ignore = "it ends the process"]
fn ends() {
    let refused = |call: &Refused| {
        eprintln!("{call}");
        16
    };
    let jail = Jail {
        mode: Mode::Auto,
        goes_on: false,
        user: None,
        needs: Needs::empty(),
        grants: Vec::new(),
        refused,
    };
    sandbox::begin(jail, move |call| std::process::exit(refused(call).into())).unwrap();
    let attempt = attempts().remove(0).call;
    let _ = threads::spawn(Role::Vcpu(3), attempt).unwrap().join();
}

#[test]
fn a_refused_call_ends_the_process_with_its_name() {
    let this = std::env::current_exe().unwrap();
    let ended = Command::new(this).args(["--exact", "ends", "--ignored", "--nocapture"]).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(16), "{said}");
    let told = "the sandbox refused system call execve (59) with 0x";
    assert!(said.contains(told) && said.contains("of thread vcpu3"), "{said}");
}
