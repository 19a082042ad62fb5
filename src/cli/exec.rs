//! `vmm exec` and `vmm shell`: a command in a guest, with this process's streams, terminal and signals.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use signal_hook::consts::{SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use super::agent::terminal::{self, Raw};
use super::agent::{Reach, bytes};
use vmm_agent::client::{Sender, Session, Streams, run};
use vmm_agent::protocol::{Exec, Message, Request};
use vmm_command::{Code, Failure};

/// What goes on to the command.
const FORWARDED: [i32; 6] = [SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM];

/// So many SIGINT or SIGTERM within [`IMPATIENCE`] are for vmm itself: the command, or the guest, does not heed them.
const INSISTENT: usize = 3;
const IMPATIENCE: Duration = Duration::from_secs(1);

/// How a command is run, whoever starts its virtual machine.
#[derive(Debug, Default, PartialEq, Eq, clap::Args)]
#[group(skip)]
pub struct How {
    /// Pass standard input on; else the command reads nothing
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal, which is this one
    #[arg(short, long)]
    tty: bool,
    /// Set a variable; NAME alone has the value that it has here. Repeatable
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Run it in this folder of the guest [default: /]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<OsString>,
    /// Run it as this user of the guest, by name or number, and with this group [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<OsString>,
}

/// The options of `vmm exec`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    reach: Reach,
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// The options of `vmm shell`.
#[derive(Debug, clap::Args)]
pub struct ShellOptions {
    /// As this user of the guest, by name or number, and with this group [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<OsString>,
    #[command(flatten)]
    reach: Reach,
    /// The virtual machine's name, as vmm list shows it
    name: String,
}

/// `vmm exec`.
///
/// # Errors
/// The command was not run, or its end is not known.
pub fn exec(options: Options) -> Result<Code, Failure> {
    let Options { how, reach, name, command } = options;
    how.exec(command).and_then(|exec| carry(exec, &reach, &name)).map_err(not_run)
}

impl How {
    /// What the agent is to run as `command`.
    ///
    /// # Errors
    /// A terminal is asked for where there is none; what is said says nothing.
    pub fn exec(self, command: Vec<OsString>) -> Result<Exec, Failure> {
        let Self { interactive, tty, env, workdir, user } = self;
        if tty && interactive && !terminal::is_there() {
            let error = anyhow!("standard input is no terminal");
            return Err(Failure::new(Code::Host, error).hint(Some("drop -t")));
        }
        if let Some(text) =
            env.iter().find(|text| text.is_empty() || text.as_encoded_bytes().starts_with(b"="))
        {
            let error = anyhow!("-e {text:?} names no variable");
            return Err(Failure::new(Code::BadArgument, error).hint(Some("give a name: -e NAME=VALUE")));
        }
        Ok(Exec {
            argv: bytes(command),
            env: env.into_iter().filter_map(variable).collect(),
            cwd: given("-w", workdir)?,
            user: given("-u", user)?,
            tty: tty.then(terminal::size),
            stdin: interactive,
        })
    }
}

/// `vmm shell`.
///
/// # Errors
/// As for [`exec`].
pub fn shell(options: ShellOptions) -> Result<Code, Failure> {
    let ShellOptions { user, reach, name } = options;
    let user = given("-u", user).map_err(not_run)?;
    let tty = terminal::is_there().then(terminal::size);
    carry(Exec { user, tty, stdin: true, ..Exec::default() }, &reach, &name).map_err(not_run)
}

/// Something is given for a command that there is not.
pub fn no_command() -> Failure {
    let error = anyhow!("an option is given for a command in the guest, and there is no command");
    Failure::new(Code::BadArgument, error).hint(Some("add it at the end: -- COMMAND"))
}

/// What was the failure of a command that did not come to run, or of what carried it, has docker's code for that; those of a
/// command that there is not, or that cannot be run, are shells' own.
pub fn not_run(mut failure: Failure) -> Failure {
    if !matches!(failure.code, Code::Command(_)) {
        failure.code = Code::Command(Code::NOT_RUN);
    }
    failure
}

/// What `option` says, nothing if it is absent. Said and empty it would stand for the default: `-u "$NOT_SET"` must not become root.
fn given(option: &str, value: Option<OsString>) -> Result<Vec<u8>, Failure> {
    let Some(value) = value else { return Ok(Vec::new()) };
    if value.is_empty() || (option == "-u" && value.as_encoded_bytes().starts_with(b":")) {
        let error = anyhow!("{option} {value:?} names nothing");
        return Err(
            Failure::new(Code::BadArgument, error).hint(Some(format!("drop {option}, or give it a value")))
        );
    }
    Ok(value.into_encoded_bytes())
}

/// `NAME=VALUE`; of a name alone what it is here, if it is set.
fn variable(text: OsString) -> Option<Vec<u8>> {
    if text.as_encoded_bytes().contains(&b'=') {
        return Some(text.into_encoded_bytes());
    }
    let value = std::env::var_os(&text)?;
    Some([text.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat())
}

fn carry(mut exec: Exec, reach: &Reach, name: &str) -> Result<Code, Failure> {
    let guest = reach.guest(name)?;
    let carrier = Carrier::begin(&mut exec, leave)?;
    let session = guest.start(Request::Exec(exec)).map_err(|error| guest.failure(error))?;
    carrier.carry(session)
}

/// Ends this process, and with it what it waits for.
pub fn leave(signal: i32) {
    terminal::restore();
    std::process::exit(128 + signal);
}

/// Carries the streams and signals of a command, and from before there is one whatever signals come.
pub struct Carrier {
    to: Arc<OnceLock<Sender>>,
    has_tty: bool,
    has_stdin: bool,
}

impl Carrier {
    /// For `exec`, before it can run: one that runs is not to miss a signal. Until there is a session signals are given to `leave`, which
    /// ends what was begun; so are then those that the user insists on. It is called on a thread of its own.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn begin(exec: &mut Exec, leave: impl Fn(i32) + Send + 'static) -> Result<Self, Failure> {
        let (has_tty, has_stdin) = (exec.tty.is_some(), exec.stdin);
        if has_tty {
            // Programs on a terminal want to know which; what the user says of it counts.
            exec.env.splice(0..0, variable("TERM".into()));
        }
        let to = Arc::new(OnceLock::new());
        let passed = pass_signals_on(to.clone(), has_tty, leave).context("handle signals");
        passed.map_err(|error| Failure::new(Code::Host, error))?;
        Ok(Self { to, has_tty, has_stdin })
    }

    /// Carries those of `session` until it has ended.
    ///
    /// # Errors
    /// The connection is lost; a stream here fails.
    pub fn carry(self, session: Session) -> Result<Code, Failure> {
        let Self { to, has_tty, has_stdin } = self;
        let host = |error| Failure::new(Code::Host, error);
        let _ = to.set(session.sender());
        let _raw = match has_tty && has_stdin {
            true => Some(Raw::take().context("make the terminal raw").map_err(host)?),
            false => None,
        };
        let file = |fd: &dyn AsFd| {
            fd.as_fd().try_clone_to_owned().map(File::from).context("open a stream").map_err(host)
        };
        let streams = Streams {
            // By the descriptors themselves: what the library would buffer is not the command's yet, or no more.
            stdin: if has_stdin { Some(Box::new(file(&std::io::stdin())?)) } else { None },
            stdout: Box::new(file(&std::io::stdout())?),
            stderr: Box::new(file(&std::io::stderr())?),
        };
        Ok(Code::Command(run(session, streams)?.code()))
    }
}

/// Starts the thread that hands signals to the command, and to `leave` what is for vmm itself.
fn pass_signals_on(
    to: Arc<OnceLock<Sender>>,
    has_tty: bool,
    leave: impl Fn(i32) + Send + 'static,
) -> std::io::Result<()> {
    let mut signals = Signals::new(FORWARDED.into_iter().chain([SIGWINCH, SIGCONT, SIGHUP]))?;
    thread::spawn(move || {
        let mut insisted: Vec<Instant> = Vec::new();
        let mut passed_on = None;
        for number in signals.forever() {
            let Some(sender) = to.get() else {
                if ![SIGWINCH, SIGCONT].contains(&number) {
                    leave(number);
                }
                continue;
            };
            let mut pass_on = |message| {
                let _ = passed_on.get_or_insert_with(|| queue(sender.clone())).send(message);
            };
            match number {
                SIGWINCH if has_tty => pass_on(Message::Resize(terminal::size())),
                SIGCONT if has_tty => {
                    let _ = terminal::set_raw();
                    pass_on(Message::Resize(terminal::size()));
                }
                SIGWINCH | SIGCONT => {}
                // Nobody is there any more. The agent hangs the command up when its client is gone.
                SIGHUP => leave(number),
                _ => {
                    if [SIGINT, SIGTERM].contains(&number) {
                        insisted.retain(|at| at.elapsed() < IMPATIENCE);
                        insisted.push(Instant::now());
                        if insisted.len() >= INSISTENT {
                            leave(number);
                        }
                    }
                    pass_on(Message::Signal(number as u8));
                }
            }
        }
    });
    Ok(())
}

/// What is sent in its turn, on a thread of its own: a guest that hangs takes nothing, and who insists is heard all the same.
fn queue(to: Sender) -> mpsc::Sender<Message<'static>> {
    let (give, take) = mpsc::channel();
    thread::spawn(move || take.iter().try_for_each(|message| to.send(&message)));
    give
}
