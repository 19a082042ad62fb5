//! The spans of many that are started at once, all from one moment: by a process each, or by one command for all.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::offspring;
use super::span;
use crate::rivals::launch::{Launch, Output};

/// What one of them did, and when, from the moment at which all were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Each of the marks.
    pub marks: Vec<Duration>,
    /// It was gone.
    pub exit: Duration,
    /// The status that it exited with; none if a signal ended it.
    pub status: Option<i32>,
}

/// Starts all of `launches` at once, and follows each through `marks` to its end.
///
/// Where several share a pipe, nobody knows who speaks: each of their lives is made of the n-th time that a mark was said, and the
/// n-th end.
///
/// # Errors
/// Of the first that fails: as [`span::measure`].
pub fn at_once(launches: Vec<Launch>, marks: &[&[u8]], limit: Duration) -> Result<Vec<Life>, String> {
    let requests = launches.iter().filter(|launch| launch.request.is_some()).count();
    let gate = Barrier::new(launches.len() + requests);
    let lives = thread::scope(|scope| {
        let gate = &gate;
        let followers: Vec<_> = launches
            .into_iter()
            .map(|Launch { command, input, request, output }| {
                let asker = request.map(|request| {
                    scope.spawn(move || {
                        gate.wait();
                        request()
                    })
                });
                let follower = scope.spawn(move || {
                    gate.wait();
                    let start = Instant::now();
                    let lives = match output {
                        Output::Shared { pipe, machines } => {
                            offspring::measure(command, pipe.into(), machines, marks, limit)?
                        }
                        Output::Own | Output::None => {
                            let input = input.unwrap_or_else(std::process::Stdio::null);
                            let span = span::with_input(command, input, marks, limit, &mut |_, _| Ok(()))?;
                            vec![Life { marks: span.marks, exit: span.exit, status: span.status.code() }]
                        }
                    };
                    Ok::<_, String>((start, lives))
                });
                (follower, asker)
            })
            .collect();
        let joined = followers.into_iter().map(|(follower, asker)| {
            let lives = follower.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let asked =
                asker.map_or(Ok(()), |a| a.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // What was not asked for well tells more than what did not come of it.
            asked.and(lives)
        });
        joined.collect::<Result<Vec<_>, String>>()
    })?;
    let Some(first) = lives.iter().map(|(start, _)| *start).min() else { return Ok(Vec::new()) };
    let since =
        |(start, lives): (Instant, Vec<Life>)| lives.into_iter().map(move |life| life.later(start - first));
    Ok(lives.into_iter().flat_map(since).collect())
}

impl Life {
    /// Counted from `delay` before.
    fn later(mut self, delay: Duration) -> Self {
        self.marks.iter_mut().for_each(|mark| *mark += delay);
        self.exit += delay;
        self
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn all_are_counted_from_one_moment() {
        let scripts = ["echo a; echo b; exit 3", "sleep 0.2; echo a; sleep 0.1; echo b"];
        let launches = scripts.map(|script| Launch::of(shell(script))).into();
        let lives = at_once(launches, &[b"a", b"b"], LIMIT).unwrap();
        assert_eq!((lives[0].status, lives[1].status), (Some(3), Some(0)));
        assert!(lives[1].marks[0] >= Duration::from_millis(200), "{lives:?}");
        assert!(lives[1].marks[1] >= Duration::from_millis(290) && lives[1].exit >= lives[1].marks[1]);
        assert!(lives[0].exit < lives[1].exit, "{lives:?}");
    }

    #[test]
    fn what_is_asked_is_in_the_span_and_its_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("asked");
        let script = format!("until [ -e {0} ]; do sleep 0.01; done; echo a", asked.display());
        let request = move || {
            thread::sleep(Duration::from_millis(100));
            std::fs::write(asked, "").map_err(|error| error.to_string())
        };
        let launch = Launch { request: Some(Box::new(request)), ..Launch::of(shell(&script)) };
        let lives = at_once(vec![launch], &[b"a"], LIMIT).unwrap();
        assert!(lives[0].marks[0] >= Duration::from_millis(100), "{lives:?}");
        let request = || Err("woe".to_owned());
        let launch = Launch { request: Some(Box::new(request)), ..Launch::of(shell("exit 1")) };
        assert_eq!(at_once(vec![launch], &[b"a"], LIMIT), Err("woe".to_owned()));
    }

    #[test]
    fn one_failure_fails_them_all() {
        let launches = ["echo a", "exit 7"].map(|script| Launch::of(shell(script))).into();
        let error = at_once(launches, &[b"a"], LIMIT).unwrap_err();
        assert!(error.contains('7'), "{error}");
    }
}
