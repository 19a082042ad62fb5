//! `vmm exec` and `vmm shell` with the real agent.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

use super::Guest;
use crate::place::*;
use crate::terminal::Terminal;

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_command_has_its_streams_apart_and_its_exit_code() {
    let guest = Guest::new();
    let mut command = guest.script("-i", "cat; echo out; echo err >&2; exit 42");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"in\0\x04\xff\n").unwrap();
    let output = finish(child);
    assert_eq!(output.stdout, b"in\0\x04\xff\nout\n");
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(42));
}

/// What `docker exec` returns.
#[test]
fn codes_are_those_of_docker() {
    let guest = Guest::new();
    let place = &guest.place;
    place.file("locked", "#!/bin/sh\n");
    place.file("wrong", "#!/nonexistent/interpreter\n");
    fs::set_permissions(place.path("wrong"), fs::Permissions::from_mode(0o755)).unwrap();
    place.file("garbage", [0x7f, 1, 2, 3]);
    fs::set_permissions(place.path("garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    let here = place.dir.path().display().to_string();
    for (arguments, code, words) in [
        ("exec web true", 0, ""),
        ("exec web -- true", 0, ""),
        ("exec web false", 1, ""),
        ("exec web sh -c exit\t255", 255, ""),
        ("exec web sh -c kill\t-9\t$$", 137, ""),
        ("exec web sh -c kill\t-15\t$$", 143, ""),
        ("exec web sh -c kill\t-11\t$$", 139, ""),
        ("exec web nosuchprogram", 127, "no program nosuchprogram"),
        ("exec web /no/such/program", 127, "no program /no/such/program"),
        ("exec web /etc", 126, "/etc"),
        (&format!("exec web {here}/locked"), 126, "ermission"),
        (&format!("exec web {here}/wrong"), 126, "interpreter"),
        (&format!("exec web {here}/garbage"), 126, "xec format"),
        ("exec -w /no/such/folder web true", 126, "no folder /no/such/folder"),
        ("exec -u nobody-at-all web true", 126, "no user nobody-at-all"),
        ("exec -u root:no-such-group web true", 126, "no group no-such-group"),
        ("exec -u  web true", 125, "-u \"\" names nothing"),
        ("exec -u :root web true", 125, "-u \":root\" names nothing"),
        ("shell -u  web", 125, "-u \"\" names nothing"),
        ("exec -w  web true", 125, "-w \"\" names nothing"),
        ("exec -e  web true", 125, "names no variable"),
        ("exec -e =bar web true", 125, "names no variable"),
        ("exec other true", 125, "other"),
        ("exec -it web true", 125, "no terminal"),
        ("exec web", 125, "COMMAND"),
        ("exec --timeout 0.5 web true", 125, "0.5"),
        ("exec --no-such web true", 125, "--no-such"),
        ("shell", 125, "NAME"),
    ] {
        let mut command = guest.command("");
        command.args(arguments.split(' ').map(|argument| argument.replace('\t', " ")));
        let output = finish(command.spawn().unwrap());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments}: {said}");
        assert!(said.contains(words) && said.is_empty() == words.is_empty(), "{arguments}: {said}");
    }
}

#[test]
fn a_command_has_its_environment_folder_and_user() {
    let guest = Guest::new();
    let told = |options: &str, script: &str| {
        let mut command = guest.script(options, script);
        let output = finish(command.env("FROM_HERE", "x y").spawn().unwrap());
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).trim_end().to_owned()
    };
    assert_eq!(
        told("-e A=b=c -e FROM_HERE -e NOT_HERE", "echo $A,$FROM_HERE,${NOT_HERE-unset}"),
        "b=c,x y,unset"
    );
    assert_eq!(told("", "pwd; echo $HOME ${FROM_HERE-none}"), "/\n/root none");
    assert_eq!(told("-w /usr", "pwd"), "/usr");
    assert!(told("", "echo $PATH").contains("/usr/bin"));
    assert_eq!(told("-e PATH=/nowhere:/bin:/usr/bin", "echo $PATH"), "/nowhere:/bin:/usr/bin");
    if rustix::process::geteuid().is_root() {
        assert_eq!(told("-u nobody", "id -un; id -Gn; echo $HOME"), "nobody\nnogroup\n/nonexistent");
        assert_eq!(told("-u 4711:12", "id -u; id -g; id -G"), "4711\n12\n12");
        assert_eq!(told("-u daemon", "id -un; grep ^NoNewPrivs /proc/self/status | wc -l"), "daemon\n1");
    } else {
        eprintln!("SKIP: a_command_has_its_environment_folder_and_user: other users: needs root");
    }
}

#[test]
fn without_i_a_command_reads_nothing_and_stdin_is_left_alone() {
    let guest = Guest::new();
    let mut shell = Command::new("sh");
    guest.place.set_up(&mut shell);
    shell.args(["-c", &format!("{} exec web cat; cat", crate::PROGRAM)]).stdin(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"for the second").unwrap();
    let output = finish(child);
    assert_eq!(text(&output.stdout), "for the second", "{}", text(&output.stderr));
}

#[test]
fn stdin_of_nobody_is_at_its_end() {
    let guest = Guest::new();
    let mut shell = Command::new("sh");
    guest.place.set_up(&mut shell);
    shell.args(["-c", &format!("{} exec -i web cat <&-", crate::PROGRAM)]);
    let output = finish(shell.spawn().unwrap());
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), String::new()));
}

#[test]
fn a_command_that_does_not_read_its_stdin_ends_all_the_same() {
    let guest = Guest::new();
    let mut child = guest.script("-i", "exec <&-; echo done").stdin(Stdio::piped()).spawn().unwrap();
    // Nobody ends it, or writes into it.
    let stdin = child.stdin.take();
    let output = finish(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "done\n".to_owned()));
    drop(stdin);
}

#[test]
fn a_slow_reader_loses_neither_output_nor_exit() {
    let guest = Guest::new();
    let script = "head -c 3000000 /dev/zero; echo last; exit 7";
    let mut child = guest.script("", script).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // The command cannot end: 3 MB are more than all windows and pipes hold. Nothing has been read.
    let mut first = [0; 1];
    stdout.read_exact(&mut first).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 3_000_004);
    assert!(rest.ends_with(b"\0last\n"));
    assert_eq!(wait(&mut child).code(), Some(7));
}

#[test]
fn a_stalled_stream_stalls_neither_the_other_nor_signals() {
    let guest = Guest::new();
    let script =
        "trap 'echo caught >&2; exit 9' TERM; yes & yes=$!; sleep 0.1; echo ready >&2; wait; kill $yes";
    let mut child = guest.script("", script).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let mut line = [0; 6];
    stderr.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    // stdout is full by now, or will be: nobody reads it. The other commands do not mind, either.
    assert_eq!(guest.vmm("exec web echo other").stdout, b"other\n");
    signal(&child, Signal::TERM);
    let mut line = [0; 7];
    stderr.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"caught\n");
    drop(child.stdout.take());
    assert_eq!(wait(&mut child).code(), Some(9));
}

#[test]
fn a_reader_that_goes_away_is_a_broken_pipe_to_the_command() {
    let guest = Guest::new();
    let mut child = guest.command("exec web yes").spawn().unwrap();
    let mut some = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    assert_eq!(wait(&mut child).code(), Some(128 + 13));
}

#[test]
fn signals_go_on_to_the_command() {
    let guest = Guest::new();
    for (one, number) in [(Signal::INT, 2), (Signal::TERM, 15), (Signal::USR1, 10), (Signal::QUIT, 3)] {
        let script =
            format!("trap 'echo got; exit {number}' {number}; echo ready; while :; do sleep 0.01; done");
        let mut child = guest.script("", &script).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut line = [0; 6];
        stdout.read_exact(&mut line).unwrap();
        signal(&child, one);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "got\n");
        assert_eq!(wait(&mut child).code(), Some(number));
        let mut child = guest.command("exec web sleep 1000").spawn().unwrap();
        until("the command runs", || commands(&guest) == ["sleep"]);
        signal(&child, one);
        assert_eq!(wait(&mut child).code(), Some(128 + number), "without a handler");
    }
}

#[test]
fn who_insists_gets_away_from_a_command_that_heeds_nothing() {
    let guest = Guest::new();
    let mut child =
        guest.script("", "trap '' INT; echo ready; while :; do sleep 0.01; done").spawn().unwrap();
    let mut line = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    while child.try_wait().unwrap().is_none() {
        signal(&child, Signal::INT);
        thread::sleep(Duration::from_millis(20));
    }
    let status = wait(&mut child);
    assert_eq!(status.code(), Some(130), "{:?}", status.signal());
}

/// The names of the agent's children.
pub fn commands(guest: &Guest) -> Vec<String> {
    let agent = guest.agent.as_ref().unwrap().id();
    let mut names = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        // "PID (NAME) STATE PPID ..."
        let Ok(stat) = fs::read_to_string(process.path().join("stat")) else { continue };
        let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
        if tail.split(' ').nth(1) == Some(&agent.to_string()) {
            names.push(head.split_once(" (").unwrap().1.to_owned());
        }
    }
    names
}

#[test]
fn a_client_that_vanishes_takes_its_command_along() {
    let guest = Guest::new();
    let mut child = guest.command("exec web sleep 1000").spawn().unwrap();
    until("the command runs", || commands(&guest) == ["sleep"]);
    child.kill().unwrap();
    until("it is gone, and no zombie", || commands(&guest).is_empty());
    wait(&mut child);
    // One that does not heed the hang-up is killed some seconds later.
    let mut child = guest.script("", "trap '' HUP; echo ready; while :; do sleep 1; done").spawn().unwrap();
    let mut line = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    signal(&child, Signal::HUP);
    assert_eq!(wait(&mut child).code(), Some(129));
    until("it is gone", || commands(&guest).is_empty());
}

#[test]
fn an_agent_that_dies_is_an_error_and_no_wait_without_end() {
    let mut guest = Guest::new();
    let child = guest.command("exec -i web sleep 3").stdin(Stdio::piped()).spawn().unwrap();
    until("the command runs", || commands(&guest) == ["sleep"]);
    guest.agent().kill().unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("lost"), "{}", text(&output.stderr));
}

#[test]
fn what_a_command_leaves_behind_does_not_hold_up_its_exit() {
    let guest = Guest::new();
    let start = Instant::now();
    let output = finish(guest.script("", "sleep 20 & yes >&2 & echo $! $!; exit 3").spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.ends_with(b"\n"));
    assert!(start.elapsed() < Duration::from_secs(10));
    // What is written soon after still comes.
    let output = finish(guest.script("", "(sleep 0.02; echo late) & echo early").spawn().unwrap());
    assert_eq!(text(&output.stdout), "early\nlate\n");
}

#[test]
fn all_that_was_written_before_the_exit_comes() {
    let guest = Guest::new();
    for _ in 0..30 {
        // As much as a pipe holds, with whoever has it open long after: the exit does not wait for an end that does not come.
        let output = finish(guest.script("", "sleep 5 & head -c 65536 /dev/zero").spawn().unwrap());
        assert_eq!(output.stdout.len(), 65536);
    }
}

#[test]
fn a_gibibyte_goes_through_unchanged() {
    let guest = Guest::new();
    let total: u64 = if cfg!(debug_assertions) { 256 << 20 } else { 1 << 30 };
    let mut child = guest.command("exec -i web cat").stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let writer = thread::spawn(move || {
        let mut block = vec![0u8; 1 << 20];
        let mut state = 1u64;
        let mut sum = Sha256::new();
        for _ in 0..total >> 20 {
            for bytes in block.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.copy_from_slice(&state.to_le_bytes());
            }
            sum.update(&block);
            stdin.write_all(&block).unwrap();
        }
        sum.finalize()
    });
    let mut sum = Sha256::new();
    let mut block = vec![0u8; 1 << 16];
    let mut count = 0;
    loop {
        match stdout.read(&mut block).unwrap() {
            0 => break,
            n => {
                sum.update(&block[..n]);
                count += n as u64;
            }
        }
    }
    assert_eq!(count, total);
    assert_eq!(sum.finalize(), writer.join().unwrap());
    assert_eq!(wait(&mut child).code(), Some(0));
}

#[test]
fn a_thousand_one_after_another_leave_nothing() {
    let mut guest = Guest::new();
    let files = |guest: &mut Guest| fs::read_dir(format!("/proc/{}/fd", guest.agent().id())).unwrap().count();
    assert_eq!(guest.vmm("exec web true").status.code(), Some(0));
    until("the session ends", || commands(&guest).is_empty());
    let before = files(&mut guest);
    for number in 0..1000 {
        let output = guest.vmm(&format!("exec web echo {number}"));
        assert_eq!(text(&output.stdout), format!("{number}\n"), "{}", text(&output.stderr));
    }
    let end = Instant::now() + PATIENCE;
    while files(&mut guest) > before {
        assert!(Instant::now() < end, "{} files, and {before} before", files(&mut guest));
    }
}

#[test]
fn a_hundred_at_once_have_each_its_own_output() {
    let guest = Guest::new();
    let children: Vec<_> = (0..100)
        .map(|number| {
            let script = format!("read line; echo $line; exit {number}");
            let mut child = guest.script("-i", &script).stdin(Stdio::piped()).spawn().unwrap();
            (number, child.stdin.take().unwrap(), child)
        })
        .collect();
    until("all run", || commands(&guest).len() == 100);
    for (number, mut stdin, child) in children {
        writeln!(stdin, "line {number}").unwrap();
        let output = finish(child);
        assert_eq!(text(&output.stdout), format!("line {number}\n"));
        assert_eq!(output.status.code(), Some(number));
    }
}

#[test]
fn long_arguments_pass_and_too_long_ones_are_refused() {
    let guest = Guest::new();
    let mut command = guest.command("exec web sh -c");
    command.args(["echo $#", "name"]).args(std::iter::repeat_n("argument", 50_000));
    let output = finish(command.spawn().unwrap());
    assert_eq!(text(&output.stdout), "50000\n", "{}", text(&output.stderr));
    let mut command = guest.command("exec web true");
    command.args(std::iter::repeat_n("x".repeat(100_000), 15));
    let output = finish(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("arguments"), "{}", text(&output.stderr));
}

#[test]
fn a_full_disk_here_is_an_error_and_the_command_is_told() {
    let guest = Guest::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let child = guest.command("exec web yes").stdout(full).spawn().unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("No space left"), "{}", text(&output.stderr));
}

#[test]
fn a_file_is_stdin_as_it_is_and_stdout_too() {
    let guest = Guest::new();
    let bytes: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
    guest.place.file("in", &bytes);
    let (input, mut output) = (File::open(guest.place.path("in")).unwrap(), tempfile::tempfile().unwrap());
    let mut command = guest.command("exec -i web cat");
    command.stdin(input).stdout(output.try_clone().unwrap());
    assert_eq!(finish(command.spawn().unwrap()).status.code(), Some(0));
    let mut copy = Vec::new();
    output.rewind().unwrap();
    output.read_to_end(&mut copy).unwrap();
    assert!(copy == bytes);
}

#[test]
fn a_terminal_is_raw_sized_and_given_back() {
    let guest = Guest::new();
    let mut terminal = Terminal::new();
    let before = terminal.mode();
    let mut command =
        guest.script("-it", "stty size; tty >/dev/null && echo yes; read key; echo got:$key; exit 5");
    terminal.give(&mut command);
    let mut child = command.env("TERM", "vt100").spawn().unwrap();
    terminal.expect("24 80\r\nyes\r\n");
    assert_ne!(terminal.mode(), before, "raw meanwhile");
    terminal.press("a\x7fb\r");
    terminal.expect("got:b\r\n");
    assert_eq!(wait(&mut child).code(), Some(5));
    assert_eq!(terminal.mode(), before);

    // Ctrl-C is a key there, and a signal to the guest's programs. TERM is ours. A shell that has not yet begun to wait when the
    // signal comes acts on it after the wait, which is short therefore.
    let script = "echo $TERM; trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.1; done";
    let mut command = guest.script("-it", script);
    terminal.give(&mut command);
    let mut child = command.env("TERM", "vt100").spawn().unwrap();
    terminal.expect("vt100\r\nready");
    terminal.press("\x03");
    terminal.expect("interrupted");
    assert_eq!(wait(&mut child).code(), Some(6));
    assert_eq!(terminal.mode(), before);

    // Whatever happens.
    let mut command = guest.command("exec -it web sleep 1000");
    terminal.give(&mut command);
    let mut child = command.spawn().unwrap();
    until("raw", || terminal.mode() != before);
    signal(&child, Signal::HUP);
    assert_eq!(wait(&mut child).code(), Some(129));
    assert_eq!(terminal.mode(), before);
}

#[test]
fn a_shell_is_a_login_shell_and_takes_a_script_too() {
    let guest = Guest::new();
    let mut child = guest.command("shell web").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"cd; pwd; echo $0; exit 3\n").unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(3));
    let said = text(&output.stdout);
    assert!(said.starts_with(&format!("{}\n-", std::env::var("HOME").unwrap())), "{said}");
}
