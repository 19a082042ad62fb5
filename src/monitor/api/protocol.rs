//! The protocol of the control socket: one JSON request a line, one JSON reply a line, in order.
//!
//! ```text
//! {"version":1,"command":"stop","timeout_seconds":10}
//! {"version":1,"status":{"name":"calm-otter","pid":4711,"state":"stopping",...}}
//! {"version":1,"error":"the guest is starting"}
//! {"version":1,"error":"it has no device called \"net7\"","hint":"vmm device list shows what it has"}
//! ```
//!
//! After the reply to `stop` and `kill` the server keeps the connection open until the virtual machine is gone, so that its end is the
//! news of that. The reply to `wait` comes when the run is over, and is the last thing on its connection. With the first `sample` the
//! client becomes a viewer of the machine, and stays one as long as the connection lasts: one that does not ask again within some
//! seconds is cut off like any other. Files come and go as descriptors (SCM_RIGHTS) beside their message. Does no I/O itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Sample, Status};
use crate::kvm::VcpuState;
use crate::machine::Attached;
use crate::pool::PoolStatus;
use crate::printable::{self, Printable};

/// The protocol's version, in every message. Another one is refused.
pub const VERSION: u32 = 1;
/// The longest request in bytes, its newline included.
pub const MAX_REQUEST: usize = 4096;
/// The longest reply in bytes, its newline included.
pub const MAX_REPLY: usize = 256 << 10;

/// What may be asked of a virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Command {
    /// Nothing but the status, which every command is answered with.
    Status,
    /// Park it.
    Pause,
    /// Let it run on.
    Resume,
    /// Press the power button (resuming it first if it is paused), and stop it hard when the time is over.
    Stop {
        /// Seconds until then; absent: the `--stop-timeout` that it was started with.
        #[serde(default)]
        timeout_seconds: Option<u64>,
    },
    /// Stop it hard.
    Kill,
    /// What each of its vCPUs does or waits for.
    Vcpus,
    /// What it has been doing, in sums that only grow: asked again and again, they tell what happens between.
    Sample,
    /// How its run ends, answered when it is over.
    Wait,
    /// What virtio devices it has.
    Devices,
    /// Give it another device. The files of a disk come with this (SCM_RIGHTS): its image, the overlay that is read, the one that is
    /// written to. Without them it is said whether they are worth opening, by [`Answer::Files`].
    #[serde(rename = "add-device")]
    AddDevice {
        /// Which, a [`Plug`](crate::config::Plug) whose paths are absolute. As a value: others are read and written as such anyway.
        device: Value,
    },
    /// Ask the guest to let a device go: it is gone when it is not among the devices any more.
    #[serde(rename = "remove-device")]
    RemoveDevice {
        /// The device's name in the machine.
        name: String,
        /// Take it away without asking.
        #[serde(default)]
        force: bool,
    },
    /// The names of the files that a snapshot of it has.
    Files,
    /// Save it in files whose descriptors come with this (SCM_RIGHTS): those of [`Command::Files`], in that order, then those of a
    /// snapshot that has the memory which is the same there, if that is to be left out, and of those below that.
    Snapshot {
        /// Their folder, to tell of them.
        #[serde(with = "crate::config::host_path")]
        folder: PathBuf,
        /// How the snapshot below is found from there.
        #[serde(default, with = "crate::config::host_path::optional")]
        base: Option<PathBuf>,
        /// Compress its memory.
        #[serde(default)]
        compress: bool,
        /// It stands still from then on, for as long as this connection lasts: whoever asks has more to do before it may be killed.
        #[serde(default)]
        stay: bool,
    },
    /// Of a pool: machines that go on from its spares.
    Take {
        /// How many.
        count: u32,
        /// The name of one, or of several NAME-1 and so on; absent: the pool's name with numbers.
        #[serde(default)]
        name: Option<String>,
        /// Each has its guest told by its agent that it is a copy. Otherwise whoever takes them sees to that.
        renew: bool,
        /// Each ends, and leaves nothing, when the connection that asks for it does.
        #[serde(default)]
        tied: bool,
    },
    /// Save it in files without names, whose descriptors come with the answer (SCM_RIGHTS): configuration, state and memory, in
    /// this order, then the disks that the guest may write to. The files of those, which are empty, come with this.
    Fork,
}

impl Command {
    /// Whether it may take its time, and the server does not wait for it.
    pub fn may_take_time(&self) -> bool {
        self.is_for_a_machine_that_stays() || *self == Self::Vcpus
    }

    /// Whether one that is being stopped refuses it.
    pub fn is_for_a_machine_that_stays(&self) -> bool {
        matches!(
            self,
            Self::Pause
                | Self::AddDevice { .. }
                | Self::RemoveDevice { .. }
                | Self::Snapshot { .. }
                | Self::Fork
        )
    }

    /// The virtual machine ends by this; the connection lasts until then.
    pub fn ends(&self) -> bool {
        matches!(self, Self::Stop { .. } | Self::Kill)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    command: Command,
}

#[derive(Debug, Serialize, Deserialize)]
struct Reply {
    version: u32,
    #[serde(flatten)]
    answer: Answer,
    /// Of an error: what to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// What comes back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It is done; this is how things stand after it.
    Status(Status),
    /// Answers [`Command::Vcpus`].
    Vcpus(Vec<VcpuState>),
    /// Answers [`Command::Sample`].
    Sample(Box<MachineSample>),
    /// Answers [`Command::Wait`].
    Ended(Ended),
    /// Answers [`Command::Devices`].
    Devices(Vec<Attached>),
    /// Answers [`Command::Files`], and a [`Command::AddDevice`] that lacks them.
    Files(Vec<PathBuf>),
    /// Answers [`Command::AddDevice`] and [`Command::RemoveDevice`]: the device as it is now.
    Device(Attached),
    /// Answers [`Command::Take`].
    Taken(Taken),
    /// A pool's answer to [`Command::Status`], [`Command::Stop`] and [`Command::Kill`].
    Pool(PoolStatus),
    /// It is not done, and why.
    Error(Refusal),
}

/// Why something is not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// What to try. On the line it stands beside the error: who does not know it yet reads that all the same.
    pub hint: Option<String>,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self { reason, hint: None }
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

impl From<Refusal> for String {
    fn from(refusal: Refusal) -> Self {
        refusal.reason
    }
}

/// Machines that were taken from a pool, which run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Their names.
    pub names: Vec<String>,
    /// Why there are not as many as were asked for, if there are not.
    #[serde(default)]
    pub error: Option<String>,
}

/// The end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The exit status of the monitor's process.
    pub code: u8,
}

/// A machine's status and counters at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineSample {
    /// What it is.
    pub status: Status,
    /// What it has been doing.
    pub sample: Sample,
}

/// A request as the line that is sent.
pub fn request(command: Command) -> Vec<u8> {
    line(&Request { version: VERSION, command })
}

/// A reply as the line that is sent.
pub fn reply(answer: Answer) -> Vec<u8> {
    let hint = match &answer {
        Answer::Error(refusal) => refusal.hint.clone(),
        _ => None,
    };
    line(&Reply { version: VERSION, answer, hint })
}

fn line(message: &impl Serialize) -> Vec<u8> {
    // These types have string keys and finite numbers only, so writing them to memory cannot fail.
    let mut bytes = serde_json::to_vec(message).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Reads a request.
///
/// # Errors
/// In words, what is wrong with it: to be sent back.
pub fn parse_request(line: &[u8]) -> Result<Command, String> {
    check_version(line)?;
    let request: Request = serde_json::from_slice(line).map_err(|e| format!("not a request: {e}"))?;
    Ok(request.command)
}

/// Reads a reply. Its texts are [`printable`], whatever the peer sent.
///
/// # Errors
/// In words, what is wrong with it.
pub fn parse_reply(line: &[u8]) -> Result<Answer, String> {
    check_version(line)?;
    // What a monitor says ends on a terminal: nothing in it acts there.
    let value = serde_json::from_slice(line).map(printable::value).map_err(|e| e.to_string())?;
    let Reply { mut answer, hint, .. } = serde_json::from_value(value).map_err(|e| e.to_string())?;
    if let Answer::Error(refusal) = &mut answer {
        refusal.hint = hint;
    }
    Ok(answer)
}

/// Looks at the version before the rest, whose shape depends on it.
fn check_version(line: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    match serde_json::from_slice(line) {
        Ok(Versioned { version: VERSION }) => Ok(()),
        Ok(Versioned { version }) => Err(format!("protocol version {version}, where {VERSION} is spoken")),
        Err(e) => Err(format!("not a message of this protocol: {}", Printable(e))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_the_line() {
        let plug = |text: &str| crate::config::Plug::try_from(std::ffi::OsStr::new(text)).unwrap();
        let add = |text| Command::AddDevice { device: serde_json::to_value(plug(text)).unwrap() };
        let stop = Command::Stop { timeout_seconds: Some(3) };
        for command in [
            Command::Status,
            Command::Pause,
            Command::Resume,
            stop,
            Command::Kill,
            Command::Vcpus,
            Command::Sample,
            Command::Wait,
            Command::Devices,
            add("disk=/a b,readonly"),
            add("net=user,publish=8080:80"),
            Command::RemoveDevice { name: "virtio-blk1".to_owned(), force: true },
            Command::Take { count: 3, name: Some("w".to_owned()), renew: true, tied: true },
        ] {
            let line = request(command.clone());
            assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            assert_eq!(parse_request(&line), Ok(command));
        }
        assert_eq!(
            parse_request(br#"{"version":1,"command":"stop"}"#),
            Ok(Command::Stop { timeout_seconds: None })
        );
    }

    #[test]
    fn nothing_in_a_reply_acts_on_a_terminal() {
        let evil = "\u{1b}]0;x\u{7}\u{9b}2J\u{202e}";
        let status = |text: &str| Status {
            name: text.to_owned(),
            pid: 1,
            state: crate::api::State::Running,
            uptime_seconds: 0.0,
            cpus: 1,
            memory_bytes: 1,
            kernel: Some(text.into()),
            vsock: Some(text.into()),
            vsock_cid: None,
            ptys: vec![crate::api::Pty { device: text.to_owned(), path: text.into() }],
            ports: vec![crate::api::PortSocket { name: text.to_owned(), path: text.into() }],
            networks: Vec::new(),
            sandbox: text.to_owned(),
            cgroup: Some(text.into()),
        };
        let sample = serde_json::json!({"kernel": evil, "reasons": {evil: [evil, 1]}});
        let seen = Answer::Sample(Box::new(MachineSample { status: status(evil), sample }));
        let refused = Answer::Error(Refusal { reason: evil.to_owned(), hint: Some(evil.to_owned()) });
        for answer in [Answer::Status(status(evil)), seen, refused] {
            let text = format!("{:?}", parse_reply(&reply(answer)).unwrap());
            // Debug shows what it escapes with one backslash: what was escaped before has two.
            let clean = text.replace("\\\\u{1b}]0;x\\\\u{7}\\\\u{9b}2J\\\\u{202e}", "");
            assert!(clean.len() < text.len() && !clean.contains("\\u{"), "{text}");
        }
        // Nor in what is said of one that cannot be read.
        for line in [
            r#"{"version":1,"error":{"\u001b":1}}"#,
            r#"{"version":"\u001b"}"#,
            r#"{"version":1,"\u001b":1}"#,
        ] {
            let error = parse_reply(line.as_bytes()).unwrap_err();
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
    }

    #[test]
    fn a_hint_stands_beside_its_error() {
        let refusal = Refusal { reason: "no".to_owned(), hint: Some("try".to_owned()) };
        for (refusal, text) in [
            (refusal, "{\"version\":1,\"error\":\"no\",\"hint\":\"try\"}\n"),
            ("no".into(), "{\"version\":1,\"error\":\"no\"}\n"),
        ] {
            let line = reply(Answer::Error(refusal.clone()));
            assert_eq!(str::from_utf8(&line), Ok(text));
            assert_eq!(parse_reply(&line), Ok(Answer::Error(refusal)));
        }
    }

    #[test]
    fn what_is_no_request_is_refused_in_words() {
        for (line, word) in [
            (&b""[..], "not a message"),
            (b"\xff\xfe", "not a message"),
            (b"GET / HTTP/1.1", "not a message"),
            (br#"{"version":2,"command":"status"}"#, "version 2"),
            (br#"{"version":1}"#, "command"),
            (br#"{"version":1,"command":"explode"}"#, "explode"),
            (br#"{"version":1,"command":"stop","timeout_seconds":-1}"#, "-1"),
        ] {
            let error = parse_request(line).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
