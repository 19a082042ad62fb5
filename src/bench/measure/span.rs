//! The span of one process: from the call that starts it to the output that is waited for, and to its end.
//!
//! One clock, the host's monotonic one; waiting is one poll(2) on its output and its end.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::INTERRUPTED;

/// How soon Ctrl-C is seen.
const GLANCE: Duration = Duration::from_millis(100);

/// What a started process did, and when.
#[derive(Debug, Clone)]
pub struct Span {
    /// From the call that starts it to each of the marks in its output.
    pub marks: Vec<Duration>,
    /// From that call until it is gone.
    pub exit: Duration,
    /// How it ended. Judging it is the caller's.
    pub status: ExitStatus,
}

/// Ends the process, and those that it started, if the measurement is given up.
struct Running {
    child: Child,
    over: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        // Not waited for yet, so the number is still its own.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Starts `command` and waits for `marks` on its standard output, one behind the other, then for its end. `at_mark` is called
/// at each with its number and the process id; what it takes counts to what follows.
///
/// The process leads a group of its own: Ctrl-C is for the benchmark, which then gives up the sample at hand.
///
/// # Errors
/// It cannot be started, ends without all marks, or has not ended after `limit`: with what it said. Or Ctrl-C.
pub fn measure(
    command: Command,
    marks: &[&[u8]],
    limit: Duration,
    at_mark: &mut dyn FnMut(usize, u32) -> Result<(), String>,
) -> Result<Span, String> {
    with_input(command, Stdio::null(), marks, limit, at_mark)
}

/// The same for one that reads `input`.
///
/// # Errors
/// As [`measure`].
pub fn with_input(
    mut command: Command,
    input: Stdio,
    marks: &[&[u8]],
    limit: Duration,
    at_mark: &mut dyn FnMut(usize, u32) -> Result<(), String>,
) -> Result<Span, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let failed = |what: &str, error: std::io::Error| format!("{what} {name}: {error}");
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let start = Instant::now();
    let child = command.spawn().map_err(|error| failed("start", error))?;
    let mut running = Running { child, over: false };
    let pid = i32::try_from(running.child.id()).ok().and_then(Pid::from_raw).ok_or("no process id")?;
    let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed("watch", error.into()))?;
    let (Some(mut output), Some(mut errors)) = (running.child.stdout.take(), running.child.stderr.take())
    else {
        return Err("no pipe".to_owned());
    };
    let (mut said, mut complaint, mut space) = (Vec::new(), Vec::new(), [0; 4096]);
    let (mut output_open, mut errors_open) = (true, true);
    let (mut times, mut searched) = (Vec::new(), 0);
    loop {
        while let Some(mark) = marks.get(times.len()) {
            let Some(at) = said[searched..].windows(mark.len().max(1)).position(|window| window == *mark)
            else {
                break;
            };
            searched += at + mark.len();
            times.push(start.elapsed());
            at_mark(times.len() - 1, running.child.id())?;
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(complain(&name, &format!("has not ended after {limit:?}"), &said, &complaint));
        }
        if INTERRUPTED.load(Ordering::SeqCst) {
            return Err("interrupted".to_owned());
        }
        let left = left.min(GLANCE);
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let [over, more_output, more_errors] = {
            // A pipe at its end is ready for ever, asked for or not, so it is left out.
            let mut fds = vec![PollFd::new(&ended, PollFlags::IN)];
            fds.extend(output_open.then(|| PollFd::new(&output, PollFlags::IN)));
            fds.extend(errors_open.then(|| PollFd::new(&errors, PollFlags::IN)));
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(failed("wait for", error.into())),
            }
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            let mut next = |there: bool| there && ready.next().unwrap_or(false);
            [next(true), next(output_open), next(errors_open)]
        };
        if more_output {
            let count = output.read(&mut space).map_err(|error| failed("read the output of", error))?;
            said.extend_from_slice(&space[..count]);
            output_open = count > 0;
        }
        if more_errors {
            let count = errors.read(&mut space).map_err(|error| failed("read the errors of", error))?;
            complaint.extend_from_slice(&space[..count]);
            errors_open = count > 0;
        }
        // What it wrote before its end is read first.
        if over && !more_output && !more_errors {
            let exit = start.elapsed();
            let status = running.child.wait().map_err(|error| failed("wait for", error))?;
            running.over = true;
            return match marks.get(times.len()) {
                None => Ok(Span { marks: times, exit, status }),
                Some(missing) => {
                    let what = format!("ended ({status}) without {:?}", String::from_utf8_lossy(missing));
                    Err(complain(&name, &what, &said, &complaint))
                }
            };
        }
    }
}

fn complain(name: &str, what: &str, said: &[u8], complaint: &[u8]) -> String {
    let mut text = format!("{name} {what}");
    for words in [said, complaint] {
        let words = String::from_utf8_lossy(words);
        let words = words.trim();
        // The last lines tell as a rule.
        let start = words.char_indices().rev().nth(600).map_or(0, |(at, _)| at);
        if !words.is_empty() {
            text.push_str(": ");
            text.push_str(&words[start..]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str, limit: Duration) -> Result<Span, String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        measure(command, &[b"here", b"there"], limit, &mut |_, _| Ok(()))
    }

    #[test]
    fn marks_and_exit_are_told_apart() {
        let span = shell("sleep 0.2; echo here; sleep 0.1; echo there; sleep 0.3; exit 3", LIMIT).unwrap();
        assert!(span.marks[0] >= Duration::from_millis(200), "{span:?}");
        assert!(span.marks[1] >= span.marks[0] + Duration::from_millis(90), "{span:?}");
        assert!(span.exit >= span.marks[1] + Duration::from_millis(290), "{span:?}");
        assert_eq!(span.status.code(), Some(3));
    }

    #[test]
    fn what_fails_tells_why_and_is_never_fast() {
        let error = shell("echo nothing; echo there; echo here; echo woe >&2; exit 7", LIMIT).unwrap_err();
        assert!(error.contains("nothing") && error.contains("woe") && error.contains('7'), "{error}");
        let error = shell("echo here; echo there; exec sleep 100", Duration::from_millis(300)).unwrap_err();
        assert!(error.contains("not ended"), "{error}");
        let error = measure(Command::new("/no/such"), &[b"x"], LIMIT, &mut |_, _| Ok(())).unwrap_err();
        assert!(error.contains("/no/such"), "{error}");
    }

    #[test]
    fn output_that_is_closed_early_is_not_asked_for_again_and_again() {
        let busy = || {
            let times = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields: Vec<u64> =
                times.rsplit(')').next().unwrap().split(' ').flat_map(str::parse).collect();
            // User and system time of this thread in ticks, fields 14 and 15 of proc_pid_stat(5); the state is a letter.
            fields[10] + fields[11]
        };
        let before = busy();
        shell("echo here there; exec >&- 2>&-; exec sleep 0.7", LIMIT).unwrap();
        assert!(busy() - before < 20, "{} ticks", busy() - before);
    }

    #[test]
    fn giving_up_ends_what_was_started_too() {
        let mark = format!("1000{}.5", std::process::id());
        let error = shell(&format!("sleep {mark} & wait"), Duration::from_millis(300)).unwrap_err();
        assert!(error.contains("not ended"), "{error}");
        let alive = || {
            let processes = std::fs::read_dir("/proc").unwrap().flatten();
            let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
            lines.filter(|line| line.starts_with(format!("sleep\0{mark}").as_bytes())).count()
        };
        let deadline = Instant::now() + LIMIT;
        while alive() > 0 {
            assert!(Instant::now() < deadline, "the sleep goes on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn much_output_blocks_nothing() {
        let script = "head -c 300000 /dev/zero >&2; head -c 300000 /dev/zero; echo here there";
        assert!(shell(script, LIMIT).unwrap().status.success());
    }
}
