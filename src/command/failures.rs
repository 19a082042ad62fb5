//! Maps each library's errors to an exit code and a hint.

use std::io::ErrorKind;

use vmm_agent::client;
use vmm_agent::protocol::Reason;
use vmm_monitor::sandbox::limits;
use vmm_monitor::{api, config, machine, output, session, snapshot};
use vmm_trace::debug::gdb;
use vmm_trace::{file, lab, symbols};

use crate::{Code, Failure};

impl From<config::Invalid> for Failure {
    fn from(error: config::Invalid) -> Self {
        let hint = error.hint.clone();
        Self::new(Code::BadArgument, error).hint(Some(hint))
    }
}

impl From<api::Error> for Failure {
    fn from(error: api::Error) -> Self {
        let hint = error.hint();
        Self::new(Code::Host, error).hint(hint)
    }
}

impl From<machine::Error> for Failure {
    fn from(error: machine::Error) -> Self {
        let hint = error.hint().map(|hint| hint.into_owned());
        let code = if error.is_bad_argument() { Code::BadArgument } else { Code::Host };
        Self::new(code, error).hint(hint)
    }
}

const DELEGATE: &str = "start it in a cgroup that is delegated to you: systemd-run --user --scope -p Delegate=yes vmm run ...; \
                        as root, drop --user, or name a new cgroup: --cgroup /vmm/NAME";

impl From<limits::Error> for Failure {
    fn from(error: limits::Error) -> Self {
        use limits::Error::{Affinity, Caretaker, Cores, Cpu, Disk, File, NoCgroups, NoController, Path};
        let hint = match &error {
            NoCgroups => Some("mount one: mount -t cgroup2 none /sys/fs/cgroup"),
            NoController { is_root: true, .. } => Some(
                "this host has its controllers in cgroup version 1, or none; boot it with systemd.unified_cgroup_hierarchy=1",
            ),
            NoController { .. } => Some(DELEGATE),
            Path(_) => Some("write --cgroup /vmm/NAME, or --cgroup NAME for one below the caller's own"),
            File { path, source, .. } => match source.kind() {
                ErrorKind::ResourceBusy if path.ends_with("cgroup.subtree_control") => Some(
                    "other processes are in that cgroup (see its cgroup.procs), and then it can have no limited children. Start vmm \
                     in one of its own: systemd-run --scope -p Delegate=yes vmm run ... (with --user unless you are root)",
                ),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Some(DELEGATE),
                _ => None,
            },
            Disk { .. } => {
                Some("name a file on the disk, its device, or its number (lsblk): --io-max /dev/sda,rbps=10M")
            }
            Cpu { .. } => Some("write --pin 0-1, or --pin 0:0,1:1 (vCPU 0 on CPU 0, vCPU 1 on CPU 1)"),
            Cores(_) => Some(
                "it needs Linux 5.14 with CONFIG_SCHED_CORE, and CPUs whose cores have several threads (SMT)",
            ),
            Caretaker(_) | Affinity(_) => None,
        };
        let code = if error.is_bad_argument() { Code::BadArgument } else { Code::Host };
        Self::new(code, error).hint(hint)
    }
}

impl From<snapshot::Error> for Failure {
    fn from(error: snapshot::Error) -> Self {
        let code = match &error {
            snapshot::Error::File { what: "write", .. } => Code::Host,
            _ => Code::BadArgument,
        };
        let hint = error.hint();
        Self::new(code, error).hint(hint)
    }
}

impl From<file::Error> for Failure {
    fn from(error: file::Error) -> Self {
        let (code, hint) = match &error {
            file::Error::Io { what: "write", .. } => {
                (Code::Host, "make room for it, or limit it: --trace FILE,max=SIZE".to_owned())
            }
            file::Error::Io { what: "read", .. } | file::Error::Format { .. } => {
                (Code::BadArgument, "record one: vmm --trace FILE --kernel vmlinux".to_owned())
            }
            file::Error::Io { path, source, .. } => {
                (Code::BadArgument, output::hint(path, source, "boot.trace"))
            }
        };
        Self::new(code, error).hint(Some(hint))
    }
}

impl From<symbols::Error> for Failure {
    fn from(error: symbols::Error) -> Self {
        let hint = match error {
            symbols::Error::Read { .. } | symbols::Error::None { .. } => {
                "drop --symbols to use the guest's own, if its kernel has them"
            }
            symbols::Error::OtherKernel { .. } => "to use them as they are, add --kaslr-offset 0",
        };
        Self::new(Code::BadArgument, error).hint(Some(hint))
    }
}

impl From<lab::Error> for Failure {
    fn from(error: lab::Error) -> Self {
        match error {
            lab::Error::Session(error) => error.into(),
            lab::Error::Trace(error) => error.into(),
            error @ lab::Error::Host { .. } => Self::new(Code::Host, error),
        }
    }
}

impl From<gdb::Error> for Failure {
    fn from(error: gdb::Error) -> Self {
        let code = if error.is_bad_argument() { Code::BadArgument } else { Code::Host };
        let hint = error.hint();
        Self::new(code, error).hint(hint)
    }
}

impl From<session::Error> for Failure {
    fn from(error: session::Error) -> Self {
        match error {
            session::Error::Machine(error) => error.into(),
            session::Error::Api(error) => error.into(),
            error @ session::Error::Unwanted => Self::new(Code::Host, error),
            session::Error::Sandbox(error) => {
                let hint = error.hint();
                Self::new(Code::Host, session::Error::Sandbox(error)).hint(Some(hint))
            }
            session::Error::Observer(error) => match error.downcast::<file::Error>() {
                Ok(error) => (*error).into(),
                Err(error) => match error.downcast::<machine::Error>() {
                    Ok(error) => (*error).into(),
                    Err(error) => Self::new(Code::Host, anyhow::Error::from_boxed(error)),
                },
            },
        }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let (code, hint) = match &error {
            client::Error::Failed { reason: Reason::NotFound, .. } => (Code::Command(Code::NOT_FOUND), None),
            client::Error::Failed { reason: Reason::CannotRun, .. } => {
                (Code::Command(Code::CANNOT_RUN), None)
            }
            client::Error::Failed { reason: Reason::Busy, .. } => {
                (Code::Host, Some("try again when some of them have ended"))
            }
            client::Error::PortTaken { .. } => (
                Code::Host,
                Some("the port serves one command at a time; start the VM with --vsock for many"),
            ),
            client::Error::Version { .. } | client::Error::NoAgent(_) => {
                (Code::Host, Some("install the agent that came with this vmm (docs/agent.md)"))
            }
            client::Error::Lost(_) => (Code::Host, Some("see whether it still runs: vmm list")),
            client::Error::Socket { .. } | client::Error::Vsock { .. } => {
                (Code::Host, Some("see whether it still runs: vmm list"))
            }
            client::Error::TooLong(_) => {
                (Code::BadArgument, Some("pass them in a file, or on standard input: -i"))
            }
            _ => (Code::Host, None),
        };
        Self::new(code, error).hint(hint)
    }
}
