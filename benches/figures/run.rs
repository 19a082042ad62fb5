//! One start of a monitor, and the series of them that a table is made of.

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};

use crate::guests::Guest;
use crate::monitors::Monitor;
use crate::options::Options;
use crate::smaps::{self, Weight};

/// From the call that starts the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// To the marker on its standard output.
    pub marker: Duration,
    /// Until it is gone.
    pub exit: Duration,
}

/// Ends the process if the measurement is given up.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `guest` once. `at_marker` is called when the guest has spoken; what it takes is part of the time to exit.
pub fn once<T>(
    monitor: &Monitor,
    guest: &Guest,
    at_marker: impl FnOnce(u32) -> Result<T, String>,
) -> Result<(Times, T), String> {
    let mut command = monitor.command(guest);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |what: &str, e: std::io::Error| format!("{}: {what}: {e}", monitor.name);
    let start = Instant::now();
    let mut running = Running(command.spawn().map_err(|e| failed("start", e))?);
    let mut output = running.0.stdout.take().ok_or("no pipe")?;
    let (mut said, mut space) = (Vec::new(), [0; 4096]);
    let contains = |said: &[u8]| said.windows(guest.marker.len()).any(|window| window == guest.marker);
    while !contains(&said) {
        match output.read(&mut space).map_err(|e| failed("read its output", e))? {
            0 => {
                let mut errors = String::new();
                let _ = running.0.stderr.take().map(|mut pipe| pipe.read_to_string(&mut errors));
                let said = String::from_utf8_lossy(&said);
                return Err(format!("{}: no marker in its output: {said}{errors}", monitor.name));
            }
            count => said.extend_from_slice(&space[..count]),
        }
    }
    let marker = start.elapsed();
    let extra = at_marker(running.0.id())?;
    let status = running.0.wait().map_err(|e| failed("wait", e))?;
    let exit = start.elapsed();
    if status.code() != Some(monitor.good_end(guest)) {
        return Err(format!("{}: {status}", monitor.name));
    }
    Ok((Times { marker, exit }, extra))
}

/// The weight at the marker: the monitor is stopped there, so this start is not one to time.
pub fn weigh(monitor: &Monitor, guest: &Guest) -> Result<Weight, String> {
    let at_marker = |id: u32| {
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw).ok_or("no pid")?;
        kill_process(pid, Signal::STOP).map_err(|e| format!("stop it: {e}"))?;
        let weight = smaps::weigh(id);
        kill_process(pid, Signal::CONT).map_err(|e| format!("let it go on: {e}"))?;
        weight
    };
    once(monitor, guest, at_marker).map(|(_, weight)| weight)
}

/// Times `count` starts of each monitor: rounds of all, each round in a random order. One more before counts for nothing.
pub fn series(monitors: &[Monitor], guest: &Guest, count: usize) -> Result<Vec<Vec<Times>>, String> {
    let mut times = vec![Vec::new(); monitors.len()];
    let mut random = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64 | 1);
    for round in 0..=count {
        let mut order: Vec<usize> = (0..monitors.len()).collect();
        for last in (1..order.len()).rev() {
            // xorshift64
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            order.swap(last, (random % (last as u64 + 1)) as usize);
        }
        for index in order {
            let (time, ()) = once(&monitors[index], guest, |_| Ok(()))?;
            if round > 0 {
                times[index].push(time);
            }
        }
    }
    Ok(times)
}

/// The part that runs in the rig. One line per figure goes out, for [`crate::outer`] to read.
pub fn inside(options: &Options) -> Result<(), String> {
    let guest = Guest::linux(options.guests.as_deref())?;
    let monitors = Monitor::all(options);
    let say = |monitor: &Monitor, times: &Times| {
        println!("time\t{}\t{}\t{}", monitor.name, times.marker.as_nanos(), times.exit.as_nanos());
    };
    if options.only.is_some() {
        // A repeatable clock: nothing warms up, nothing is random, each start stands for itself.
        for monitor in &monitors {
            for _ in 0..2 {
                say(monitor, &once(monitor, &guest, |_| Ok(()))?.0);
            }
        }
        return Ok(());
    }
    let times = series(&monitors, &guest, options.samples.unwrap_or(10))?;
    for (monitor, times) in monitors.iter().zip(times) {
        times.iter().for_each(|times| say(monitor, times));
        for _ in 0..3 {
            let Weight { resident, private, peak } = weigh(monitor, &guest)?;
            println!("weight\t{}\t{resident}\t{private}\t{peak}", monitor.name);
        }
    }
    Ok(())
}
