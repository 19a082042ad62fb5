//! Idle instances of a rival: started, found among this process's descendants, and ended. And whatever else a rival leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Stdio};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};

use super::launch::{Launch, Output, Request};
use super::{Life, Rival};
use crate::measure::INTERRUPTED;

/// They run until this is dropped, and so does all else that was started meanwhile.
pub struct Instances {
    /// Those that are no descendants of theirs.
    others: BTreeSet<i32>,
    children: Vec<Child>,
    count: usize,
}

impl Instances {
    /// None yet: ends what is started from now on, when it is dropped.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn none() -> Result<Self, String> {
        // Whoever loses its parent becomes a child of this process, and so stays among its descendants.
        set_child_subreaper(Some(getpid())).map_err(|error| format!("become a subreaper: {error}"))?;
        Ok(Self { others: descendants()?, children: Vec::new(), count: 0 })
    }

    /// Starts `count` of them.
    ///
    /// # Errors
    /// As [`Instances::grow`].
    pub fn start(rival: &mut dyn Rival, count: usize) -> Result<Self, String> {
        let mut instances = Self::none()?;
        instances.grow(rival, count)?;
        Ok(instances)
    }

    /// Starts more of them until there are `count`, [`at_once`] of them at a time, and waits until all have spoken or, if their
    /// commands end at once, until those have ended well.
    ///
    /// # Errors
    /// One that did not come up, with what it said.
    pub fn grow(&mut self, rival: &mut dyn Rival, count: usize) -> Result<(), String> {
        while self.count < count {
            let batch = at_once().min(count - self.count);
            let launches: Result<Vec<_>, _> =
                (0..batch).map(|_| Launch::of_rival(rival, Life::Idle)).collect();
            let who = Speaker { name: rival.name(), words: rival.marker(), limit: rival.limit() };
            self.launch(launches?, &who)?;
        }
        Ok(())
    }

    /// The same with what `launches` start.
    ///
    /// # Errors
    /// As [`Instances::grow`].
    pub fn launch(&mut self, launches: Vec<Launch>, who: &Speaker<'_>) -> Result<(), String> {
        let mut launches = launches.into_iter().peekable();
        while launches.peek().is_some() {
            if INTERRUPTED.load(Ordering::SeqCst) {
                return Err("interrupted".to_owned());
            }
            let batch = launches.by_ref().take(at_once());
            let starting: Result<Vec<_>, _> = batch.map(|launch| Starting::new(launch, who)).collect();
            for starting in starting? {
                let number = self.count + 1;
                let machines = starting.machines();
                let up = starting.wait(who).map_err(|why| format!("instance {number}: {why}"))?;
                self.children.extend(up);
                self.count += machines;
            }
        }
        Ok(())
    }

    /// The processes of all instances.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<i32>, String> {
        Ok(descendants()?.difference(&self.others).copied().collect())
    }
}

impl Drop for Instances {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
        let end = Instant::now() + Duration::from_secs(10);
        while let Ok(left) = self.processes()
            && !left.is_empty()
            && Instant::now() < end
        {
            for pid in left.into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
                // Not a child of ours yet, or not gone yet: next time.
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
            sleep(Duration::from_millis(2));
        }
    }
}

/// How many are started at a time: as many as there are CPUs to start them.
pub fn at_once() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Whoever is started: its name, what it says when it is there, and how soon it must.
pub struct Speaker<'a> {
    /// For errors.
    pub name: &'a str,
    /// What it says last.
    pub words: &'a [u8],
    /// From its start on.
    pub limit: Duration,
}

/// One that is on its way. Given up, it is killed.
struct Starting {
    child: Option<Child>,
    request: Option<Request>,
    output: Output,
    /// Where it complains, if its command ends when the instance runs: a file, since the instance keeps it open.
    errors: Option<fs::File>,
    end: Instant,
}

impl Starting {
    fn new(launch: Launch, who: &Speaker<'_>) -> Result<Self, String> {
        let Launch { mut command, input, request, output } = launch;
        let failed = |error: std::io::Error| format!("start {}: {error}", who.name);
        let stays = matches!(output, Output::Own);
        let errors = (!stays).then(tempfile).transpose().map_err(failed)?;
        command.stdin(input.unwrap_or_else(Stdio::null));
        match &errors {
            Some(file) => command.stdout(Stdio::null()).stderr(file.try_clone().map_err(failed)?),
            None => command.stdout(Stdio::piped()).stderr(Stdio::null()),
        };
        let child = Some(command.spawn().map_err(failed)?);
        Ok(Self { child, request, output, errors, end: Instant::now() + who.limit })
    }

    fn machines(&self) -> usize {
        match self.output {
            Output::Shared { machines, .. } => machines,
            _ => 1,
        }
    }

    /// Until it is up. The process that it is, if its command stays.
    fn wait(mut self, who: &Speaker<'_>) -> Result<Option<Child>, String> {
        if let Some(request) = self.request.take() {
            request()?;
        }
        let child = self.child.as_mut().ok_or("it is gone")?;
        if let Some(errors) = &mut self.errors {
            detached(child, errors, who, self.end)?;
        }
        match &mut self.output {
            Output::None => Ok(None),
            Output::Shared { pipe, machines } => {
                let pipe =
                    pipe.try_clone().map_err(|error| format!("read what {} says: {error}", who.name))?;
                await_words(&mut fs::File::from(pipe), who.words, *machines, self.end, who.name)?;
                Ok(None)
            }
            Output::Own => {
                let output = child.stdout.as_mut().ok_or("no pipe")?;
                await_words(output, who.words, 1, self.end, who.name)?;
                Ok(self.child.take())
            }
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `words` have been said `times` times through `output`.
///
/// # Errors
/// It ends before, or they are not there until `until`.
pub fn await_words(
    output: &mut (impl Read + AsFd),
    words: &[u8],
    times: usize,
    until: Instant,
    name: &str,
) -> Result<(), String> {
    let (mut said, mut space) = (Vec::new(), [0; 4096]);
    while said.windows(words.len().max(1)).filter(|window| *window == words).count() < times {
        wait_for(&*output, until, name)?;
        let count = output.read(&mut space).map_err(|error| format!("read its output: {error}"))?;
        said.extend_from_slice(&space[..count]);
        if count == 0 {
            return Err(format!("it ended: {}", String::from_utf8_lossy(&said).trim()));
        }
    }
    Ok(())
}

/// Waits for the end of a command that ends when its instance runs.
fn detached(child: &mut Child, errors: &mut fs::File, who: &Speaker<'_>, end: Instant) -> Result<(), String> {
    let name = who.name;
    let status = loop {
        match child.try_wait().map_err(|error| format!("wait for {name}: {error}"))? {
            Some(status) => break status,
            None if Instant::now() > end => {
                return Err(format!("{name} was not up after {:?}", who.limit));
            }
            None => sleep(Duration::from_micros(200)),
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    let _ = std::io::Seek::rewind(errors).and_then(|()| errors.read_to_string(&mut said));
    Err(format!("{name}: {status}: {}", said.trim()))
}

fn tempfile() -> std::io::Result<fs::File> {
    Ok(rustix::fs::memfd_create("errors", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// Waits until there is something to read.
///
/// # Errors
/// There is nothing until `end`; or poll(2) fails.
pub fn wait_for(output: &impl AsFd, end: Instant, name: &str) -> Result<(), String> {
    let left = end.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::new(output, PollFlags::IN)], Some(&timeout)) {
        Ok(0) => Err(format!("{name} has not spoken in time")),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("wait for {name}: {error}")),
    }
}

/// The process that started `pid`, or took its place.
pub fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "PID (NAME) STATE PPID ...", and a name may hold anything.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// The numbers of all processes.
///
/// # Errors
/// /proc cannot be read.
pub fn all_processes() -> Result<impl Iterator<Item = i32>, String> {
    let entries = fs::read_dir("/proc").map_err(|error| format!("read /proc: {error}"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
}

/// All processes below this one.
fn descendants() -> Result<BTreeSet<i32>, String> {
    let mut below: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for pid in all_processes()? {
        // Gone meanwhile: not one to count.
        if let Some(parent) = parent_of(pid) {
            below.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut next) = (BTreeSet::new(), vec![std::process::id() as i32]);
    while let Some(pid) = next.pop() {
        for child in below.remove(&pid).unwrap_or_default() {
            found.insert(child);
            next.push(child);
        }
    }
    Ok(found)
}
