//! Start: from the call that starts a process to the first output of the program that it was started for, and to its end.

use super::{merge, own_mounts};
use crate::host::Host;
use crate::measure::{self, Absent, Contender, Plan, Quantity, span};
use crate::result::{Better, Suite, Unit};
use crate::rivals::idle::Instances;
use crate::rivals::program::Root;
use crate::rivals::{self, Life, RAM_MIB, Rival, Setting};

const QUANTITIES: [Quantity; 2] = [
    Quantity { name: "exec to first output", unit: Unit::Milliseconds, better: Better::Lower },
    Quantity { name: "exec to exit", unit: Unit::Milliseconds, better: Better::Lower },
];

/// Runs the suite.
///
/// # Errors
/// The root file system cannot be made.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let hidden = own_mounts();
    let root = Root::make(&setting.scratch)?;
    // Dropped last: an engine's client that was killed leaves others behind.
    let _strays = Instances::none()?;
    let (mut contenders, mut absent): (Vec<Box<dyn Contender>>, Vec<Absent>) = Default::default();
    for found in rivals::all(setting, &root) {
        match found {
            Ok(rival) => contenders.push(Box::new(Start(rival))),
            Err(missing) => absent.push(missing),
        }
    }
    let (contenders, figures) = if setting.repeatable_clock {
        // Nothing warms up and nothing is random: each stands for itself, and whoever joins or leaves changes no other's figures.
        let plan = Plan { samples: 2, warm_up: 0, ..plan };
        let count = contenders.len() as f64;
        let parts = contenders.into_iter().enumerate().map(|(index, contender)| {
            let mut part = |share: f64, whose: &str| progress((index as f64 + share) / count, whose);
            measure::series(&mut [contender], &[], &QUANTITIES, plan, &mut part)
        });
        let parts = parts.collect::<Vec<_>>();
        let none = measure::series(&mut [], &absent, &QUANTITIES, plan, &mut |_, _| {});
        merge(parts.into_iter().chain([none]))
    } else {
        measure::series(&mut contenders, &absent, &QUANTITIES, plan, progress)
    };
    Ok(Suite {
        name: "boot".to_owned(),
        title: "Start: from the call that starts it to its first output, and until it is gone".to_owned(),
        host,
        seed: plan.seed,
        method: method(hidden, setting.repeatable_clock),
        contenders,
        figures,
    })
}

fn method(hidden: bool, repeatable: bool) -> Vec<String> {
    let mut method = vec![
        "Everyone starts the same static program of some 300 bytes on the same root file system: it writes one line and ends. As \
         PID 1 of a VM it powers the machine off."
            .to_owned(),
        "The span begins with the call that starts the contender's process, on the host's monotonic clock, and ends when the line \
         is read from its standard output (first output), and when its process is gone (exit)."
            .to_owned(),
        "The bare container is made by system calls of the measuring process: no runtime's own start is in it, so it is a lower \
         bound for any container."
            .to_owned(),
        format!("VMs have 1 CPU and {RAM_MIB} MiB. The line comes through the virtio console of vmm and QEMU; in Firecracker, Cloud \
         Hypervisor, kvmtool and alioth the program writes it to the serial port itself, without a driver, which is the least that it can \
         cost there."),
        "Restored: a virtual machine that was saved by vmm snapshot when its first program had started, and that goes on as that \
         becomes, by execve, the program that everyone starts. The snapshot is made once, before the first sample; the page cache has \
         it. The one without Linux has written to 24 MiB before."
            .to_owned(),
        "The stock kernel is a distribution's, as its package has it, a bzImage; all others boot the small kernel, an uncompressed \
         vmlinux except for kvmtool."
            .to_owned(),
        "\"No Linux\" is a guest of five instructions (of six where a port with a longer number ends the machine): what is left is the monitor's own start and end, and KVM's. It is not to be \
         compared with a container."
            .to_owned(),
    ];
    if hidden {
        method.push(
            "This host's cgroup layout is a hybrid: version 2's mount was hidden from all contenders, since crun refuses it."
                .to_owned(),
        );
    }
    if repeatable {
        method.push(
            "The clock counts instructions, 1 ns each. The two samples are the first and the second start, in this order."
                .to_owned(),
        );
    }
    method
}

/// A rival that is started and waited for.
struct Start(Box<dyn Rival>);

impl Contender for Start {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn command(&self) -> String {
        self.0.shown()
    }

    fn version(&self) -> Option<String> {
        self.0.version()
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let command = self.0.command(Life::Once)?;
        let span = span::measure(command, &[self.0.marker()], self.0.limit(), &mut |_, _| Ok(()))?;
        if span.status.code() != Some(self.0.good_status()) {
            return Err(format!("{} said its line, but ended badly: {}", self.name(), span.status));
        }
        Ok([span.marks[0], span.exit].map(|time| time.as_secs_f64() * 1e3).to_vec())
    }
}
