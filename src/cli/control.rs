//! `vmm status`, `pause`, `resume`, `stop`, `kill`: one command to running virtual machines.

use std::fmt::Write;
use std::thread;
use std::time::Duration;

use super::agent::Reach;
use super::list::uptime;
use super::wait::{for_each, worse};
use vmm_agent::protocol::Request;
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::api::client::Client;
use vmm_monitor::api::protocol::Command;
use vmm_monitor::api::registry::Registry;
use vmm_monitor::api::{Error, Status};
use vmm_monitor::config::Size;
use vmm_monitor::kvm::VcpuState;
use vmm_monitor::net::traffic::Counts;

/// How much longer than the guest's own time to wait for the monitor's end.
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// How long a guest has to heed its power button, before its agent is asked.
const BUTTON: Duration = Duration::from_secs(3);

/// The options of a command to one virtual machine.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// Print the virtual machine's status as JSON
    #[arg(long)]
    json: bool,
}

/// The options of a command to virtual machines.
#[derive(Debug, clap::Args)]
pub struct AllOptions {
    /// The virtual machines' names, as vmm list shows them
    #[arg(required = true)]
    names: Vec<String>,
    /// Print each virtual machine's status as JSON
    #[arg(long)]
    json: bool,
}

/// The options of `vmm stop`.
#[derive(Debug, clap::Args)]
pub struct StopOptions {
    #[command(flatten)]
    options: AllOptions,
    /// Kill a guest if it has not powered off after so many seconds [default: the --stop-timeout it was started with]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Kill the guests at once, as vmm kill does
    #[arg(long, conflicts_with = "timeout")]
    force: bool,
}

/// The options of `vmm status`.
#[derive(Debug, clap::Args)]
pub struct StatusOptions {
    #[command(flatten)]
    options: Options,
    /// Show what each virtual CPU does or waits for: run state, local APIC, timer, pending interrupts. They stop for a moment
    #[arg(long)]
    vcpus: bool,
}

/// `vmm status`.
pub fn status(options: StatusOptions) -> Result<Code, Failure> {
    let StatusOptions { options, vcpus } = options;
    if vcpus {
        let states = connect(&options.name)?.vcpus()?;
        print(&if options.json { pretty(&states)? } else { states.iter().map(vcpu).collect() })?;
        return Ok(Code::Success);
    }
    let status = connect(&options.name)?.ask(Command::Status)?;
    print(&if options.json { pretty(&status)? } else { text(&status) })?;
    Ok(Code::Success)
}

/// `vmm pause`.
pub fn pause(options: AllOptions) -> Result<Code, Failure> {
    Ok(for_each(&options.names, |name| order(name, options.json, Command::Pause).map(drop)))
}

/// `vmm resume`.
pub fn resume(options: AllOptions) -> Result<Code, Failure> {
    Ok(for_each(&options.names, |name| order(name, options.json, Command::Resume).map(drop)))
}

/// `vmm kill`.
pub fn kill(options: AllOptions) -> Result<Code, Failure> {
    Ok(end(&options, Command::Kill, Some(Duration::ZERO)))
}

/// `vmm stop`.
pub fn stop(options: StopOptions) -> Result<Code, Failure> {
    if options.force {
        return kill(options.options);
    }
    let timeout_seconds = options.timeout;
    options.options.names.iter().for_each(|name| ask_in_a_while(name));
    Ok(end(&options.options, Command::Stop { timeout_seconds }, timeout_seconds.map(Duration::from_secs)))
}

/// Has the agent of a guest that does not heed its power button shut it down, if it has one: by a thread, so that the machine's end
/// is waited for as before.
fn ask_in_a_while(name: &str) {
    let name = name.to_owned();
    thread::spawn(move || {
        thread::sleep(BUTTON);
        // Whatever is wrong with the agent, the timeout of the stop will do.
        let _ = Reach::default().guest(&name).map(|guest| guest.again().order(Request::ShutDown));
    });
}

/// Connects to the virtual machine called `name`.
pub(super) fn connect(name: &str) -> Result<Client, Error> {
    Client::connect(&Registry::of_user(), name)
}

/// Gives one machine an order.
fn order(name: &str, json: bool, command: Command) -> Result<Client, Failure> {
    let mut client = connect(name)?;
    if command == Command::Kill {
        client.wake();
    }
    let status = client.ask(command)?;
    if json {
        print(&pretty(&status)?)?;
    }
    Ok(client)
}

/// Has the machines end, all at once, and waits for that: `timeout` is the time that a guest has, if it is known here.
fn end(options: &AllOptions, command: Command, timeout: Option<Duration>) -> Code {
    let mut told = Vec::new();
    let order = |name: &String| order(name, options.json, command.clone()).map(|client| told.push(client));
    let ordered = for_each(&options.names, order);
    let limit = timeout.map_or(Duration::MAX, |timeout| timeout.saturating_add(GRACE));
    worse(ordered, for_each(told, |client| Ok(client.wait_for_end(limit)?)))
}

/// A vCPU on lines of its own.
fn vcpu(state: &VcpuState) -> String {
    let list = |vectors: &[u8]| match vectors {
        [] => "none".to_owned(),
        _ => vectors.iter().map(|vector| format!("{vector:#x}")).collect::<Vec<_>>().join(" "),
    };
    let pending = if state.pending.is_empty() { "nothing".to_owned() } else { state.pending.join(", ") };
    format!(
        "vcpu{}  {}, rip {:#x}, interrupts {}\n       local APIC {}, TPR {:#x}, IRR {}, ISR {}\n       timer {}\n       pending {}\n",
        state.vcpu,
        state.run,
        state.rip,
        if state.takes_interrupts { "on" } else { "off" },
        if state.apic_enabled { "on" } else { "off" },
        state.tpr,
        list(&state.requested),
        list(&state.in_service),
        state.timer,
        pending
    )
}

fn text(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{key:<8} {value}");
    };
    line("name", &status.name);
    line("pid", &status.pid);
    line("state", &status.state);
    line("uptime", &uptime(status.uptime_seconds));
    line("cpus", &status.cpus);
    line("memory", &Size::from_bytes(status.memory_bytes));
    if let Some(kernel) = &status.kernel {
        line("kernel", &kernel.display());
    }
    if let Some(vsock) = &status.vsock {
        line("vsock", &vsock.display());
    }
    if let Some(cid) = status.vsock_cid {
        line("vsock", &format_args!("address {cid}"));
    }
    line("sandbox", &status.sandbox);
    if let Some(cgroup) = &status.cgroup {
        line("cgroup", &cgroup.display());
    }
    for pty in &status.ptys {
        line("pty", &format_args!("{} ({})", pty.path.display(), pty.device));
    }
    for net in &status.networks {
        let counts = |counts: &Counts| format!("{} frames, {} bytes", counts.frames, counts.bytes);
        let dropped = net.received.dropped.total().saturating_add(net.sent.dropped.total());
        line(
            "net",
            &format_args!(
                "{} ({}{}): received {}; sent {}; dropped {dropped}",
                net.device,
                net.to,
                if net.up { "" } else { ", down" },
                counts(&net.received),
                counts(&net.sent),
            ),
        );
    }
    text
}
