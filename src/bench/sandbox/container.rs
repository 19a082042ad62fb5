//! The least that is still called a container: a process in six new namespaces (a user namespace besides where the caller is
//! not root) whose root is a folder, read-only. No cgroup, no seccomp filter, no dropped capabilities: whatever a container
//! runtime adds, it adds to this. A cgroup that exists may be given to it.
//!
//! `vmm bench` compares with it. It is no boundary against a hostile program that is root in it.

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null;

/// What a container is made of. Nothing happens before [`Container::command`]'s command is started.
#[derive(Debug, Clone)]
pub struct Container {
    root: PathBuf,
    binds: Vec<Bind>,
    detached: bool,
    cgroup: Option<PathBuf>,
}

#[derive(Debug, Clone)]
struct Bind {
    host: PathBuf,
    inside: PathBuf,
    writable: bool,
}

impl Container {
    /// One that sees `root` as its root file system, read-only. `/proc` is mounted where `root` has such a folder.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), binds: Vec::new(), detached: false, cgroup: None }
    }

    /// Shows the host's file or folder `host` at `inside`, which the root file system must have.
    #[must_use]
    pub fn bind(mut self, host: impl Into<PathBuf>, inside: impl Into<PathBuf>, writable: bool) -> Self {
        self.binds.push(Bind { host: host.into(), inside: inside.into(), writable });
        self
    }

    /// The command that starts it ends at once, and nothing but the container's own process stays.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// It is in the cgroup (version 2) at `path`.
    #[must_use]
    pub fn in_cgroup(mut self, path: &Path) -> Self {
        self.cgroup = Some(path.to_owned());
        self
    }

    /// What is done when it is started, in one line, for people.
    pub fn describe(&self) -> String {
        let user = if is_root() { "" } else { "|CLONE_NEWUSER" };
        let proc = if self.root.join("proc").is_dir() { "mount proc, " } else { "" };
        format!(
            "clone3(CLONE_NEWNS|NEWPID|NEWNET|NEWIPC|NEWUTS|NEWCGROUP{user}), mounts private, bind {}, {proc}read-only, pivot_root, execve",
            self.root.display()
        )
    }

    /// The command that runs `program` (a path inside) in it as PID 1. Its exit status is the program's, or 128 and the signal
    /// that ended it; killing it kills everything inside. What fails in between is said on standard error, with status 125.
    ///
    /// # Errors
    /// A path that holds a zero byte.
    pub fn command(&self, program: &str) -> io::Result<Command> {
        let plan = Plan::new(self)?;
        let mut command = Command::new(program);
        // SAFETY: what runs there makes system calls only: it takes no lock and allocates nothing (see `Plan::enter`).
        unsafe { command.pre_exec(move || plan.enter()) };
        Ok(command)
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// clone3's arguments (linux/sched.h, `struct clone_args`, its first version).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// linux/mount.h, `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// Everything spelled out beforehand, so that nothing need be allocated between clone3 and execve.
struct Plan {
    root: CString,
    proc: Option<CString>,
    /// From, to, writable.
    binds: Vec<(CString, CString, bool)>,
    /// What to write into which file of /proc/self, if there is a user namespace.
    maps: Option<[(CString, CString); 3]>,
    detached: bool,
    /// The file to enter its cgroup by.
    cgroup: Option<CString>,
}

impl Plan {
    fn new(container: &Container) -> io::Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        let place = |inside: &Path| container.root.join(inside.strip_prefix("/").unwrap_or(inside));
        let binds = container
            .binds
            .iter()
            .map(|bind| Ok((text(&bind.host)?, text(&place(&bind.inside))?, bind.writable)));
        let proc = place(Path::new("proc"));
        let map = |name: &str, value: String| -> io::Result<_> {
            Ok((CString::new(format!("/proc/self/{name}"))?, CString::new(value)?))
        };
        let maps = if is_root() {
            None
        } else {
            let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            Some([
                map("setgroups", "deny".to_owned())?,
                map("uid_map", format!("0 {user} 1"))?,
                map("gid_map", format!("0 {group} 1"))?,
            ])
        };
        Ok(Self {
            root: text(&container.root)?,
            proc: proc.is_dir().then(|| text(&proc)).transpose()?,
            binds: binds.collect::<io::Result<_>>()?,
            maps,
            detached: container.detached,
            cgroup: container.cgroup.as_ref().map(|path| text(&path.join("cgroup.procs"))).transpose()?,
        })
    }

    /// Called in the child that is to become the program. It returns in a grandchild, PID 1 of the container; the child itself
    /// waits for that and ends as it does.
    fn enter(&self) -> io::Result<()> {
        if let Some(file) = &self.cgroup
            && write_to(file, c"0") < 0
        {
            fail("enter the cgroup");
        }
        let user = if self.maps.is_some() { libc::CLONE_NEWUSER } else { 0 };
        let flags = user
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWCGROUP;
        let arguments = CloneArguments {
            flags: flags as u64,
            exit_signal: libc::SIGCHLD as u64,
            ..CloneArguments::default()
        };
        // SAFETY: a clone without shared memory, as fork(2) is; this process has one thread. The structure is as large as said.
        let pid =
            unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) };
        match pid {
            0 => {
                if let Err(step) = self.set_up() {
                    fail(step);
                }
                Ok(())
            }
            -1 => fail("clone3"),
            // SAFETY: ends the process at once, as a child of fork(2) must.
            _ if self.detached => unsafe { libc::_exit(0) },
            pid => end_as(pid as libc::pid_t),
        }
    }

    /// In the container's first process: from the host's mounts to the container's. The error is the step that failed; errno
    /// says why.
    fn set_up(&self) -> Result<(), &'static str> {
        const HERE: &CStr = c".";
        let call = |result: c_long, step| if result < 0 { Err(step) } else { Ok(()) };
        let mount = |from: *const c_char, to: *const c_char, kind: *const c_char, flags, step| {
            // SAFETY: strings that end in zero, or null where mount(2) takes none.
            call(unsafe { libc::mount(from, to, kind, flags, null()) }.into(), step)
        };
        let read_only = |path: *const c_char, step| {
            let attributes = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
            // SAFETY: a string that ends in zero; the structure is as large as said.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_mount_setattr,
                    libc::AT_FDCWD,
                    path,
                    0,
                    &raw const attributes,
                    size_of::<MountAttributes>(),
                )
            };
            call(result, step)
        };
        if !self.detached {
            // SAFETY: numbers only.
            call(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into(), "prctl PDEATHSIG")?;
        }
        for (file, text) in self.maps.iter().flatten() {
            call(write_to(file, text), "write a map of the user namespace")?;
        }
        mount(null(), c"/".as_ptr(), null(), libc::MS_REC | libc::MS_PRIVATE, "make mounts private")?;
        let root = self.root.as_ptr();
        mount(root, root, null(), libc::MS_BIND, "bind the root file system")?;
        for (from, to, writable) in &self.binds {
            mount(from.as_ptr(), to.as_ptr(), null(), libc::MS_BIND, "bind a file or folder of the host")?;
            if !writable {
                read_only(to.as_ptr(), "make a file or folder of the host read-only")?;
            }
        }
        if let Some(proc) = &self.proc {
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            mount(c"proc".as_ptr(), proc.as_ptr(), c"proc".as_ptr(), flags, "mount /proc")?;
        }
        read_only(root, "make the root file system read-only")?;
        // SAFETY: strings that end in zero.
        unsafe {
            call(libc::chdir(root).into(), "enter the root file system")?;
            // The old root lands on top of the new one, and goes (pivot_root(2), "pivot_root(".", ".")").
            call(libc::syscall(libc::SYS_pivot_root, HERE.as_ptr(), HERE.as_ptr()), "pivot_root")?;
            call(libc::umount2(HERE.as_ptr(), libc::MNT_DETACH).into(), "drop the old root")?;
            call(libc::chdir(c"/".as_ptr()).into(), "enter the new root")
        }
    }
}

/// Writes `text` to `file`, by one call. Negative, with errno, if that fails.
fn write_to(file: &CStr, text: &CStr) -> c_long {
    // SAFETY: a string that ends in zero; the file is closed below.
    let fd = unsafe { libc::open(file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return fd.into();
    }
    // SAFETY: the text is as long as said.
    let count = unsafe { libc::write(fd, text.as_ptr().cast(), text.to_bytes().len()) };
    // SAFETY: opened above. It leaves errno alone, for such a file.
    unsafe { libc::close(fd) };
    count as c_long
}

/// Ends this process as its child `pid` ends.
fn end_as(pid: libc::pid_t) -> ! {
    // SAFETY: numbers only. Whoever started this waits for the end of a pipe that it holds: it must hold nothing.
    unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
    let mut status: c_int = 0;
    loop {
        // SAFETY: the status is this function's.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        let code = match waited {
            _ if waited != pid => continue,
            _ if libc::WIFEXITED(status) => libc::WEXITSTATUS(status),
            _ => 128 + libc::WTERMSIG(status),
        };
        // SAFETY: ends the process at once, as a child of fork(2) must.
        unsafe { libc::_exit(code) };
    }
}

/// Says what failed, with errno, and ends this process with status 125.
fn fail(step: &str) -> ! {
    let error = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let mut digits = [b'0'; 3];
    for (place, digit) in [100, 10, 1].into_iter().zip(&mut digits) {
        *digit = b'0' + (error / place % 10) as u8;
    }
    for text in [&b"container: "[..], step.as_bytes(), b": errno ", &digits, b"\n"] {
        // SAFETY: the text is as long as said.
        unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    }
    // SAFETY: ends the process at once, as a child of fork(2) must.
    unsafe { libc::_exit(125) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Output, Stdio};

    /// A root file system with the host's shell, and what came of a script in it.
    fn shell(script: &str) -> Output {
        let root = tempfile::tempdir().unwrap();
        let mut container = Container::new(root.path());
        for path in ["/bin", "/lib", "/lib64", "/usr"].map(Path::new).into_iter().filter(|path| path.exists())
        {
            fs::create_dir(root.path().join(path.strip_prefix("/").unwrap())).unwrap();
            container = container.bind(path, path, false);
        }
        for folder in ["proc", "out"] {
            fs::create_dir(root.path().join(folder)).unwrap();
        }
        container = container.bind(root.path().join("out"), "/out", true);
        container.command("/bin/sh").unwrap().args(["-c", script]).output().unwrap()
    }

    /// Whether this host lets its user make namespaces at all; told if not.
    fn refused(output: &Output) -> bool {
        let refused = output.stderr.starts_with(b"container: clone3: errno 001");
        if refused {
            eprintln!("SKIP: bare containers: this user may make no namespaces");
        }
        refused
    }

    #[test]
    fn it_is_alone_in_there() {
        let script = "echo pid $$; echo $(ls /proc | grep -c '^[0-9]'); ls /; touch /x || echo cannot; touch /usr/x || echo cannot; \
            touch /out/x && echo can; grep -c : /proc/net/dev; exit 7";
        let output = shell(script);
        if refused(&output) {
            return;
        }
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        assert!(said.starts_with("pid 1\n"), "{output:?}");
        assert!(!said.contains("home") && !said.contains("etc"), "{said}");
        // One network device, the loopback's.
        assert!(said.ends_with("cannot\ncannot\ncan\n1\n"), "{said}");
    }

    #[test]
    fn its_end_is_told_and_its_failure_explained() {
        let output = shell("kill -9 $$; kill -TERM $$; exit 3");
        if refused(&output) {
            return;
        }
        // PID 1 takes no signal that it has no handler for.
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let mut command = Container::new("/no/such").command("/x").unwrap();
        let output = command.stdout(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        assert_eq!(output.stderr, b"container: bind the root file system: errno 002\n");
    }
}
