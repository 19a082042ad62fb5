//! `vmm agent install`: puts the agent into a guest's disk image or root folder, and has the guest's init start it.
//!
//! What goes where is one list ([`files`]), in the order in which it is written: what starts the agent comes last.

mod folder;
mod image;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, anyhow};

use vmm_command::{Code, Failure, print};

/// Where the agent goes.
const PROGRAM: &str = "/usr/local/sbin/vmm-agent";

/// An agent is less than 1 MiB, or twice that with a larger C library.
const MAX_PROGRAM: u64 = 4 << 20;

const UNIT: &[u8] = include_bytes!("../../../../guest/agent/vmm-agent.service");
const OPENRC: &[u8] = include_bytes!("../../../../guest/agent/vmm-agent.openrc");

/// What to install into.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false, id = "target")]
pub struct Target {
    /// Into the disk image of a guest that does not run: raw, with its root in an ext2, ext3 or ext4 file system, which may be in a
    /// partition. Needs no root and no mount, but debugfs (e2fsprogs)
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// Into the root file system that is mounted, or is to be, in this folder
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

/// The options of `vmm agent install`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    /// The agent's program [default: vmm-agent beside this vmm]
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
}

/// What starts services in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    Systemd,
    OpenRc,
}

impl Init {
    /// By the programs that `has` finds.
    fn find(has: impl Fn(&str) -> bool) -> Result<Self, Failure> {
        let any = |paths: &[&str]| paths.iter().any(|path| has(path));
        if any(&["/usr/lib/systemd/systemd", "/lib/systemd/systemd"]) {
            Ok(Self::Systemd)
        } else if any(&["/sbin/openrc-run", "/usr/sbin/openrc-run"]) {
            Ok(Self::OpenRc)
        } else {
            let hint = "copy vmm-agent into the guest, and have its own init start it (docs/agent.md)";
            Err(bad("the guest has neither systemd nor OpenRC").hint(Some(hint)))
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::OpenRc => "OpenRC",
        }
    }
}

/// A file of the guest, or a symlink.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    /// From the guest's root.
    path: &'static str,
    content: Content<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Content<'a> {
    File { bytes: &'a [u8], mode: u16 },
    Link(&'static str),
}

/// What an installed agent consists of.
fn files(program: &[u8], init: Init) -> [Entry<'_>; 3] {
    let file = |path, bytes, mode| Entry { path, content: Content::File { bytes, mode } };
    let link = |path, to| Entry { path, content: Content::Link(to) };
    let program = file(PROGRAM, program, 0o755);
    match init {
        Init::Systemd => {
            const AT: &str = "/etc/systemd/system/vmm-agent.service";
            const WANTED: &str = "/etc/systemd/system/multi-user.target.wants/vmm-agent.service";
            [program, file(AT, UNIT, 0o644), link(WANTED, AT)]
        }
        Init::OpenRc => {
            const AT: &str = "/etc/init.d/vmm-agent";
            [program, file(AT, OPENRC, 0o755), link("/etc/runlevels/default/vmm-agent", AT)]
        }
    }
}

/// `vmm agent install`.
///
/// # Errors
/// The image or folder is none that can be installed into, or is in use; there is no agent, no debugfs or no room.
pub fn install(options: Options) -> Result<Code, Failure> {
    let program = program(options.agent)?;
    let (init, place) = match options.target {
        Target { disk: Some(path), .. } => (image::install(&path, &program)?, path),
        Target { root: Some(path), .. } => (folder::install(&path, &program)?, path),
        // Clap asks for one of them.
        Target { disk: None, root: None } => return Err(bad("no place to install into")),
    };
    let place = place.display();
    print(&format!("{place}: {PROGRAM} is installed, and {} starts it\n", init.name()))?;
    Ok(Code::Success)
}

/// The agent's program, as far as one can see that it is one.
fn program(path: Option<PathBuf>) -> Result<Vec<u8>, Failure> {
    const HINT: &str = "make it: cargo guest -- agent --out vmm-agent; then name it: --agent vmm-agent";
    let host = |error| Failure::new(Code::Host, error);
    let path = match path {
        Some(path) => path,
        None => {
            std::env::current_exe().context("find this program").map_err(host)?.with_file_name("vmm-agent")
        }
    };
    let read = || format!("read the agent's program {}", path.display());
    let failed = |error| Failure::new(Code::BadArgument, error).hint(Some(HINT));
    let metadata = fs::metadata(&path).with_context(read).map_err(failed)?;
    let is_file = metadata.is_file() && metadata.len() <= MAX_PROGRAM;
    let bytes = if is_file { fs::read(&path).with_context(read).map_err(failed)? } else { Vec::new() };
    // An ELF file of 64 bits for x86-64 (e_ident, e_machine).
    if !bytes.starts_with(b"\x7fELF\x02\x01") || bytes.get(18..20) != Some(&[62, 0]) {
        return Err(failed(anyhow!("{} is no agent: no program for x86-64", path.display())));
    }
    Ok(bytes)
}

fn bad(text: impl Into<String>) -> Failure {
    Failure::new(Code::BadArgument, anyhow!(text.into()))
}
