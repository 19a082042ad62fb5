//! What a line costs from the host into the program and its answer back: pipes natively and in the container, the virtio
//! console in the VM.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::super::host::Host;
use super::super::measure::{self, Absent, Contender, Plan, Quantity};
use super::super::result::{Better, Suite, Unit};
use super::super::rivals::{Place, Setting, Size};
use super::super::work::Step;
use super::places::{self, LIMIT, shown};

const RATE: Quantity =
    Quantity { name: "console round trips", unit: Unit::PerSecond, better: Better::Higher };
const SIZE: Size = Size { cpus: 1, mib: 256 };
/// About what one sample should take natively.
const SAMPLE: Duration = Duration::from_millis(100);
const FEW: u64 = 200;

/// The suite.
///
/// # Errors
/// The work cannot even be done natively.
pub fn run(setting: &Setting, plan: Plan, progress: &mut dyn FnMut(f64, &str)) -> Result<Suite, String> {
    let host = Host::look(setting.repeatable_clock);
    let rate = Talk { place: Place::Native, setting, count: FEW }.sample()?[0];
    let count = ((rate * SAMPLE.as_secs_f64()) as u64).clamp(FEW, 10 * FEW);
    let (mut contenders, mut absent): (Vec<Box<dyn Contender + '_>>, Vec<Absent>) = Default::default();
    for place in Place::ALL {
        let talk = Talk { place, setting, count };
        match place.command(setting, &[&talk.step().to_string()], SIZE) {
            Ok(_) => contenders.push(Box::new(talk)),
            Err(why) => {
                absent.push(Absent { name: places::name(place).to_owned(), command: talk.command(), why })
            }
        }
    }
    let (contenders, figures) = measure::series(&mut contenders, &absent, &[RATE], plan, progress);
    Ok(Suite {
        name: "console".to_owned(),
        title: "Console: native, container, VM".to_owned(),
        host,
        seed: plan.seed,
        method: vec![
            format!(
                "{count} times: the host writes a line of {} bytes to the program's standard input and waits for its answer on \
                 the standard output. From the first line written to the last answer read.",
                LINE.len()
            ),
            "Natively and in the container both are pipes; in the VM they are /dev/console on virtio, in raw mode.".to_owned(),
        ],
        contenders,
        figures,
    })
}

const LINE: &[u8] = b"a line like those that a person types\n";

/// One place.
struct Talk<'a> {
    place: Place,
    setting: &'a Setting,
    count: u64,
}

impl Talk<'_> {
    fn step(&self) -> Step {
        Step::Echo(self.count)
    }
}

impl Contender for Talk<'_> {
    fn name(&self) -> &str {
        places::name(self.place)
    }

    fn command(&self) -> String {
        let step = self.step().to_string();
        self.place
            .command(self.setting, &[&step], SIZE)
            .map_or_else(|_| format!("vmm-bench work {step} ({:?})", self.place), |command| shown(&command))
    }

    fn sample(&mut self) -> Result<Vec<f64>, String> {
        let step = self.step();
        let mut command = self.place.command(self.setting, &[&step.to_string()], SIZE)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("start {}: {error}", shown(&command)))?;
        let talked = talk(&mut child, self.count, None, &step);
        // It has said its last line, or is given up.
        if talked.is_err() {
            let _ = child.kill();
        }
        let mut complaint = String::new();
        if let Some(mut errors) = child.stderr.take() {
            let _ = errors.read_to_string(&mut complaint);
        }
        let status = child.wait().map_err(|error| format!("wait for {}: {error}", self.name()))?;
        let talked = talked.map_err(|why| format!("{why} ({status}): {}", complaint.trim()))?;
        if !status.success() {
            return Err(format!("{} ended with {status}: {}", self.name(), complaint.trim()));
        }
        Ok(vec![self.count as f64 / talked.answers.iter().sum::<Duration>().as_secs_f64()])
    }
}

/// How long it took.
pub struct Talked {
    /// What was done before.
    pub work: Duration,
    /// Each answer, from that before it.
    pub answers: Vec<Duration>,
}

/// Waits while `child` does `work`, if it has any; then writes lines and waits for their answers, `count` times.
///
/// # Errors
/// It says something else, or nothing in time.
pub fn talk(child: &mut Child, count: u64, work: Option<&Step>, step: &Step) -> Result<Talked, String> {
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err("no pipes".to_owned());
    };
    // A thread that does it, so that silence has its limit.
    let (sender, done) = channel();
    let (begin, end) = (step.begin(), step.end());
    let work = work.map(|work| (work.begin(), work.end()));
    thread::Builder::new()
        .name("talk".to_owned())
        .spawn(move || {
            let mut output = BufReader::new(output);
            let talked = (|| {
                let mut talked = Talked { work: Duration::ZERO, answers: Vec::with_capacity(count as usize) };
                if let Some((begin, end)) = work {
                    wait_for(&mut output, begin.trim_end())?;
                    let start = Instant::now();
                    wait_for(&mut output, end.trim_end())?;
                    talked.work = start.elapsed();
                }
                wait_for(&mut output, begin.trim_end())?;
                let mut before = Instant::now();
                for _ in 0..count {
                    input.write_all(LINE).map_err(|error| format!("write a line: {error}"))?;
                    wait_for(&mut output, "pong")?;
                    let now = Instant::now();
                    talked.answers.push(now - before);
                    before = now;
                }
                wait_for(&mut output, end.trim_end())?;
                Ok(talked)
            })();
            let _ = sender.send(talked);
            // The rest must go somewhere until the process ends; so must its input stay open.
            let _ = std::io::copy(&mut output, &mut std::io::sink());
            drop(input);
        })
        .map_err(|error| format!("start a thread: {error}"))?;
    match done.recv_timeout(LIMIT) {
        Ok(talked) => talked,
        Err(RecvTimeoutError::Timeout) => Err(format!("no answer for {LIMIT:?}")),
        Err(RecvTimeoutError::Disconnected) => Err("the conversation broke off".to_owned()),
    }
}

/// Reads lines until one begins with `start`.
fn wait_for(output: &mut BufReader<ChildStdout>, start: &str) -> Result<(), String> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let count =
            output.read_until(b'\n', &mut line).map_err(|error| format!("read an answer: {error}"))?;
        if count == 0 {
            return Err(format!("it ended before {start:?}"));
        }
        if line.starts_with(start.as_bytes()) {
            return Ok(());
        }
    }
}
