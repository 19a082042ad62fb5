//! The two protocols by which other monitors are told to save a machine, or to go on with one: HTTP and QMP, over a socket file.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::{Value, json};

use super::super::idle::wait_for;
use super::source::LIMIT;

/// Asks for `path` by `method` with `body`, of whoever listens on `socket`, and waits for a good answer.
pub fn http(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<(), String> {
    let failed = |error: io::Error| format!("{method} {path}: {error}");
    let mut stream = connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(failed)?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = "Host: localhost\r\nAccept: */*\r\nContent-Type: application/json";
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = BufReader::new(stream);
    let (mut status, mut length) = (String::new(), 0);
    answer.read_line(&mut status).map_err(failed)?;
    // The connection stays open, and what a good answer says further is of no interest.
    if is_good(&status) {
        return Ok(());
    }
    let mut field = String::new();
    while answer.read_line(&mut field).map_err(failed)? > 2 {
        let (name, value) = field.split_once(':').unwrap_or_default();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap_or(0);
        }
        field.clear();
    }
    let mut why = String::new();
    answer.take(length).read_to_string(&mut why).map_err(failed)?;
    Err(format!("{method} {path}: {}: {}", status.trim(), first_lines(&why)))
}

/// What is worth telling of an error that may go on with a trace of its stack.
fn first_lines(why: &str) -> &str {
    why.split("\\n\\n").next().unwrap_or_default().trim()
}

/// Whether a status is one of 200 to 299 (RFC 9112, 4).
fn is_good(status: &str) -> bool {
    status.starts_with("HTTP/1.1 2") || status.starts_with("HTTP/1.0 2")
}

/// Connects to `socket`, which is bound already.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    // A process that was just started binds first, and listens then.
    for _ in 0..10_000 {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::thread::yield_now(),
            other => return other,
        }
    }
    UnixStream::connect(socket)
}

/// Sees a socket come into a folder that is its alone.
pub struct Arrival {
    watch: rustix::fd::OwnedFd,
}

impl Arrival {
    /// Of what comes into `folder` from now on.
    pub fn into(folder: &Path) -> Result<Self, String> {
        let watch = inotify::init(CreateFlags::CLOEXEC).and_then(|watch| {
            inotify::add_watch(&watch, folder, WatchFlags::CREATE)?;
            Ok(watch)
        });
        let watch = watch.map_err(|error| format!("watch {}: {error}", folder.display()))?;
        Ok(Self { watch })
    }

    /// Waits until it is there.
    pub fn wait(&self) -> Result<(), String> {
        wait_for(&self.watch, Instant::now() + LIMIT, "its API")
    }
}

/// QEMU's machine protocol (docs/interop/qmp-spec.txt): what a migration needs of it.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, and leaves the negotiation behind.
    pub fn connect(socket: &Path) -> Result<Self, String> {
        let stream = connect(socket).map_err(|error| format!("{}: {error}", socket.display()))?;
        stream.set_read_timeout(Some(LIMIT)).map_err(|error| error.to_string())?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.message()?;
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs `command`, and returns what it returns.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.map_err(|error| format!("{command}: {error}"))?;
        loop {
            let message = self.message()?;
            if let Some(error) = message.get("error") {
                return Err(format!("{command}: {}", error["desc"].as_str().unwrap_or("refused")));
            }
            // Events come at any time.
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
        }
    }

    fn message(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(|error| format!("QMP: {error}"))?;
        serde_json::from_str(&line).map_err(|error| format!("QMP: {error}: {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What `ask` makes of a server that answers with `answer`, and what the server heard.
    fn served<T>(answer: &'static str, ask: impl FnOnce(&Path) -> T) -> (T, String) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let arrival = Arrival::into(folder.path()).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        arrival.wait().unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(move || {
                let mut stream = listener.accept().unwrap().0;
                stream.write_all(answer.as_bytes()).unwrap();
                let mut heard = String::new();
                stream.read_to_string(&mut heard).unwrap();
                heard
            });
            (ask(&socket), server.join().unwrap())
        })
    }

    #[test]
    fn a_request_is_http_and_a_refusal_is_told() {
        let put = |socket: &Path| http(socket, "PUT", "/x", Some(&json!({ "a": 1 })));
        let (good, heard) = served("HTTP/1.1 204 \r\nServer: x\r\n\r\n", put);
        assert_eq!(good, Ok(()));
        assert!(heard.starts_with("PUT /x HTTP/1.1\r\n"), "{heard}");
        assert!(heard.ends_with("Content-Length: 7\r\n\r\n{\"a\":1}"), "{heard}");
        let (bad, _) = served("HTTP/1.1 400 \r\nContent-Length: 12\r\n\r\n{\"why\":\"no\"}", put);
        assert_eq!(bad, Err("PUT /x: HTTP/1.1 400: {\"why\":\"no\"}".to_owned()));
    }

    #[test]
    fn a_qmp_answer_is_found_among_events() {
        let answers =
            "{\"QMP\":{}}\n{\"return\":{}}\n{\"event\":\"STOP\"}\n{\"return\":{\"status\":\"completed\"}}\n";
        let (status, heard) = served(answers, |socket| {
            Qmp::connect(socket)?.ask("query-migrate", json!({})).map(|answer| answer["status"].clone())
        });
        assert_eq!(status, Ok(json!("completed")));
        assert!(heard.contains("qmp_capabilities") && heard.contains("query-migrate"), "{heard}");
        let refused = "{\"QMP\":{}}\n{\"return\":{}}\n{\"error\":{\"desc\":\"woe\"}}\n";
        let (error, _) = served(refused, |socket| Qmp::connect(socket)?.ask("migrate", json!({})));
        assert_eq!(error, Err("migrate: woe".to_owned()));
    }
}
