//! PID 1 of guests, as a library: everything but the entry point, so that it builds, lints and tests like any crate.
//! `src/bin/guest-init.rs` calls [`run`]; `cargo guest -- initramfs` builds that program. It has no libc, no heap and no
//! formatting: it should cost a booting guest as few pages and instructions as it can.
//!
//! A run, top to bottom: mount what every program expects, read the orders from the kernel command line, load modules,
//! open the console, switch to another root if asked, start the agent if there is one, run the command (or a shell), wait for
//! its end or for the power button, report the exit code, end the machine.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod agent;
pub mod console;
pub mod finish;
pub mod kernel;
pub mod mounts;
pub mod orders;
pub mod program;
pub mod vsock;
pub mod watch;

use agent::Agent;
use finish::Outcome;
use interface::share;
use orders::Orders;
use watch::Watch;

/// The line that says: user space runs. Boot benchmarks wait for it.
pub const MARKER: &[u8] = b"guest: init";

/// The boot mark that says: the guest is ready. Templates are made then.
pub const READY: u8 = 123;

/// Room for /proc/cmdline: x86 keeps 2048 bytes.
const COMMAND_LINE_SIZE: usize = 4096;

/// The whole life of PID 1. `environment` is the `envp` that the kernel gave.
///
/// # Safety
/// `environment` must be a NULL-terminated array of pointers to C strings, valid for the rest of the process, and the
/// process must have one thread.
pub unsafe fn run(environment: *const *const u8) -> ! {
    mounts::mount_first();
    let mut buffer = [0; COMMAND_LINE_SIZE];
    let line = mounts::read_file(c"/proc/cmdline", &mut buffer);
    let orders = Orders::parse(line);
    if let Some(port) = orders.mark {
        kernel::write_port(port, 1);
    }
    // The kernel's own stdio is /dev/console already, unless its driver is a module that is yet to come.
    let marked = !orders.marker || console::say(&[MARKER]);
    mounts::mount_rest();
    mounts::load_modules(c"/lib/modules.load");
    if share::all(line).next().is_some() {
        mounts::load_modules(c"/lib/modules.share");
    }
    console::open(orders.console);
    if !marked {
        console::say(&[MARKER]);
    }
    if let Some(word) = orders.unknown {
        console::say(&[b"guest-init: did not understand ", word]);
    }
    let _ = rustix::system::sethostname(b"guest");
    // A kernel without a network has none.
    let _ = interface::start_loopback();
    if let Some(ip) = &orders.ip {
        mounts::set_up_network(ip);
    }
    let watch = Watch::start();
    let agent = Agent::find();
    let rooted = orders.root.is_none_or(|root| mounts::switch_root(root, &orders));
    if let Some(dns) = orders.ip.and_then(|ip| ip.dns) {
        mounts::name_resolver(dns);
    }
    for share in share::all(line).filter(|_| rooted) {
        if let Err(error) = share.mount() {
            console::complain(b"mount", share.tag, error);
        }
    }
    let mut agent = agent.filter(|_| rooted);
    if let Some(agent) = &mut agent {
        // SAFETY: this function's own contract.
        unsafe { agent.start() };
    }
    if let Some(port) = orders.ready.filter(|_| rooted) {
        kernel::write_port(port, READY);
    }
    let child = match rooted {
        // SAFETY: this function's own contract.
        true => unsafe { program::start(orders.command, environment) },
        false => None,
    };
    let outcome = match child {
        // SAFETY: this function's own contract.
        Some(child) => unsafe { watch.until_end_of(child, orders.end, agent) },
        None => Outcome { code: Some(finish::NOT_RUN), end: orders.end, child: None },
    };
    finish::finish(&orders, outcome, &watch)
}
