//! The spans of what one command leaves behind: processes that outlive it and speak through one pipe.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid};

use super::INTERRUPTED;
use super::crowd::Life;
use crate::rivals::idle::{Instances, all_processes, parent_of};

/// How soon Ctrl-C is seen.
const GLANCE: Duration = Duration::from_millis(100);

/// Starts `command`, which starts `count` processes, ends well and leaves them to this one. Each says all of `marks` through
/// `pipe`, which has no end and does not block, and ends. The lives are made of the n-th of each mark, and the n-th end.
///
/// # Errors
/// As [`super::span::measure`].
pub fn measure(
    mut command: Command,
    mut pipe: File,
    count: usize,
    marks: &[&[u8]],
    limit: Duration,
) -> Result<Vec<Life>, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |what: &str, error: std::io::Error| format!("{what} {name}: {error}");
    // Ends whatever is left when this returns.
    let _strays = Instances::none()?;
    let errors = tempfile().map_err(|error| failed("start", error))?;
    let complaint = errors.try_clone().map_err(|error| failed("start", error))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(complaint);
    let known = all_processes()?.collect();
    let start = Instant::now();
    let child = command.spawn().map_err(|error| failed("start", error))?;
    let mut family = Family::of(child, known)?;
    let mut said = Said { marks, text: Vec::new(), times: vec![Vec::new(); marks.len()] };
    loop {
        if INTERRUPTED.load(Ordering::SeqCst) {
            return Err("interrupted".to_owned());
        }
        let over = family.are_gone()?;
        // What they said before their end.
        let spoken = said.read(&mut pipe, &start).map_err(|error| failed("read the output of", error))?;
        let well = family.command.is_none_or(|status| status == 0);
        if over && well && said.are_complete(count) && family.ends.len() == count {
            return family.lives(&said.times);
        }
        let late = start.elapsed() > limit;
        if over || !well || late {
            let ended = match (family.command, late) {
                (Some(status), _) => format!("ended with exit code {status}"),
                (None, true) => format!("has not ended after {limit:?}"),
                (None, false) => "runs".to_owned(),
            };
            let (ends, complaint) = (family.ends.len(), complaints(&errors));
            return Err(format!(
                "{name} {ended}, and {ends} of {count} that it started; they said {:?}{complaint}",
                said.tail()
            ));
        }
        if spoken {
            // Who has spoken is there, and may soon be gone.
            family.look()?;
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: GLANCE.subsec_nanos().into() };
        let over = {
            // Whoever has ended is ready for ever, so it is left out.
            let command = family.command.is_none().then_some(&family.end);
            let ends = command.into_iter().chain(family.members.iter().map(|(_, end)| end));
            let mut fds: Vec<_> = ends.map(|end| PollFd::new(end, PollFlags::IN)).collect();
            fds.push(PollFd::new(&pipe, PollFlags::IN));
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(failed("wait for", error.into())),
            }
            fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>()
        };
        family.ended(&over, start.elapsed())?;
    }
}

fn tempfile() -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create("errors", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// What is in the file that they complained to.
fn complaints(file: &File) -> String {
    let (mut file, mut said) = (file, String::new());
    let _ = file.rewind().and_then(|()| file.read_to_string(&mut said));
    if said.trim().is_empty() { said } else { format!(": {}", said.trim()) }
}

/// What has come through the pipe.
struct Said<'a> {
    marks: &'a [&'a [u8]],
    text: Vec<u8>,
    times: Vec<Vec<Duration>>,
}

impl Said<'_> {
    /// Takes what there is. Whether there was anything.
    fn read(&mut self, pipe: &mut File, start: &Instant) -> std::io::Result<bool> {
        let (mut space, before) = ([0; 4096], self.text.len());
        loop {
            match pipe.read(&mut space) {
                Ok(0) => break,
                Ok(count) => self.text.extend_from_slice(&space[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let now = start.elapsed();
        for (mark, times) in self.marks.iter().zip(&mut self.times) {
            let there = self.text.windows(mark.len().max(1)).filter(|window| window == mark).count();
            times.resize(there, now);
        }
        Ok(self.text.len() > before)
    }

    fn are_complete(&self, count: usize) -> bool {
        self.times.iter().all(|times| times.len() == count)
    }

    fn tail(&self) -> String {
        String::from_utf8_lossy(&self.text[self.text.len().saturating_sub(200)..]).into_owned()
    }
}

/// The command and those that it started.
struct Family {
    child: Child,
    end: OwnedFd,
    /// Its exit status, once it has ended.
    command: Option<i32>,
    known: BTreeSet<i32>,
    members: Vec<(Pid, OwnedFd)>,
    /// Whose end was seen, and when.
    ends: Vec<(Pid, Duration)>,
}

impl Family {
    /// That of `child`, none of whom are among the processes that are `known`.
    fn of(child: Child, mut known: BTreeSet<i32>) -> Result<Self, String> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("no process id")?;
        let end = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| format!("watch {pid:?}: {error}"))?;
        known.insert(pid.as_raw_nonzero().get());
        Ok(Self { child, end, command: None, known, members: Vec::new(), ends: Vec::new() })
    }

    /// Whether the command has ended, and all that it left.
    fn are_gone(&mut self) -> Result<bool, String> {
        let idle = self.command.is_some() && self.members.is_empty();
        if idle {
            self.look()?;
        }
        Ok(idle && self.members.is_empty())
    }

    /// Looks for those who came since the last look: children of the command, or of this process when it is gone.
    fn look(&mut self) -> Result<(), String> {
        let parents = [self.child.id() as i32, std::process::id() as i32];
        let now: BTreeSet<i32> = all_processes()?.collect();
        let new = now.difference(&self.known);
        for pid in new.filter(|pid| parent_of(**pid).is_some_and(|parent| parents.contains(&parent))) {
            let pid = Pid::from_raw(*pid).ok_or("no process id")?;
            let end = pidfd_open(pid, PidfdFlags::empty());
            self.members.push((pid, end.map_err(|error| format!("watch {pid:?}: {error}"))?));
        }
        self.known = now;
        Ok(())
    }

    /// Notes who has ended, by what `over` says of the command, unless it is known to have, and of each member.
    fn ended(&mut self, over: &[bool], now: Duration) -> Result<(), String> {
        let (command, members) = match self.command {
            None => (over[0], &over[1..]),
            Some(_) => (false, over),
        };
        let mut flags = members.iter();
        let ends = &mut self.ends;
        self.members.retain(|(pid, _)| {
            let over = flags.next().copied().unwrap_or(false);
            if over {
                ends.push((*pid, now));
            }
            !over
        });
        if command {
            let status = self.child.wait().map_err(|error| format!("wait for the command: {error}"))?;
            self.command = Some(status.code().unwrap_or(-1));
            self.look()?;
        }
        Ok(())
    }

    /// What is known of all, once all have ended and are children of this process.
    fn lives(self, times: &[Vec<Duration>]) -> Result<Vec<Life>, String> {
        let life = |(number, (pid, exit)): (usize, (Pid, Duration))| {
            let status = waitpid(Some(pid), WaitOptions::empty());
            let status = status.map_err(|error| format!("wait for {pid:?}: {error}"))?;
            let status = status.and_then(|(_, status)| status.exit_status());
            Ok(Life { marks: times.iter().map(|times| times[number]).collect(), exit, status })
        };
        self.ends.into_iter().enumerate().map(life).collect()
    }
}
