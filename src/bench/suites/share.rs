//! What sharing a folder costs a program inside: ours, and virtiofsd behind QEMU, with one kernel; and natively.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::command::version;
use super::super::rivals::{Helper, Place, Setting, Size, qemu};
use super::super::work::guest::SHARE;
use super::super::work::{Act, Step};
use super::places::{self, Measured, shown};

const TAG: &str = "share0";
/// A file system in memory, so that no disk is measured.
const MEMORY: &str = "/dev/shm";
/// Bytes of the file that requests are made to.
const LARGE: usize = 16 << 20;
const FILES: u64 = 512;
/// And pages.
const REQUESTS: u64 = 2048;

/// What is done, in this order, and what it is to people.
const WORK: [(What, &str); 12] = [
    (What::Tree(Act::Unpack), "tar x, a file"),
    (What::Tree(Act::Status), "git status, a file"),
    (What::Tree(Act::Find), "find -size, a file"),
    (What::Tree(Act::Cat), "cat, a file"),
    (What::Tree(Act::Remove), "rm -r, a file"),
    (What::Requests { random: false, write: false, cached: true }, "read in order, 4 KiB"),
    (What::Requests { random: false, write: true, cached: true }, "write in order, 4 KiB"),
    (What::Requests { random: true, write: true, cached: true }, "write at random, 4 KiB"),
    (What::Requests { random: false, write: false, cached: false }, "read in order past the cache, 4 KiB"),
    (What::Requests { random: true, write: false, cached: false }, "read at random past the cache, 4 KiB"),
    (What::Requests { random: true, write: true, cached: false }, "write at random past the cache, 4 KiB"),
    (What::Tree(Act::Map), "mmap, a page"),
];

/// The exits of all VMs of this host so far, if KVM tells.
fn exits() -> Option<f64> {
    fs::read_to_string("/sys/kernel/debug/kvm/exits").ok()?.trim().parse().ok()
}

#[derive(Debug, Clone, Copy)]
enum What {
    Tree(Act),
    Requests { random: bool, write: bool, cached: bool },
}

/// Who serves the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    /// Nobody: the program is a process of the host's.
    None,
    Vmm,
    Virtiofsd,
}

/// Who takes part, and what the guest's kernel believes for how long.
const CONTENDERS: [(&str, Server, &str); 5] = [
    ("native", Server::None, ""),
    ("vmm: cache=auto", Server::Vmm, "auto"),
    ("virtiofsd: cache=auto", Server::Virtiofsd, "auto"),
    ("vmm: cache=always", Server::Vmm, "always"),
    ("virtiofsd: cache=always", Server::Virtiofsd, "always"),
];

/// How many files, and how many requests or pages. A process does more: it is done so soon.
fn counts(server: Server) -> (u64, u64) {
    let times = if server == Server::None { 8 } else { 1 };
    (times * FILES, times * REQUESTS)
}

/// The suite.
///
/// # Errors
/// Nobody can take part here.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let unit = if setting.repeatable_clock { Unit::Instructions } else { Unit::Nanoseconds };
    let has_exits = exits().is_some();
    let units = if has_exits { &[unit, Unit::Exits][..] } else { &[unit] };
    let of_unit = |unit: &Unit| WORK.map(|(_, name)| Quantity { name, unit: *unit, better: Better::Lower });
    let quantities: Vec<_> = units.iter().flat_map(of_unit).collect();
    let (mut contenders, mut absent): (Vec<Box<dyn Contender + '_>>, Vec<Absent>) = Default::default();
    for who in CONTENDERS {
        match Sharing::new(who, unit, has_exits, setting) {
            Ok(contender) => contenders.push(Box::new(contender)),
            Err(why) => absent.push(Absent { name: who.0.to_owned(), command: format!("{who:?}"), why }),
        }
    }
    let (contenders, mut figures) = measure::series(&mut contenders, &absent, &quantities, plan, progress);
    for figure in figures.iter_mut().filter(|figure| figure.unit == Unit::Exits) {
        figure.name += ": exits";
        // A process has none.
        figure.series.retain(|series| series.who != CONTENDERS[0].0);
        figure.baseline = figure.series.first().map(|series| series.who.clone());
    }
    Ok(Suite {
        name: "share".to_owned(),
        title: "Shared folders: native, vmm, virtiofsd".to_owned(),
        host,
        seed: plan.seed,
        method: method(setting, has_exits),
        contenders,
        figures,
    })
}

fn method(setting: &Setting, has_exits: bool) -> Vec<String> {
    let (files, requests) = counts(Server::Vmm);
    let mut method = vec![
        format!(
            "One sample is a process, or a VM, that does all of it in this order: with {files} files of 2 KiB in folders of 32 the calls \
             that tar, git, find, cat and rm make, one after the other, and {requests} requests to a file of {} MiB. The programs' own \
             work is left out; native does eight times as much. Writes end with an fdatasync, which counts.",
            LARGE >> 20
        ),
        "The guest's kernel forgets all files before each piece of work with files and with the mapping; the host's does not, so native \
         finds everything in its caches. \"Past the cache\" is O_DIRECT in the guest."
            .to_owned(),
        "The folder is in the host's memory (tmpfs), where there is one. vmm and QEMU have the same kernel and initramfs, one CPU and 128 MiB; \
         virtiofsd has no pool of threads, which is its fastest for one program, and QEMU a queue of 1024."
            .to_owned(),
        if setting.repeatable_clock {
            "A nanosecond of the host's clock is an instruction, of the guest, of the monitors, of virtiofsd or of the host's kernel: all \
             are counted."
                .to_owned()
        } else {
            places::CLOCK.to_owned()
        },
    ];
    method.push(
        match has_exits {
            true => "Exits are those of all VMs of this host meanwhile, as KVM counts them, ticks included.",
            false => {
                "Exits are not counted: KVM tells in /sys/kernel/debug/kvm, if there is one, and only root."
            }
        }
        .to_owned(),
    );
    method.extend(Place::tick());
    method
}

/// One that takes part, with a folder of its own.
struct Sharing<'a> {
    name: &'static str,
    server: Server,
    cache: &'static str,
    setting: &'a Setting,
    unit: Unit,
    has_exits: bool,
    folder: PathBuf,
    /// QEMU and virtiofsd.
    programs: Option<(PathBuf, PathBuf)>,
}

impl Drop for Sharing<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl<'a> Sharing<'a> {
    fn new(
        (name, server, cache): (&'static str, Server, &'static str),
        unit: Unit,
        has_exits: bool,
        setting: &'a Setting,
    ) -> Result<Self, String> {
        let programs = match server {
            Server::Virtiofsd => Some((setting.find(qemu::PROGRAM)?, setting.find("virtiofsd")?)),
            _ => None,
        };
        if server != Server::None {
            setting.tuned_kernel()?;
        }
        let above = Path::new(MEMORY);
        let above = if above.is_dir() { above } else { &setting.scratch };
        let folder = above.join(format!("vmm-bench-{}-{server:?}-{cache}", std::process::id()));
        let made = fs::create_dir(&folder);
        made.map_err(|error| format!("make {}: {error}", folder.display()))?;
        Ok(Self { name, server, cache, setting, unit, has_exits, folder, programs })
    }

    /// The work, in the folder as the program sees it.
    fn work(&self) -> Vec<Measured> {
        let at = if self.server == Server::None { &self.folder } else { Path::new(SHARE) };
        let (files, requests) = counts(self.server);
        let measured = |(what, name): (What, _)| {
            let step = match what {
                What::Tree(Act::Map) => Step::Tree(Act::Map, requests, at.join("mapped")),
                What::Tree(act) => Step::Tree(act, files, at.join("tree")),
                What::Requests { random, write, cached } => {
                    Step::Block { random, write, cached, count: requests, path: at.join("large") }
                }
            };
            let quantity = Quantity { name, unit: self.unit, better: Better::Lower };
            Measured { step, quantity, value: |step, seconds| each(step, seconds * 1e9) }
        };
        WORK.into_iter().map(measured).collect()
    }

    /// The folder as it is at first.
    fn anew(&self) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("prepare {}: {error}", self.folder.display());
        let tree = self.folder.join("tree");
        if tree.exists() {
            fs::remove_dir_all(tree).map_err(failed)?;
        }
        for name in ["large", "mapped"] {
            fs::write(self.folder.join(name), vec![0x5a; LARGE]).map_err(failed)?;
        }
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.setting.scratch.join(format!("{:?}-{}.sock", self.server, self.cache))
    }

    /// What virtiofsd says.
    fn complaints(&self) -> PathBuf {
        self.socket().with_extension("err")
    }

    fn daemon(&self) -> Option<Command> {
        let (_, program) = self.programs.as_ref()?;
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", self.socket().display()));
        // As both the one of QEMU's and the one in Rust take it.
        command.arg("-o").arg(format!("source={}", self.folder.display()));
        command.args([
            "-o",
            &format!("cache={}", self.cache),
            "-o",
            "sandbox=chroot",
            "--thread-pool-size=0",
        ]);
        Some(command)
    }

    fn start(&self) -> Result<Command, String> {
        let steps: Vec<String> = self.work().iter().map(|measured| measured.step.to_string()).collect();
        let mut arguments = vec!["--share", TAG];
        arguments.extend(steps.iter().map(String::as_str));
        let size = Size { cpus: 1, mib: super::super::rivals::RAM_MIB };
        match &self.programs {
            None if self.server == Server::None => Place::Native.command(self.setting, &arguments[2..], size),
            None => {
                let mut command = Place::Vm.command(self.setting, &arguments, size)?;
                let folder = self.folder.display();
                command.arg("--share").arg(format!("{folder},tag={TAG},cache={}", self.cache));
                Ok(command)
            }
            Some((qemu, _)) => {
                let (kernel, initramfs) = Place::guest(self.setting)?;
                let cmdline = Place::cmdline(&arguments);
                let mut command = Command::new(qemu);
                command.args(qemu::linux_machine(
                    &kernel.to_string_lossy(),
                    &initramfs.to_string_lossy(),
                    &cmdline,
                    qemu::STDIO,
                ));
                command.args(qemu::shared(&self.socket(), TAG));
                Ok(command)
            }
        }
    }

    /// What serves the folder to QEMU, once it listens.
    fn serve(&self) -> Result<Option<Helper>, String> {
        let Some(mut command) = self.daemon() else { return Ok(None) };
        command.stderr(fs::File::create(self.complaints()).map_err(|error| error.to_string())?);
        Helper::start(command, &self.socket()).map(Some)
    }
}

impl Contender for Sharing<'_> {
    fn name(&self) -> &str {
        self.name
    }

    fn command(&self) -> String {
        let daemon = self.daemon().map_or(String::new(), |command| format!("{} & ", shown(&command)));
        self.start().map_or_else(|why| why, |command| daemon + &shown(&command))
    }

    fn version(&self) -> Option<String> {
        self.programs.as_ref().and_then(|(_, virtiofsd)| version(virtiofsd, &["--version"]))
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        self.anew()?;
        let complained = |why: String| {
            let said = fs::read_to_string(self.complaints()).unwrap_or_default();
            format!("{why} {}", said.trim())
        };
        let _daemon = self.serve().map_err(complained)?;
        let (work, mut seen) = (self.work(), Vec::new());
        let spans = places::spans(self.name, self.start()?, &work, &mut || seen.push(exits()));
        let mut values = spans.map_err(complained)??;
        if self.has_exits {
            let taken = seen.chunks(2).zip(&work).map(|(marks, work)| match marks {
                [Some(begin), Some(end)] => each(&work.step, end - begin),
                _ => f64::NAN,
            });
            values.extend(taken);
        }
        Ok(values)
    }
}

/// What each file, request or page has of `all`.
fn each(step: &Step, all: f64) -> f64 {
    match step {
        Step::Block { count, .. } | Step::Tree(_, count, _) => all / *count as f64,
        _ => f64::NAN,
    }
}
