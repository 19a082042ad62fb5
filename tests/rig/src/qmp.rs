//! QEMU's machine protocol, as much of it as saving, restoring and waking a machine takes. Used by
//! `snapshot` and `session`.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Takes QEMU's greeting from `stream` and enters command mode.
    pub fn new(stream: UnixStream) -> Result<Qmp> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Qmp { stream: BufReader::new(stream) };
        qmp.read().context("QEMU's greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes `command` and returns its answer; events on the way are skipped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let stream = self.stream.get_mut();
        stream.write_all(line.as_bytes()).context("write to QEMU")?;
        loop {
            let mut answer = self.read().with_context(|| format!("QEMU's answer to {command}"))?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {}", error["desc"]);
            }
        }
    }

    /// Waits until the running migration is complete.
    pub fn finish_migration(&mut self) -> Result<()> {
        for _ in 0..30_000 {
            let answer = self.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's migration: {answer}"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        bail!("QEMU's migration does not end")
    }

    /// Gives the machine an interrupt, from its keyboard: a key goes up that was not down, which means nothing to anybody.
    pub fn interrupt(&mut self) -> Result<()> {
        let key = json!({ "down": false, "key": { "type": "qcode", "data": "scroll_lock" } });
        self.execute("input-send-event", json!({ "events": [{ "type": "key", "data": key }] }))?;
        Ok(())
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
