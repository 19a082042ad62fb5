//! Starts commands: the program is looked for in the guest, and gets the user, the folder, the terminal or pipes that were
//! asked for, and a session of its own.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, OFlags, Uid, fchown, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{getuid, ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::stdio::stdin;
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use vmm_agent::protocol::{Exec, Reason, Size};

use crate::users::{Database, User};

/// How the agent runs itself to pack an archive.
pub const PACK: &[u8] = b"--pack";
/// And to unpack one.
pub const UNPACK: &[u8] = b"--unpack";
/// And to make the guest, which is a copy, another one.
pub const RENEW: &[u8] = b"--renew";
/// What follows is one of these for each choice: [`said`].
pub const YES: &[u8] = b"yes";
const NO: &[u8] = b"no";

/// A choice as an argument.
pub fn said(choice: bool) -> &'static [u8] {
    if choice { YES } else { NO }
}

/// What every command gets, unless the client says otherwise.
pub const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a command was not started.
pub type Refusal = (Reason, String);

/// A command that runs, and the near ends of its streams, which do not block.
pub struct Started {
    pub child: Child,
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    pub stderr: Option<OwnedFd>,
    /// The near end of its terminal, if it has one.
    pub tty: Option<OwnedFd>,
    /// It ends with its streams, and is to: it takes away what it has begun.
    pub ends_by_itself: bool,
}

/// Starts what `exec` says.
///
/// # Errors
/// There is no such program, user or folder, or the kernel refuses.
pub fn start(exec: &Exec) -> Result<Started, Refusal> {
    let user = Database::of_guest().find(&exec.user, getuid()).map_err(|text| (Reason::CannotRun, text))?;
    let variables = variables(&user, exec);
    let is_login = exec.argv.is_empty();
    let argv0 = match &exec.argv[..] {
        [] => [b"-", user.shell.rsplit(|byte| *byte == b'/').next().unwrap_or(&user.shell)].concat(),
        [name, ..] => name.clone(),
    };
    let cwd: &[u8] = match &exec.cwd[..] {
        [] if is_login && is_folder(&user.home) => &user.home,
        [] => b"/",
        cwd => cwd,
    };
    if !is_folder(cwd) {
        return Err((Reason::CannotRun, format!("the guest has no folder {}", cwd.escape_ascii())));
    }
    let name = exec.argv.first().unwrap_or(&user.shell).clone();
    let program =
        find(&name, value(&variables, b"PATH").unwrap_or_default(), Path::new(OsStr::from_bytes(cwd)))?;
    let mut command = Command::new(&program);
    command.arg0(OsStr::from_bytes(&argv0)).current_dir(OsStr::from_bytes(cwd)).env_clear();
    command.args(exec.argv.iter().skip(1).map(|argument| OsStr::from_bytes(argument)));
    for variable in &variables {
        let (name, value) = split(variable);
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    let owner = user.uid;
    become_user(&mut command, user);
    let refused = |error| (Reason::Refused, format!("the guest cannot make pipes or a terminal: {error}"));
    let failed = |error| not_started(&name, error);
    match exec.tty {
        Some(size) => on_terminal(command, size, owner, exec.stdin).map_err(refused)?.map_err(failed),
        None => on_pipes(command, exec.stdin).map_err(refused)?.map_err(failed),
    }
}

/// Starts the agent itself with `arguments`: to pack or unpack an archive, or for a renewal.
pub fn start_own(arguments: &[&[u8]], stdin: bool) -> Result<Started, Refusal> {
    let started = on_pipes(own(arguments), stdin).map_err(own_failed)?.map_err(own_failed)?;
    Ok(Started { ends_by_itself: true, ..started })
}

/// Runs the agent itself with `arguments`, to its end. The first of what it complains of; nothing if it has succeeded.
///
/// # Errors
/// It cannot be started.
pub fn run_own(arguments: &[&[u8]]) -> Result<Vec<String>, Refusal> {
    const MOST: u64 = 2048;
    let run = || {
        // No pipe: what it leaves behind may have that open for as long as it likes.
        let said = File::from(memfd_create("complaints", MemfdFlags::CLOEXEC)?);
        let mut command = own(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?);
        let status = command.status()?;
        let mut text = Vec::new();
        let mut said = said;
        said.rewind()?;
        said.take(MOST).read_to_end(&mut text)?;
        Ok((status, text))
    };
    let (status, text) = run().map_err(own_failed)?;
    if status.success() {
        return Ok(Vec::new());
    }
    let lines: Vec<_> = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
    Ok(if lines.is_empty() { vec![status.to_string()] } else { lines })
}

fn own(arguments: &[&[u8]]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("vmm-agent")
        .current_dir("/")
        .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));
    in_own_session(&mut command);
    command
}

fn own_failed(error: io::Error) -> Refusal {
    (Reason::Refused, format!("the agent cannot start itself: {error}"))
}

fn not_started(name: &[u8], error: io::Error) -> Refusal {
    let name = name.escape_ascii();
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NOENT) => {
            // It was there a moment ago.
            (
                Reason::CannotRun,
                format!("cannot run {name} in the guest: the interpreter that it names is missing"),
            )
        }
        _ => (Reason::CannotRun, format!("cannot run {name} in the guest: {error}")),
    }
}

fn variables(user: &User, exec: &Exec) -> Vec<Vec<u8>> {
    let given = [
        (&b"PATH"[..], DEFAULT_PATH),
        (b"HOME", &user.home),
        (b"USER", &user.name),
        (b"LOGNAME", &user.name),
        (b"SHELL", &user.shell),
    ];
    let given = given.map(|(name, value)| [name, b"=", value].concat());
    // Of two of a name the later counts.
    given.into_iter().chain(exec.env.iter().filter(|v| v.first() != Some(&b'=')).cloned()).collect()
}

fn split(variable: &[u8]) -> (&[u8], &[u8]) {
    match variable.iter().position(|byte| *byte == b'=') {
        Some(at) => (&variable[..at], &variable[at + 1..]),
        None => (variable, b""),
    }
}

fn value<'a>(variables: &'a [Vec<u8>], name: &[u8]) -> Option<&'a [u8]> {
    variables.iter().rev().map(|variable| split(variable)).find(|(n, _)| *n == name).map(|(_, value)| value)
}

fn is_folder(path: &[u8]) -> bool {
    fs::metadata(OsStr::from_bytes(path)).is_ok_and(|metadata| metadata.is_dir())
}

/// Where the program called `name` is: with a slash in it a path, else in one of the folders of `path`.
fn find(name: &[u8], path: &[u8], cwd: &Path) -> Result<PathBuf, Refusal> {
    let missing = || (Reason::NotFound, format!("the guest has no program {}", name.escape_ascii()));
    if name.contains(&b'/') {
        let program = cwd.join(OsStr::from_bytes(name));
        return match fs::metadata(&program) {
            Ok(metadata) if metadata.is_dir() => Err((
                Reason::CannotRun,
                format!("cannot run {} in the guest: it is a folder", name.escape_ascii()),
            )),
            Ok(_) => Ok(program),
            Err(_) => Err(missing()),
        };
    }
    if name.is_empty() {
        return Err(missing());
    }
    let mut locked = None;
    for folder in path.split(|byte| *byte == b':') {
        let program = cwd.join(OsStr::from_bytes(folder)).join(OsStr::from_bytes(name));
        match fs::metadata(&program) {
            Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
                return Ok(program);
            }
            Ok(metadata) if metadata.is_file() => locked = locked.or(Some(metadata.mode())),
            _ => {}
        }
    }
    Err(match locked {
        Some(mode) => {
            let mode = mode & 0o7777;
            let name = name.escape_ascii();
            (Reason::CannotRun, format!("cannot run {name} in the guest: no permission (mode {mode:o})"))
        }
        None => missing(),
    })
}

/// In the child, before the program: first the session, as the terminal is taken by its leader, then the user.
fn in_own_session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe, and nothing else is done between fork and exec.
    unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
}

fn become_user(command: &mut Command, user: User) {
    in_own_session(command);
    if user.uid == getuid() && user.groups == [user.gid] && user.uid.is_root() {
        return;
    }
    // SAFETY: system calls alone between fork and exec; the child has one thread, so what is one thread's is the process's.
    unsafe {
        command.pre_exec(move || {
            if getuid().is_root() {
                set_thread_groups(&user.groups)?;
                set_thread_gid(user.gid)?;
                set_thread_uid(user.uid)?;
            } else if user.uid != getuid() {
                return Err(rustix::io::Errno::PERM.into());
            }
            Ok(())
        });
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

fn on_pipes(mut command: Command, stdin: bool) -> io::Result<io::Result<Started>> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let near = if stdin {
        let (far, near) = pipe()?;
        command.stdin(far);
        Some(nonblocking(near)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let ((stdout, far_out), (stderr, far_err)) = (pipe()?, pipe()?);
    command.stdout(far_out).stderr(far_err);
    let (stdout, stderr) = (nonblocking(stdout)?, Some(nonblocking(stderr)?));
    // The command with its ends of the pipes is dropped here: their end is then the child's alone to hold.
    Ok(command.spawn().map(|child| Started {
        child,
        stdin: near,
        stdout,
        stderr,
        tty: None,
        ends_by_itself: false,
    }))
}

fn on_terminal(
    mut command: Command,
    size: Size,
    owner: Uid,
    stdin_wanted: bool,
) -> io::Result<io::Result<Started>> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let near = openpt(flags)?;
    unlockpt(&near)?;
    let far = ioctl_tiocgptpeer(&near, flags)?;
    resize(&near, size)?;
    // So that its programs can open it by name, too. One who may not give files away has none but their own.
    let _ = fchown(&far, Some(owner), None);
    command.stdin(far.try_clone()?).stdout(far.try_clone()?).stderr(far);
    // SAFETY: one ioctl between fork and exec.
    unsafe { command.pre_exec(|| Ok(ioctl_tiocsctty(stdin())?)) };
    let near = nonblocking(near)?;
    let keyboard = if stdin_wanted { Some(near.try_clone()?) } else { None };
    let stdout = near.try_clone()?;
    let started = |child| Started {
        child,
        stdin: keyboard,
        stdout,
        stderr: None,
        tty: Some(near),
        ends_by_itself: false,
    };
    Ok(command.spawn().map(started))
}

/// Sets a terminal's size; the kernel tells the programs on it.
pub fn resize(tty: &OwnedFd, size: Size) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(tty, size)?)
}
