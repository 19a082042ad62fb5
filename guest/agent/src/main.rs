//! The agent in a guest: runs commands for `vmm exec` and its like on the host, by the protocol of src/agent
//! (docs/agent.md). One thread for each session, and one process; a session that is stuck holds up no other.
//!
//! `vmm-agent` listens on vsock, and on the console port `vmm.agent` if the guest has it; `vmm-agent --unix PATH` on a unix socket,
//! for tests and containers. It says what it has to
//! say on stderr before it listens, and nothing after: an agent that waits for its own log is none.

mod change;
mod job;
mod listen;
mod orders;
mod others;
mod output;
mod port;
mod process;
mod renewal;
mod session;
mod users;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use interface::share;
use vmm_agent::port::NAME;
use vmm_agent::protocol::PORT;
use vmm_agent::tar;

const USAGE: &str = "usage: vmm-agent [--unix PATH]";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let arguments: Vec<&[u8]> = arguments.iter().map(|argument| argument.as_bytes()).collect();
    if arguments.is_empty() {
        mount_shares();
        others::start();
    }
    let result = match arguments[..] {
        [] => match (listen::vsock(PORT), port::find()) {
            (Err(error), None) => {
                Err(format!("no console port {NAME}, and no way to listen on vsock port {PORT}: {error}"))
            }
            (Err(_), Some(port)) => {
                port::serve(port);
                return ExitCode::FAILURE;
            }
            (Ok(listener), port) => {
                if let Some(port) = port {
                    // Without a thread for it there is the other way.
                    let _ = thread::Builder::new().stack_size(listen::STACK).spawn(|| port::serve(port));
                }
                Ok(listener)
            }
        },
        [b"--unix", path] => {
            listen::unix(path).map_err(|error| format!("listen on {}: {error}", path.escape_ascii()))
        }
        // What the agent runs itself as, for each archive and renewal: its streams are then pipes like any command's.
        [process::PACK, path, name] => return archive(tar::pack(path, name, std::io::stdout())),
        [process::UNPACK, path, owners, rename] => {
            let (owners, rename) = (owners == process::YES, rename == process::YES);
            let policy = tar::Policy { owners, devices: true, rename };
            return archive(tar::unpack(std::io::stdin(), path, policy));
        }
        [process::RENEW, generation, machine_id] => {
            return renewal::run(Path::new("/"), generation, machine_id == process::YES);
        }
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(listener) => {
            listen::serve(&listener);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("vmm-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Mounts the folders of the host's that the kernel command line tells of, unless somebody has.
fn mount_shares() {
    let line = std::fs::read("/proc/cmdline").unwrap_or_default();
    for share in share::all(&line) {
        if let Err(error) = share.mount() {
            let (tag, place) = (share.tag.escape_ascii(), share.place.escape_ascii());
            eprintln!("vmm-agent: mount {tag} at {place}: {error}");
        }
    }
}

fn archive(result: Result<(), tar::Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
