//! Exits that KVM answers by itself, from the kernel's own trace events (tracefs, `kvm:kvm_exit` and `kvm:kvm_entry`); and page
//! faults of the monitor's threads in guest memory (`exceptions:page_fault_user` and `page_fault_kernel`), by which devices touch
//! it.
//!
//! A trace instance of our own, with the time-stamp counter as its clock, so that its times are the recorder's; filtered to
//! this process and the threads that it starts. Needs root, as a rule. Source: Documentation/trace/ftrace.rst.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_monitor::config::cpu::Vendor;
use vmm_monitor::memory::GuestRam;
use vmm_monitor::recorder::{Event, Kind, clock};

/// Where tracefs is mounted.
const ROOTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// The buffer's size for each processor, in KiB.
const BUFFER_KIB: &str = "16384";

// Events, by their folders.
const EXIT: &str = "kvm/kvm_exit";
const ENTRY: &str = "kvm/kvm_entry";
const GUEST_FAULT: &str = "kvm/kvm_page_fault";
const HOST_FAULTS: [&str; 2] = ["exceptions/page_fault_user", "exceptions/page_fault_kernel"];
/// All of them.
const EVENTS: [&str; 5] = [EXIT, ENTRY, GUEST_FAULT, HOST_FAULTS[0], HOST_FAULTS[1]];
/// What KVM calls an exit of VT-x whose address is not in its event.
const EPT_VIOLATION: &str = "EPT_VIOLATION";

/// Whose an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// The vCPU of this number.
    Vcpu(u32),
    /// The monitor's thread with this number in [`KernelExits::threads`].
    Thread(u8),
}

/// The exits inside KVM, while they are wanted.
#[derive(Debug)]
pub struct KernelExits {
    instance: PathBuf,
    /// Until this is dropped.
    pipe: Option<File>,
    /// Read, and not yet a whole line.
    text: Vec<u8>,
    parser: Parser,
}

/// What is made of the events' text.
#[derive(Debug, Default)]
struct Parser {
    /// Reasons by their number in events: as KVM writes them.
    reasons: Vec<String>,
    /// By vCPU: the exit that has not been followed by an entry.
    open: BTreeMap<u32, Event>,
    /// Where guest memory is in this process, and its guest address.
    memory: Vec<(Range<u64>, u64)>,
    /// The names of the threads that touched it.
    threads: Vec<String>,
}

/// Where the kernel makes traces that are apart from others, if it does.
pub fn instances() -> Option<PathBuf> {
    ROOTS.map(|root| Path::new(root).join("instances")).into_iter().find(|instances| instances.is_dir())
}

impl KernelExits {
    /// Asks the kernel for this process's exits, from now on.
    ///
    /// # Errors
    /// It may not, or the host has no tracefs: then what it is, for the report.
    pub fn start() -> io::Result<Self> {
        let instances = instances()
            .ok_or_else(|| io::Error::new(ErrorKind::NotFound, "no tracefs at /sys/kernel/tracing"))?;
        let owner = Owner::this();
        remove_stale(&instances, &owner);
        let instance = instances.join(owner.instance());
        fs::create_dir(&instance)?;
        Self::set_up(&instance).inspect_err(|_| _ = fs::remove_dir(&instance))
    }

    fn set_up(instance: &Path) -> io::Result<Self> {
        let write = |file: &str, text: &str| write(instance, file, text);
        write("trace_clock", "x86-tsc")?;
        write("buffer_size_kb", BUFFER_KIB)?;
        write("options/event-fork", "1")?;
        // The thread of the first vCPU is there already.
        let threads =
            fs::read_dir("/proc/self/task")?.map(|thread| Ok(thread?.file_name().into_string().ok()));
        let threads = threads.filter_map(io::Result::transpose).collect::<io::Result<Vec<_>>>()?;
        write("set_event_pid", &threads.join(" "))?;
        enable(instance, EXIT)?;
        enable(instance, ENTRY)?;
        let pipe =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(instance.join("trace_pipe"))?;
        Ok(Self {
            instance: instance.to_owned(),
            pipe: Some(pipe),
            text: Vec::new(),
            parser: Parser::default(),
        })
    }

    /// Asks for page faults as well, as far as the kernel tells of them: the guest's addresses, which exits lack on a host of
    /// Intel's, and those of this process in `ram`.
    pub fn add_page_faults(&mut self, ram: &GuestRam, vendor: Vendor) {
        if vendor == Vendor::Intel {
            let _ = enable(&self.instance, GUEST_FAULT);
        }
        let place = |host: u64, size: u64, guest: u64| (host..host.saturating_add(size), guest);
        let regions = ram
            .iter()
            .map(|region| place(region.as_ptr().addr() as u64, region.len(), region.start_addr().0));
        self.parser.memory = regions.collect();
        let inside = |(host, _): &(Range<u64>, u64)| {
            format!("(address >= {:#x} && address < {:#x})", host.start, host.end)
        };
        let filter = self.parser.memory.iter().map(inside).collect::<Vec<_>>().join(" || ");
        for event in HOST_FAULTS {
            let filtered = write(&self.instance, &format!("events/{event}/filter"), &filter);
            let _ = filtered.and_then(|()| enable(&self.instance, event));
        }
    }

    /// Takes what there is, in order: the vCPU and its exit, finished by the next entry, whose `count` is the number of its reason;
    /// the thread and its page fault.
    pub fn take(&mut self, sink: &mut dyn FnMut(Actor, Event)) {
        let mut space = [0; 1 << 16];
        // An end for this turn, should the guest exit faster than this reads.
        for _ in 0..256 {
            match self.pipe.as_mut().map_or(Ok(0), |pipe| pipe.read(&mut space)) {
                Ok(0) => return,
                Ok(count) => self.text.extend_from_slice(&space[..count]),
                // Nothing more now; or the file is gone.
                Err(_) => return,
            }
            let Some(end) = self.text.iter().rposition(|byte| *byte == b'\n') else { continue };
            for line in self.text[..end].split(|byte| *byte == b'\n') {
                if let Ok(line) = std::str::from_utf8(line) {
                    self.parser.line(line, sink);
                }
            }
            self.text.drain(..=end);
        }
    }

    /// The exits that no entry followed to the end, taken to have lasted until now: of vCPUs that were asleep, or with the monitor.
    pub fn last(&mut self, sink: &mut dyn FnMut(Actor, Event)) {
        for (vcpu, mut event) in std::mem::take(&mut self.parser.open) {
            event.handled = u32::try_from(clock::ticks().wrapping_sub(event.time)).unwrap_or(u32::MAX);
            sink(Actor::Vcpu(vcpu), event);
        }
    }

    /// The reasons so far, by number.
    pub fn reasons(&self) -> &[String] {
        &self.parser.reasons
    }

    /// The names of threads so far, by number.
    pub fn threads(&self) -> &[String] {
        &self.parser.threads
    }

    /// Events that the kernel's buffer had no room for.
    pub fn lost(&self) -> u64 {
        let processors = fs::read_dir(self.instance.join("per_cpu")).into_iter().flatten().flatten();
        let overrun = |folder: fs::DirEntry| {
            let stats = fs::read_to_string(folder.path().join("stats")).ok()?;
            stats.lines().find_map(|line| line.strip_prefix("overrun: ")?.trim().parse::<u64>().ok())
        };
        processors.filter_map(overrun).sum()
    }
}

impl Drop for KernelExits {
    fn drop(&mut self) {
        for event in EVENTS {
            let _ = fs::write(self.instance.join("events").join(event).join("enable"), "0");
        }
        // An instance in use is not removed: the pipe goes first.
        self.pipe = None;
        if let Err(error) = fs::remove_dir(&self.instance) {
            log::warn!("remove {}: {error}", self.instance.display());
        }
    }
}

/// Writes to a file of `instance`.
fn write(instance: &Path, file: &str, text: &str) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{file}: {error}"));
    fs::write(instance.join(file), text).map_err(named)
}

fn enable(instance: &Path, event: &str) -> io::Result<()> {
    write(instance, &format!("events/{event}/enable"), "1")
}

/// Whose an instance is. A process id alone could be that of another process meanwhile, or of another container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    /// The inode of its process ids' namespace.
    namespace: u64,
    pid: u32,
    /// When it was started, in clock ticks since the host's (proc(5), /proc/PID/stat).
    started: u64,
}

impl Owner {
    fn this() -> Self {
        let pid = std::process::id();
        let namespace = fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino());
        Self { namespace, pid, started: started(pid).unwrap_or(0) }
    }

    fn instance(&self) -> String {
        format!("vmm-{}-{}-{}", self.namespace, self.pid, self.started)
    }

    fn of(instance: &str) -> Option<Self> {
        let mut parts = instance.strip_prefix("vmm-")?.split('-').map(|part| part.parse::<u64>().ok());
        let mut next = || parts.next().flatten();
        let owner = Self { namespace: next()?, pid: next()?.try_into().ok()?, started: next()? };
        (owner.instance() == instance).then_some(owner)
    }
}

/// When the process was started; none if there is no such process.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything; this is the 22nd.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Removes what monitors left that were killed: each holds 16 MiB a processor, and its events go on costing the host.
fn remove_stale(instances: &Path, own: &Owner) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        let Some(owner) = entry.file_name().to_str().and_then(Owner::of) else { continue };
        // Who is alive in another namespace is not to be seen from here.
        if owner.namespace == own.namespace && started(owner.pid) != Some(owner.started) {
            match fs::remove_dir(entry.path()) {
                Ok(()) => log::info!("removed {}, whose owner was killed", entry.path().display()),
                Err(error) => log::info!("remove {}: {error}", entry.path().display()),
            }
        }
    }
}

impl Parser {
    /// `  vcpu0-168  [001] d..1.  14644566076: kvm_exit: vcpu 0 reason npf rip 0x1000500 info1 0x100000014 info2 0x...`
    fn line(&mut self, line: &str, sink: &mut dyn FnMut(Actor, Event)) {
        let Some((before, what, rest)) = EVENTS.into_iter().find_map(|event| {
            let (_, name) = event.split_once('/')?;
            let (before, rest) = line.split_once(name)?;
            Some((before.strip_suffix(": ")?, name, rest.strip_prefix(": ")?))
        }) else {
            return;
        };
        let Some(time) = before.split_whitespace().last().and_then(|word| word.parse().ok()) else { return };
        let after = |key: &str| {
            let mut words = rest.split([' ', ',']).filter(|word| !word.is_empty());
            words.by_ref().find(|word| *word == key)?;
            words.next()
        };
        let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x").unwrap_or(word), 16).ok();
        let hex = |key: &str| number(after(key)?);
        if what.starts_with("page_fault") {
            // Their keys are followed by `=`.
            let value = |key: &str| number(rest.split_once(key)?.1.split_whitespace().next()?);
            let (Some(host), Some(code)) = (value("address="), value("error_code=")) else { return };
            if let (Some(address), Some(thread)) = (self.guest_address(host), self.thread(before)) {
                let (kind, value) = (Kind::HostFault as u8, code);
                sink(Actor::Thread(thread), Event { time, address, value, kind, ..Event::default() });
            }
            return;
        }
        let Some(vcpu) = after("vcpu").and_then(|word| word.parse().ok()) else { return };
        if what == "kvm_entry" {
            if let Some(mut event) = self.open.remove(&vcpu) {
                event.handled = u32::try_from(u64::wrapping_sub(time, event.time)).unwrap_or(u32::MAX);
                sink(Actor::Vcpu(vcpu), event);
            }
            return;
        }
        if what == "kvm_page_fault" {
            if let (Some(event), Some(address)) = (self.open.get_mut(&vcpu), hex("address"))
                && self.reasons.get(usize::from(event.count)).is_some_and(|reason| reason == EPT_VIOLATION)
            {
                event.value = address;
            }
            return;
        }
        let reason =
            rest.split_once("reason ").and_then(|(_, rest)| rest.split_once(" rip ")).map(|(name, _)| name);
        let (Some(reason), Some(rip)) = (reason, hex("rip")) else { return };
        let (address, mut value) = (hex("info1").unwrap_or(0), hex("info2").unwrap_or(0));
        if reason == EPT_VIOLATION {
            // It is in an event of its own, or not known.
            value = 0;
        }
        let (kind, count) = (Kind::InKernel as u8, self.number(reason));
        self.open.insert(vcpu, Event { time, rip, address, value, kind, count, ..Event::default() });
    }

    /// Of an address in this process that is guest memory.
    fn guest_address(&self, host: u64) -> Option<u64> {
        let (place, guest) = self.memory.iter().find(|(place, _)| place.contains(&host))?;
        Some(guest + (host - place.start))
    }

    /// The number of the thread of a line that begins so. Those behind the 255th share the last.
    fn thread(&mut self, before: &str) -> Option<u8> {
        let (name, id) = before.rsplit_once('[')?.0.trim().rsplit_once('-')?;
        let name = match name {
            // The kernel knows the names of those alone that have slept since.
            "<...>" => fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap_or_default(),
            name => name.to_owned(),
        };
        let name = name.trim();
        let known = self.threads.iter().position(|known| known == name);
        let number = known.unwrap_or_else(|| {
            if self.threads.len() < 255 {
                self.threads.push(name.to_owned());
            }
            self.threads.len() - 1
        });
        u8::try_from(number).ok()
    }

    /// The number of a reason. There are some hundred at most; those behind the 255th share the last.
    fn number(&mut self, reason: &str) -> u8 {
        let known = self.reasons.iter().position(|known| known == reason);
        let number = known.unwrap_or_else(|| {
            if self.reasons.len() < 255 {
                self.reasons.push(reason.to_owned());
            }
            self.reasons.len() - 1
        });
        u8::try_from(number).unwrap_or(u8::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_monitor_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let own = Owner::this();
        assert_eq!(Owner::of(&own.instance()), Some(own));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = Owner { pid: child.id(), ..own };
        child.wait().unwrap();
        let kept = [
            own.instance(),
            Owner { namespace: own.namespace + 1, ..dead }.instance(),
            format!("vmm-{}", dead.pid),
            format!("{}-", dead.instance()),
            "vmm-x-1-1".to_owned(),
            "other".to_owned(),
        ];
        // Its number may be another's by now.
        let gone = [dead.instance(), Owner { started: own.started + 1, ..own }.instance()];
        kept.iter().chain(&gone).for_each(|name| fs::create_dir(dir.path().join(name)).unwrap());
        remove_stale(dir.path(), &own);
        assert!(kept.iter().all(|name| dir.path().join(name).is_dir()));
        assert!(gone.iter().all(|name| !dir.path().join(name).exists()));
    }

    #[test]
    fn the_kernels_lines_are_read() {
        let text = "\
           vcpu0-168     [001] d..1.  1000: kvm_exit: vcpu 0 reason npf rip 0x1000500 info1 0x0000000100000014 info2 0x0000000001000500 intr_info 0x0 error_code 0x0
           vcpu1-169     [000] d..1.  1100: kvm_exit: vcpu 1 reason UD excp rip 0xffffffff81000000 info1 0x1 info2 0x2 intr_info 0x0 error_code 0x0
           vcpu0-168     [001] d..1.  1500: kvm_entry: vcpu 0, rip 0x1000500
           CPU:1 [LOST 3 EVENTS]
           vcpu0-168     [001] d..1.  1700: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0 info2 0x0
           vcpu0-168     [001] d..1.  nonsense: kvm_entry: vcpu 0, rip 0x1
           vcpu1-169     [000] d..1.  2100: kvm_entry: vcpu 1, rip 0x1
           vcpu7-169     [000] d..1.  2200: kvm_entry: vcpu 7, rip 0x1";
        let mut parser = Parser::default();
        let mut seen = Vec::new();
        for line in text.lines() {
            parser.line(line, &mut |actor, event| {
                let Actor::Vcpu(vcpu) = actor else { panic!("{actor:?}") };
                seen.push((vcpu, event.time, event.handled, event.rip, event.value, event.count));
            });
        }
        assert_eq!(parser.reasons, ["npf", "UD excp"]);
        assert_eq!(
            seen,
            [(0, 1000, 500, 0x100_0500, 0x100_0500, 0), (1, 1100, 1000, 0xffff_ffff_8100_0000, 2, 1)]
        );
    }

    #[test]
    fn a_page_fault_has_its_guest_address_whoever_made_it() {
        let text = "\
           vcpu0-168     [001] d..1.  1000: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1000 info1 0x182 info2 0x80000b0e intr_info 0x0 error_code 0x0
           vcpu0-168     [001] ...1.  1010: kvm_page_fault: vcpu 0 rip 0x1000 address 0x0000000000203000 error_code 0x182
           vcpu0-168     [001] d..1.  1100: kvm_entry: vcpu 0, rip 0x1000
           vcpu0-168     [001] d..1.  1200: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1000 info1 0x182 info2 0x80000b0e
           vcpu0-168     [001] d..1.  1300: kvm_entry: vcpu 0, rip 0x1000
           vcpu0-168     [001] ...1.  1310: kvm_page_fault: vcpu 0 rip 0x1000 address 0x204000 error_code 0x182
           virtio-blk0-170 [000] d....  1400: page_fault_user: address=0x7f0000003010 ip=0x55d0c0ffee error_code=0x6
           a [b]-c-171     [000] d....  1500: page_fault_kernel: address=0x7f1000000000 ip=copy_user_generic_string error_code=0x2
           virtio-blk0-170 [000] d....  1600: page_fault_user: address=0x7f0000010000 ip=0x55d0c0ffee error_code=0x4
           virtio-blk0-170 [000] d....  1700: page_fault_user: address=panic ip=0x55d0c0ffee error_code=0x4
           virtio-blk0-170 [000] d....  1800: page_fault_user: address=0x7f000000ffff ip=0x55d0c0ffee error_code=0x4";
        let memory = vec![
            (0x7f00_0000_0000..0x7f00_0001_0000, 0),
            (0x7f10_0000_0000..0x7f10_0001_0000, 0x1_0000_0000),
        ];
        let mut parser = Parser { memory, ..Parser::default() };
        let mut seen = Vec::new();
        for line in text.lines() {
            parser.line(line, &mut |actor, event| {
                let address = if event.kind() == Some(Kind::InKernel) { event.value } else { event.address };
                seen.push((actor, event.time, address));
            });
        }
        assert_eq!(parser.threads, ["virtio-blk0", "a [b]-c"]);
        let expected = [
            (Actor::Vcpu(0), 1000, 0x20_3000),
            (Actor::Vcpu(0), 1200, 0),
            (Actor::Thread(0), 1400, 0x3010),
            (Actor::Thread(1), 1500, 0x1_0000_0000),
            (Actor::Thread(0), 1800, 0xffff),
        ];
        assert_eq!(seen, expected);
    }
}
