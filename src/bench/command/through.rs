//! Suites that this host's KVM cannot show, measured by the same command in another machine that sees the same files.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::options::{Options, Words};
use super::progress::Progress;
use crate::earlier;
use crate::measure::INTERRUPTED;
use crate::result::Suite;
use crate::rivals::Setting;
use crate::suites::Name;

/// How long the other machine has to end after Ctrl-C.
const GRACE: Duration = Duration::from_secs(5);
/// What is kept of what it says, from the end.
const SAID: usize = 4000;

/// Runs suite `name` by `through`. What it said is in the error, or beside the suites if it was not content with them.
///
/// # Errors
/// It cannot be started, ends without a result, or its result makes no sense.
pub fn measure(
    through: &Words,
    name: Name,
    options: &Options,
    setting: &Setting,
    progress: &Progress,
) -> Result<(Vec<Suite>, Option<String>), String> {
    let file = setting.scratch.join(format!("through-{name}.json"));
    let mut command = command(through, name, options, setting, &file);
    let program = &through.0[0];
    // A group of its own: Ctrl-C is for this process, which ends the group.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(|error| format!("start {program}: {error}"))?;
    let said = Arc::new(Mutex::new(String::new()));
    let listener = child.stderr.take().map(|stderr| {
        let said = said.clone();
        thread::spawn(move || listen(stderr, &said))
    });
    let last_line = || {
        let said = said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        said.trim_end().rsplit(['\n', '\r']).next().unwrap_or_default().to_owned()
    };
    let status = wait(&mut child, || progress.wait(&last_line()));
    if let Some(listener) = listener.filter(|_| status.is_ok()) {
        // A process that it left behind may hold the pipe for ever.
        let deadline = Instant::now() + Duration::from_secs(1);
        while !listener.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
    let status = status.map_err(|error| format!("wait for {program}: {error}"))?;
    let said = said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).trim().to_owned();
    let complaint = || match said.is_empty() {
        true => format!("{program} ended ({status}) and said nothing"),
        false => format!("{program} ended ({status}): {said}"),
    };
    if !file.exists() {
        return Err(complaint());
    }
    let run = earlier::read(&file).map_err(|why| format!("{}: {why}; {}", file.display(), complaint()))?;
    if run.suites.is_empty() && !run.interrupted {
        return Err(complaint());
    }
    let content = status.success() || INTERRUPTED.load(Ordering::SeqCst);
    let by = format!("Measured by: {} {}", through.0.join(" "), run.command.join(" "));
    let mut suites = run.suites;
    suites.iter_mut().for_each(|suite| suite.method.push(by.clone()));
    Ok((suites, (!content).then(complaint)))
}

fn command(through: &Words, name: Name, options: &Options, setting: &Setting, file: &Path) -> Command {
    let mut command = Command::new(&through.0[0]);
    command.args(&through.0[1..]).arg(&setting.own).args([name.text(), "--json"]).arg(file);
    command.args(["--samples", &options.samples().to_string(), "--warm-up", &options.warm_up().to_string()]);
    command.args(["--instances", &options.instances.to_string()]);
    if let Some(limit) = options.limit() {
        command.args(["--at-most", &limit.as_secs().to_string()]);
    }
    for (rival, path) in &options.with {
        let mut with = std::ffi::OsString::from(format!("{rival}="));
        with.push(path);
        command.arg("--with").arg(with);
    }
    // Not the copy: there it is copied for itself.
    if let Ok(vmm) = options.vmm() {
        command.arg("--vmm").arg(vmm);
    }
    if let Ok(guests) = std::fs::canonicalize(options.guests()) {
        command.arg("--guests").arg(guests);
    }
    if options.icount {
        command.arg("--icount");
    }
    command
}

/// Waits, glancing around. After Ctrl-C, it is asked to end, and then made to.
fn wait(child: &mut Child, glance: impl Fn()) -> std::io::Result<ExitStatus> {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let signal = |signal| group.map(|group| kill_process_group(group, signal));
    let mut asked: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        match asked {
            None if INTERRUPTED.load(Ordering::SeqCst) => {
                signal(Signal::INT);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() > GRACE => {
                signal(Signal::KILL);
                return child.wait();
            }
            _ => glance(),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn listen(mut stderr: impl Read, said: &Mutex<String>) {
    let mut space = [0; 4096];
    while let Ok(count @ 1..) = stderr.read(&mut space) {
        let mut said = said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        said.push_str(&String::from_utf8_lossy(&space[..count]));
        if said.len() > 2 * SAID {
            let end = said.len() - SAID;
            let start = said.char_indices().map(|(at, _)| at).find(|at| *at >= end).unwrap_or(0);
            said.drain(..start);
        }
    }
}
