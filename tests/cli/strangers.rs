//! Files, sockets and guests that somebody hostile made: what they cost is bounded by their size, what they say does not act on a
//! terminal, what they name is not opened.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use crate::images::*;
use crate::place::*;

/// MiB that a command may take to read what is small.
const LITTLE: u64 = 100;

/// Waits for the end of `child`: how it ended, and the most memory that it had, in MiB. Its output must go to files.
fn weigh(mut child: Child) -> (ExitStatus, u64) {
    let (deadline, mut most) = (Instant::now() + PATIENCE, 0);
    // Not by wait4(2): that counts what this process had when it forked.
    let status = format!("/proc/{}/status", child.id());
    loop {
        let now = fs::read_to_string(&status).unwrap_or_default();
        let peak = now
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        let own = now.starts_with("Name:\tvmm");
        most = most.max(peak.filter(|_| own).unwrap_or(0u64) / 1024);
        if let Some(status) = child.try_wait().unwrap() {
            return (status, most);
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("vmm does not come to an end");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// The same for `vmm` with `arguments`; and what it said, on both.
fn weighed(place: &Place, arguments: &str) -> (ExitStatus, u64, String) {
    let mut command = place.command(arguments);
    let said = ["said", "complained"].map(|name| File::create(place.path(name)).unwrap());
    let [out, err] = said;
    command.stdout(out).stderr(err);
    let (status, mib) = weigh(command.spawn().unwrap());
    let said = ["said", "complained"].map(|name| text(&fs::read(place.path(name)).unwrap())).concat();
    (status, mib, said)
}

fn chunk(kind: u32, track: u32, bytes: &[u8]) -> Vec<u8> {
    let head = [kind, track, bytes.len() as u32].map(u32::to_le_bytes).concat();
    [&head[..], bytes].concat()
}

/// A trace whose header is `header`, and that has `chunks`.
fn trace(header: &serde_json::Value, chunks: &[Vec<u8>]) -> Vec<u8> {
    let header = header.to_string();
    let head = [b"vmmtrac\x01", &(header.len() as u32).to_le_bytes()[..], header.as_bytes()].concat();
    [head, chunks.concat()].concat()
}

fn header(kernel: &str, name: &str) -> serde_json::Value {
    serde_json::json!({
        "vmm": "1", "kernel": kernel, "cmdline": name, "vendor": "AuthenticAMD", "in_kernel": name,
        "ports": [{"name": name, "base": 0x3f8, "size": 8}], "addresses": [],
    })
}

/// An exit at `rip`: OUT to the serial port, or one inside KVM.
fn exit(rip: u64, kind: u8) -> Vec<u8> {
    let mut event = [0; 48];
    event[0] = 1;
    event[16..24].copy_from_slice(&rip.to_le_bytes());
    event[24..32].copy_from_slice(&0x3f8u64.to_le_bytes());
    (event[44], event[45], event[46]) = (kind, 1, u8::from(kind == 2));
    event.to_vec()
}

const OUT: u8 = 2;
const IN_KERNEL: u8 = 18;

/// A 64-bit ELF file: `sections` with type, flags, offset, size, link, and entry size each, over `body` at 64.
fn elf(body: &[u8], sections: &[[u64; 6]]) -> Vec<u8> {
    let table = (64 + body.len()).next_multiple_of(8);
    let mut file = vec![0; table];
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    (file[16], file[18], file[20]) = (2, 62, 1);
    file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
    (file[52], file[54], file[58]) = (64, 56, 64);
    // More than 16 bits hold: the first section has the number.
    let count = sections.len() + 1;
    if count < 0xff00 {
        file[60..62].copy_from_slice(&(count as u16).to_le_bytes());
    }
    // The sections' own names; whatever strings there are.
    let strings = sections.iter().position(|section| section[0] == STRTAB).unwrap() + 1;
    file[62] = strings as u8;
    file[64..64 + body.len()].copy_from_slice(body);
    let mut section = |kind: u64, [flags, offset, size, link, entry]: [u64; 5]| {
        let mut bytes = [0; 64];
        bytes[4..8].copy_from_slice(&(kind as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&flags.to_le_bytes());
        bytes[24..32].copy_from_slice(&offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&size.to_le_bytes());
        bytes[40..44].copy_from_slice(&(link as u32).to_le_bytes());
        bytes[56..64].copy_from_slice(&entry.to_le_bytes());
        file.extend(bytes);
    };
    section(0, [0, 0, if count < 0xff00 { 0 } else { count as u64 }, 0, 0]);
    sections.iter().for_each(|[kind, rest @ ..]| section(*kind, *rest));
    file
}

const SYMTAB: u64 = 2;
const STRTAB: u64 = 3;

/// `count` functions, each named by the rest of `names` from a place of its own.
fn functions(count: usize, names: &[u8], aliases: usize) -> Vec<u8> {
    let mut body = vec![0; 24];
    for number in 0..count as u64 {
        let mut symbol = [0; 24];
        symbol[..4].copy_from_slice(&((number % aliases as u64) as u32).to_le_bytes());
        (symbol[4], symbol[6]) = (0x12, 1);
        symbol[8..16].copy_from_slice(&(0x100_0000 + number * 16).to_le_bytes());
        body.extend(symbol);
    }
    let table = body.len() as u64;
    body.extend(names);
    elf(
        &body,
        &[
            [1, 6, 64, table, 0, 0],
            [SYMTAB, 0, 64, table, 3, 24],
            [STRTAB, 0, 64 + table, names.len() as u64, 0, 0],
        ],
    )
}

#[test]
fn symbols_cost_no_more_than_their_file_is_large() {
    let place = Place::new();
    let events: Vec<u8> = (0..2000).flat_map(|n| exit(0x100_0000 + n * 16, OUT)).collect();
    place.file("record", trace(&header("none", "serial"), &[chunk(1, 0, b"vcpu0"), chunk(2, 0, &events)]));
    // A megabyte of code that 16000 sections have each; as many sections as a header can count and more.
    let text_sections = |count: usize, len: u64| vec![[1, 6, 64, len, 0, 0]; count];
    let many = elf(
        &[0x90; 1 << 19],
        &[&[[SYMTAB, 0, 64, 240, 2, 24], [STRTAB, 0, 64, 100, 0, 0]][..], &text_sections(9000, 1 << 19)]
            .concat(),
    );
    let most = elf(
        &[0x90; 4096],
        &[&[[SYMTAB, 0, 64, 240, 2, 24], [STRTAB, 0, 64, 100, 0, 0]][..], &text_sections(70_000, 4096)]
            .concat(),
    );
    // Names that are each half a megabyte, ends of the same long one; the same without an end.
    let long = [vec![b'x'; 1 << 19], vec![0]].concat();
    let aliases = functions(20_000, &long, 20_000);
    let endless = functions(20_000, &vec![b'x'; 1 << 19], 20_000);
    // Mangled names that are short, and long when they are read; and some that nest as deep as they can.
    let doubled = (0..60).fold("i".to_owned(), |inner, _| format!("1AI{inner}S_E"));
    let bombs: Vec<u8> = [
        format!("_Z1fv{doubled}"),
        format!("_Z{}", "N1aI".repeat(280)),
        format!("_Z1f{}i", "P".repeat(1100)),
        format!("_Z1f{}", "FvS_E".repeat(200)),
        format!("_R{}", "INtC1a1b".repeat(140)),
        format!("_RIC1a{}E", "TB4_B4_B4_E".repeat(100)),
    ]
    .iter()
    .flat_map(|name| [name.as_bytes(), &[0]].concat())
    .collect();
    let read = functions(40_000, &bombs, bombs.len());
    let list = |name: &str, count: u64| {
        (0..count).map(|n| format!("{:x} t {name}\n", 0x100_0000 + n)).collect::<String>()
    };
    for (file, bytes, good) in [
        ("many", many, false),
        ("most", most, false),
        ("aliases", aliases, true),
        ("endless", endless, false),
        ("bombs", read, true),
        ("short", list("x", 100_000).into_bytes(), true),
        ("nested", list(&format!("_Z1fv{doubled}"), 2000).into_bytes(), true),
    ] {
        place.file(file, bytes);
        let (status, mib, said) = weighed(&place, &format!("trace report record --stats --symbols {file}"));
        assert!(
            matches!(status.code(), Some(0 | 2)) && (!good || status.success()),
            "{file}: {status} {said}"
        );
        assert!(mib < LITTLE, "{file}: {mib} MiB");
    }
    // A file of a few bytes that says that it is large: an ELF header, and a list's first line.
    for (name, head) in
        [("holes", elf(&[0], &[[STRTAB, 0, 64, 1, 0, 0]])), ("line", b"1000000 t start\n".to_vec())]
    {
        place.file(name, head);
        File::options().write(true).open(place.path(name)).unwrap().set_len(1900 << 20).unwrap();
        let (status, mib, said) = weighed(&place, &format!("trace report record --symbols {name}"));
        assert!(status.code() == Some(BAD_ARGUMENT) && said.contains("hole"), "{name}: {status} {said}");
        assert!(mib < LITTLE, "{name}: {mib} MiB");
    }
}

#[test]
fn a_trace_costs_no_more_than_it_holds() {
    let place = Place::new();
    let head =
        trace(&header("none", "serial"), &[chunk(1, 0, b"vcpu0"), chunk(2, 0, &exit(0x100_0000, OUT))]);
    // Behind a good event chunks of a hole: of events, of names, of what this version does not know.
    for kind in [2u32, 1, 7, 99, 0] {
        place.file("sparse", &head);
        let mut file = File::options().append(true).open(place.path("sparse")).unwrap();
        for number in 0..30u32 {
            let length = if kind == 0 { 0 } else { 60 << 20u32 };
            file.write_all(&[kind, number, length].map(u32::to_le_bytes).concat()).unwrap();
            let end = file.metadata().unwrap().len() + (60 << 20);
            file.set_len(end).unwrap();
        }
        for view in ["", "--stats", "--html out"] {
            let (status, mib, said) = weighed(&place, &format!("trace report sparse {view}"));
            assert!(status.success() && mib < LITTLE, "{kind}, {view}: {status}, {mib} MiB, {said}");
            assert!(!view.is_empty() || said.contains("serial THR"), "what comes before is told: {said}");
        }
    }
    // A million small chunks that each name a track, lose events, tell the time.
    let all: Vec<Vec<u8>> = (0..200_000u32)
        .flat_map(|n| {
            [chunk(1, n, b"\x1b\x1b\x1b\x1b"), chunk(3, n, &[1; 8]), chunk(4, n, &[1; 16]), chunk(5, n, b"r")]
        })
        .collect();
    place.file("small", [head.clone(), all.concat()].concat());
    // Symbols of the guest's that read as a bomb.
    let bomb = format!("_Z1fv{}", (0..60).fold("i".to_owned(), |inner, _| format!("1AI{inner}S_E")));
    let list: String = (0..20_000).map(|n| format!("{:x} t {bomb}\n", 0x100_0000 + n)).collect();
    let events: Vec<u8> = (0..20_000).flat_map(|n| exit(0x100_0000 + n, OUT)).collect();
    place.file("bombs", [head, chunk(2, 0, &events), chunk(7, 0, list.as_bytes())].concat());
    for name in ["small", "bombs"] {
        let size = fs::metadata(place.path(name)).unwrap().len() >> 20;
        let (status, mib, said) = weighed(&place, &format!("trace report {name} --stats"));
        assert!(status.success() && mib < LITTLE + 2 * size, "{name}: {status}, {mib} MiB, {said}");
    }
}

#[test]
fn what_a_trace_names_is_opened_only_when_it_is_asked_for() {
    let place = Place::new();
    place.file("System.map", "1000000 t secret\n");
    let record = |kernel: &str| {
        trace(&header(kernel, "serial"), &[chunk(1, 0, b"vcpu0"), chunk(2, 0, &exit(0x100_0000, OUT))])
    };
    place.file("record", record(place.path("kernel").to_str().unwrap()));
    let told = |arguments: &str| text(&place.vmm(arguments).stdout);
    assert!(!told("trace report record").contains("secret"));
    assert!(told("trace report record --symbols").contains("secret"));
    // What would not end, and what is no file, is not read even then.
    rustix::fs::mknodat(rustix::fs::CWD, place.path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    let elsewhere = Place::new();
    for kernel in ["/proc/kmsg", "/dev/zero", "/dev/tty", place.path("pipe").to_str().unwrap()] {
        elsewhere.file("record", record(kernel));
        let output = elsewhere.vmm("trace report record --symbols");
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 2)), "{kernel}: {}", text(&output.stderr));
    }
}

/// What acts on a terminal: none of it may come out, and each of these is in every name.
const EVIL: &str = "\u{1b}]0;owned\u{7}\u{9b}2J\u{202e}\u{2066}\u{7f}";

#[track_caller]
fn harmless(case: &str, text: &str) {
    let acts = |c: char| {
        (c.is_control() && c != '\n')
            || ('\u{202a}'..='\u{202e}').contains(&c)
            || ('\u{2066}'..='\u{2069}').contains(&c)
    };
    assert!(!text.chars().any(acts), "{case}: {text:?}");
}

#[test]
fn nothing_that_a_trace_says_acts_on_a_terminal() {
    let place = Place::new();
    // A Rust name whose letters are only read when it is demangled: "a", U+202E, "b".
    let punycode = "_RNvC7mycrateu6ab_g4t".to_owned();
    let symbols =
        format!("1000000 t {}\n1000010 t {punycode}\n1000020 t \u{9b}1m{}\n", EVIL.replace(' ', ""), EVIL);
    let chunks = [
        chunk(1, 0, EVIL.as_bytes()),
        chunk(5, 0, EVIL.as_bytes()),
        chunk(8, 0, EVIL.as_bytes()),
        chunk(3, 0, &1u64.to_le_bytes()),
        chunk(6, 0, serde_json::json!({EVIL: {"exits": 1}}).to_string().as_bytes()),
        chunk(7, 0, symbols.as_bytes()),
        chunk(
            2,
            0,
            &[
                exit(0x100_0000, OUT),
                exit(0x100_0010, OUT),
                exit(0x100_0021, OUT),
                exit(0x100_0000, IN_KERNEL),
            ]
            .concat(),
        ),
    ];
    place.file("record", trace(&header(EVIL, EVIL), &chunks));
    for view in
        ["", "--stats", "--json", "--stats --json", "--advise", "--html out", "--perfetto out", "--symbols"]
    {
        let output = place.vmm(&format!("trace report record {view}"));
        let told = [output.stdout, output.stderr, fs::read(place.path("out")).unwrap_or_default()].concat();
        harmless(view, &text(&told));
        let shown = told.windows(5).any(|word| word == b"owned");
        assert!(shown || view == "--advise", "{view}: it is told all the same");
        let _ = fs::remove_file(place.path("out"));
    }
    // A header that is wrong is quoted; a file's name is.
    place.file("wrong", trace(&serde_json::json!({"vmm": {EVIL: 1}}), &[]));
    place.file("symbols\u{1b}[2J", "");
    for arguments in
        ["trace report wrong", "trace report record --symbols symbols\u{1b}[2J", "status a\u{1b}[2J"]
    {
        let output = place.vmm(arguments);
        assert!(!output.status.success(), "{arguments}");
        harmless(arguments, &text(&output.stderr));
    }
}

#[test]
fn nothing_that_a_monitor_says_acts_on_a_terminal() {
    let place = Place::new();
    fs::create_dir(place.path("run/vmm")).unwrap();
    fs::set_permissions(place.path("run/vmm"), fs::Permissions::from_mode(0o700)).unwrap();
    let socket = |name: &str| {
        let path = place.path(&format!("run/vmm/{name}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        listener
    };
    let status = serde_json::json!({
        "name": EVIL, "pid": 1, "state": "running", "uptime_seconds": 1.0, "cpus": 1, "memory_bytes": 1,
        "kernel": EVIL, "ptys": [{"device": EVIL, "path": EVIL}],
    });
    let work = serde_json::json!({"count": 1, "ticks": 1});
    let sample = serde_json::json!({
        "ns": 1, "ticks": 1, "kernel": place.path("vmlinux"), "vendor": EVIL, "recorded": false, "viewers": 1,
        "reasons": {EVIL: work}, "vcpus": {EVIL: {"exits": work, "cpu_ns": 1, "waiting_ns": 1, "kvm_exits": 1}},
        "devices": {EVIL: {"exits": work, "bytes": 1, "turns": work, "kicks": 1, "completed": 1, "interrupts": 1}},
        "places": [[1, work]], "elsewhere": work, "lost": 0, "kvm": {EVIL: 1}, "code": [],
    });
    place.file("System.map", "1 t opened\n");
    for (name, answer) in [
        ("friendly", serde_json::json!({"version": 1, "status": status})),
        ("sampled", serde_json::json!({"version": 1, "sample": {"status": status, "sample": sample}})),
        ("refusing", serde_json::json!({"version": 1, "error": EVIL})),
        ("other", serde_json::json!({"version": EVIL})),
        ("odd", serde_json::json!({"version": 1, "status": {EVIL: 1}})),
    ] {
        let listener = socket(name);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, mut rest) = (stream.unwrap(), String::new());
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                // Answers as a monitor does: once for each line.
                while reader.read_line(&mut rest).is_ok_and(|count| count > 0) {
                    rest.clear();
                    if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
                        break;
                    }
                }
            }
        });
        for command in [
            "status NAME",
            "status NAME --json",
            "pause NAME",
            "pause NAME --json",
            "list",
            "list --json",
            "top NAME --once --interval 100ms",
            "top NAME --once --json --interval 100ms",
        ] {
            let output = place.vmm(&command.replace("NAME", name));
            let said = text(&[output.stdout, output.stderr].concat());
            harmless(&format!("{name}: {command}"), &said);
            assert!(!said.contains("System.map"), "the path that a monitor names is not opened: {said}");
        }
    }
    let asked = text(&place.vmm("top sampled --once --json --interval 100ms --symbols").stdout);
    assert!(asked.contains("System.map"), "unless the user asks: {asked}");
}

/// A guest of 64 KiB that maps its few pages to everywhere in the kernel's half, so that each of them looks like the tables of
/// a kernel's names; it goes there for a moment, and ends.
pub fn labyrinth() -> Vec<u8> {
    const BASE: u64 = 0x100_0000;
    let page = |number: u64| BASE + number * 4096;
    let mut image = vec![0; 16 * 4096];
    let high = 0xffff_ffff_8000_0000u64;
    let mut code = vec![0xb8];
    code.extend((page(1) as u32).to_le_bytes()); // mov eax, the root
    code.extend([0x0f, 0x22, 0xd8]); // mov cr3, rax
    code.extend([0x48, 0xb8]);
    code.extend((high + code.len() as u64 + 10).to_le_bytes()); // mov rax, behind the jump
    code.extend([0xff, 0xe0]); // jmp rax
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee]); // mov dx, 0x3f8; mov al, '.'; out dx, al
    code.extend(out(0xf4, 0));
    image[..code.len()].copy_from_slice(&code);
    let mut table = |number: u64, entry: &dyn Fn(u64) -> u64| {
        for at in 0..512 {
            let place = (number * 4096 + at * 8) as usize;
            image[place..place + 8].copy_from_slice(&(entry(at) | 3).to_le_bytes());
        }
    };
    table(1, &|_| page(2));
    table(2, &|_| page(3));
    table(3, &|_| page(4));
    table(4, &|at| page(if at == 0 { 0 } else { 5 + at % 11 }));
    // Numbers that could be that of the names, and names of no letters.
    image[5 * 4096..]
        .as_chunks_mut::<8>()
        .0
        .iter_mut()
        .for_each(|number| *number = 0x1_0000u64.to_le_bytes());
    // Tokens of one letter, and their index.
    for token in 0..=255u16 {
        let letter = if token.to_le_bytes()[0].is_ascii_digit() { token as u8 } else { b'a' };
        let (at, index) = (5 * 4096 + usize::from(token) * 2, 5 * 4096 + 512 + usize::from(token) * 2);
        image[at..at + 2].copy_from_slice(&[letter, 0]);
        image[index..index + 2].copy_from_slice(&(token * 2).to_le_bytes());
    }
    kernel(&image)
}

#[test]
fn the_search_in_a_dead_guest_ends_when_it_is_told_to() {
    if !has_kvm("the_search_in_a_dead_guest_ends_when_it_is_told_to") {
        return;
    }
    let place = Place::new();
    place.file("labyrinth", labyrinth());
    let run = "--trace record --kernel labyrinth --mem 64M --console off --serial file=out --debug-exit --name dead";
    let mut command = place.command(run);
    command
        .stdout(File::create(place.path("said")).unwrap())
        .stderr(File::create(place.path("complained")).unwrap());
    let child = command.spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    // One that comes while the guest runs is a wish to it; the next is one to the monitor.
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let out = place.path("out");
    let signals = thread::spawn(move || {
        while stopped.recv_timeout(Duration::from_millis(200))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            if fs::read(&out).is_ok_and(|out| !out.is_empty()) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
    });
    let (status, mib) = weigh(child);
    drop(stop);
    signals.join().unwrap();
    let complained = text(&fs::read(place.path("complained")).unwrap());
    assert!(status.code() == Some(1), "{status} {complained}");
    assert!(complained.contains("interrupted"), "{complained}");
    assert!(mib < LITTLE, "{mib} MiB");
    let told = place.vmm("trace report record");
    assert!(text(&told.stdout).contains("serial THR <- '.'"), "{}", text(&told.stderr));
}

/// What a shell's `ulimit` would set for `command`: the resource, and its limit.
fn limited(command: &mut Command, resource: libc::__rlimit_resource_t, limit: u64) {
    let set = move || {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: the call reads the limit and changes nothing else.
        if unsafe { libc::setrlimit(resource, &limit) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// Writes `count` letters to the serial port and ends with status 0.
pub fn chatter(count: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(count.to_le_bytes()); // mov ecx, count
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'x']); // mov dx, 0x3f8; mov al, 'x'
    code.extend([0xee, 0xff, 0xc9, 0x75, 0xfb]); // out dx, al; dec ecx; jnz (out)
    code.extend(out(0xf4, 0));
    kernel(&code)
}

const CHATTER: &str = "--kernel chatter --console off --debug-exit";

#[test]
fn a_limit_of_the_host_does_not_end_the_guest() {
    if !has_kvm("a_limit_of_the_host_does_not_end_the_guest") {
        return;
    }
    let place = Place::new();
    place.file("chatter", chatter(20_000));
    let mut command = place.command(&format!("{CHATTER} --serial file=out"));
    limited(&mut command, libc::RLIMIT_FSIZE, 10_000);
    let output = finish(command.spawn().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "the guest's own code: {} {said}", output.status);
    assert_eq!(said.matches("output is being lost").count(), 1, "once: {said}");
    assert_eq!(fs::metadata(place.path("out")).unwrap().len(), 10_000);
    // What a limit of processor time sends, and what one of file sizes sends.
    place.file("halt", kernel(&HALT));
    let mut child = place.command("--kernel halt --console off --name idle").spawn().unwrap();
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !text(&place.vmm("status idle").stdout).contains("running") {
        assert!(Instant::now() < deadline, "it does not start");
    }
    for signal in [rustix::process::Signal::XCPU, rustix::process::Signal::XFSZ] {
        rustix::process::kill_process(pid, signal).unwrap();
    }
    assert_eq!(place.vmm("kill idle").status.code(), Some(0));
    assert_eq!(child.wait().unwrap().code(), Some(KILLED));
    // A record is another matter: whoever wants one is told by the exit code, but not before the guest has ended.
    let mut command = place.command(&format!("{CHATTER} --serial file=whole --trace record"));
    limited(&mut command, libc::RLIMIT_FSIZE, 100_000);
    let output = finish(command.spawn().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(HOST), "{} {said}", output.status);
    assert!(said.contains("what follows is not recorded"), "{said}");
    assert_eq!(fs::metadata(place.path("whole")).unwrap().len(), 20_000, "it ran to its end");
    let told = place.vmm("trace report record --device serial");
    assert!(text(&told.stdout).lines().count() > 1000, "{}", text(&told.stderr));
}

#[test]
fn files_grow_to_their_limit_and_no_further() {
    if !has_kvm("files_grow_to_their_limit_and_no_further") {
        return;
    }
    let place = Place::new();
    place.file("chatter", chatter(20_000));
    let size = |name: &str| fs::metadata(place.path(name)).map_or(0, |meta| meta.len());
    let output = place.vmm(&format!("{CHATTER} --serial file=out,max=8K --trace record,max=64K"));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(size("out") <= 8192 && size("out.1") == 8192, "{} {}", size("out"), size("out.1"));
    assert_eq!(said.matches("oldest output is dropped").count(), 1, "{said}");
    assert!((32_000..=65_536).contains(&size("record")), "{}", size("record"));
    assert_eq!(said.matches("max=64K").count(), 1, "{said}");
    let told = text(&place.vmm("trace report record").stdout);
    assert!(told.contains("not recorded: the file had reached max=64K"), "{told}");
    for name in ["out", "out.1", "record"] {
        assert_eq!(fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    for (arguments, words) in [
        ("--serial file=/dev/null,max=8K", &["/dev/null", "no regular file"][..]),
        ("--serial file=o,max=1K", &["max=1K", "4K"]),
        ("--trace r,max=x", &["x"]),
    ] {
        refused(&place, &format!("{CHATTER} {arguments}"), BAD_ARGUMENT, words);
    }
}

#[test]
fn no_output_follows_a_link() {
    if !has_kvm("no_output_follows_a_link") {
        return;
    }
    let place = Place::new();
    place.file("chatter", chatter(10));
    place.file("precious", "precious");
    symlink("precious", place.path("link")).unwrap();
    for option in [
        "--console file=link",
        "--serial file=link",
        "--serial file=link,max=1M",
        "--port p=file=link",
        "--trace link",
    ] {
        let console = if option.contains("--console") { "" } else { "--console off" };
        refused(
            &place,
            &format!("--kernel chatter --debug-exit {console} {option}"),
            BAD_ARGUMENT,
            &["link", "symbolic link"],
        );
    }
    place.vmm(&format!("{CHATTER} --serial file=out --trace record"));
    for view in ["--html link", "--perfetto link"] {
        refused(&place, &format!("trace report record {view}"), BAD_ARGUMENT, &["link", "symbolic link"]);
    }
    // What a shell makes of links is no attack: standard output, and a pipe of its own.
    let output = place.vmm(&format!("{CHATTER} --serial file=/dev/stdout"));
    assert_eq!(text(&output.stdout), "xxxxxxxxxx", "{}", text(&output.stderr));
}

#[test]
fn a_socket_that_another_users_process_serves_is_not_spoken_to() {
    const NAME: &str = "a_socket_that_another_users_process_serves_is_not_spoken_to";
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("SKIP: {NAME}: needs root, to become somebody else");
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("run/vmm")).unwrap();
    fs::set_permissions(place.path("run/vmm"), fs::Permissions::from_mode(0o700)).unwrap();
    let path = place.path("run/vmm/web.sock");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    // Who listens last is who serves it; this thread alone becomes somebody else.
    let listener = thread::spawn(move || {
        use std::os::fd::AsRawFd;
        // SAFETY: system calls with numbers, on a descriptor that is open; the thread ends with its other identity.
        let done = unsafe {
            libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) == 0
                && libc::listen(listener.as_raw_fd(), 8) == 0
        };
        assert!(done);
        listener
    });
    let _listener = listener.join().unwrap();
    refused(&place, "status web", HOST, &["web", "another user's process"]);
    refused(&place, "kill web", HOST, &["web", "another user's process"]);
}

#[test]
fn a_monitor_leaves_no_core_unless_it_may_and_the_guests_memory_never() {
    const NAME: &str = "a_monitor_leaves_no_core_unless_it_may_and_the_guests_memory_never";
    if !has_kvm(NAME) {
        return;
    }
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.starts_with('|') || pattern.contains('/') {
        eprintln!("SKIP: {NAME}: needs cores in the working directory, and this host has {}", pattern.trim());
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for (option, dumps) in [("", false), ("--dumpable", true)] {
        let mut command =
            place.command(&format!("--kernel halt --mem 64M,prefault --console off --name a {option}"));
        limited(&mut command, libc::RLIMIT_CORE, libc::RLIM_INFINITY);
        let mut child = command.spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !text(&place.vmm("status a").stdout).contains("running") {
            assert!(Instant::now() < deadline, "it does not start");
        }
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::QUIT).unwrap();
        let status = child.wait().unwrap();
        assert_eq!((status.signal(), status.core_dumped()), (Some(libc::SIGQUIT), dumps), "{option}");
        let cores = fs::read_dir(place.dir.path()).unwrap().filter_map(|entry| {
            let entry = entry.unwrap();
            entry.file_name().to_str()?.starts_with("core").then(|| entry.metadata().unwrap().len())
        });
        let cores: Vec<u64> = cores.collect();
        assert_eq!(cores.len(), usize::from(dumps), "{option}: {cores:?}");
        assert!(cores.iter().all(|len| *len < 60 << 20), "with 64 MiB of the guest's: {cores:?}");
    }
}

#[test]
fn a_report_that_nobody_reads_can_be_interrupted() {
    if !has_kvm("a_report_that_nobody_reads_can_be_interrupted") {
        return;
    }
    let place = Place::new();
    place.file("chatter", chatter(20_000));
    let mut command = place.command(&format!("trace --keep record -- {CHATTER} --serial file=out"));
    let mut child = command.spawn().unwrap();
    // It has begun to tell, and the pipe is full some lines later.
    let mut line = String::new();
    let mut told = BufReader::with_capacity(1, child.stdout.take().unwrap());
    told.read_line(&mut line).unwrap();
    assert!(line.contains("serial THR"), "{line}");
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = wait(&mut child);
    assert_eq!(status.signal(), Some(libc::SIGTERM), "{status}");
}
