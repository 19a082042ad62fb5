//! The `vmm` command as a user meets it: a table of input that cannot work, and tiny guests from start to end.
//!
//! Each bad input gives one error and one hint, the documented exit code, no panic, and leaves everything as it was.
//! Guests are a few instructions in an ELF file, so they run wherever there is a KVM at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const BAD_ARGUMENT: i32 = 2;
const HOST: i32 = 4;
const GUEST_CRASH: i32 = 6;
const KILLED: i32 = 10;

/// No command takes longer than this, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with everything that a test's commands see, the runtime directory included.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::set_permissions(dir.path().join("run"), fs::Permissions::from_mode(0o700)).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// `vmm` with `arguments`, split at blanks, in this place.
    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(arguments.split_whitespace());
        self.set_up(&mut command);
        command
    }

    fn set_up(&self, command: &mut Command) {
        command.current_dir(self.dir.path()).env("XDG_RUNTIME_DIR", self.path("run"));
        command.env_remove("RUST_LOG").env_remove("VMM_KVM");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    fn vmm(&self, arguments: &str) -> Output {
        finish(self.command(arguments).spawn().unwrap())
    }

    /// Every file, with its kind, mode, size, time of change and content.
    fn contents(&self) -> BTreeMap<PathBuf, String> {
        let mut all = BTreeMap::new();
        let mut dirs = vec![self.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let kind = meta.file_type();
                let content = if kind.is_file() && meta.len() < 1 << 20 {
                    fs::read(&path).unwrap_or_default()
                } else {
                    Vec::new()
                };
                let socket = kind.is_socket();
                let facts = (meta.mode(), meta.len(), meta.mtime(), meta.mtime_nsec(), socket, content);
                if kind.is_dir() {
                    dirs.push(path.clone());
                    // A socket that came and went leaves its mark on the directory's time; nothing else may.
                    all.insert(path, format!("{:o}", meta.mode()));
                } else {
                    all.insert(path, format!("{facts:?}"));
                }
            }
        }
        all
    }
}

/// Waits for the end, within reason.
fn finish(mut child: Child) -> Output {
    let pipes = [
        child.stdout.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
        child.stderr.take().map(|p| Box::new(p) as Box<dyn Read + Send>),
    ];
    let readers = pipes.map(|pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            bytes
        })
    });
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                panic!("vmm hangs");
            }
            None => thread::sleep(Duration::from_millis(2)),
        }
    };
    let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
    Output { status, stdout, stderr }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One row of the table: runs `command` and checks that it fails as a failure should. `words` must be in the error.
#[track_caller]
fn refused_command(place: &Place, mut command: Command, code: i32, words: &[&str]) {
    let before = place.contents();
    let output = finish(command.spawn().unwrap());
    let stderr = text(&output.stderr);
    let case = format!("{command:?}\n{stderr}");
    assert_eq!(output.status.code(), Some(code), "{case}");
    assert!(output.stdout.is_empty(), "{case}{}", text(&output.stdout));
    let lines: Vec<_> = stderr.lines().collect();
    let [error, hint] = lines[..] else { panic!("not one error and one hint: {case}") };
    assert!(error.starts_with("vmm: error: ") && hint.starts_with("hint: "), "{case}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {case}");
    }
    assert!(!stderr.contains("panic") && !stderr.contains("src/"), "{case}");
    let after = place.contents();
    assert!(before == after, "something was created or changed by {case}\n{before:#?}\n{after:#?}");
}

#[track_caller]
fn refused(place: &Place, arguments: &str, code: i32, words: &[&str]) {
    refused_command(place, place.command(arguments), code, words);
}

/// A kernel of a few instructions, in an ELF file as Linux's vmlinux is one. It starts in 64-bit mode at 16 MiB.
fn kernel(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 16 << 20;
    let mut file = Vec::new();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2u16.to_le_bytes()); // ET_EXEC
    put(&62u16.to_le_bytes()); // EM_X86_64
    put(&1u32.to_le_bytes());
    put(&LOAD.to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // section headers
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    put(&1u32.to_le_bytes()); // PT_LOAD
    put(&7u32.to_le_bytes()); // rwx
    let size = code.len() as u64;
    for word in [0x1000, LOAD, LOAD, size, size, 0x1000] {
        put(&word.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}

/// The head of a bzImage of protocol 2.15, which says that `setup` + `code` bytes follow it.
fn bzimage(xloadflags: u16, code: usize) -> Vec<u8> {
    let mut file = vec![0; 5 * 512 + code];
    file[0x1f1] = 4; // setup_sects
    file[0x1f4..0x1f8].copy_from_slice(&(code as u32 / 16).to_le_bytes());
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x211] = 1; // LOADED_HIGH
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    file[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes()); // kernel_alignment
    file[0x234] = 1; // relocatable
    file[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
    file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes()); // pref_address
    file[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes()); // init_size
    file
}

/// Instructions: `out PORT, VALUE` then halt for good.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Halts for ever.
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// There is a KVM to run guests on. Says so where not.
fn has_kvm(test: &str) -> bool {
    let open = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &open {
        eprintln!("SKIPPED: {test} needs /dev/kvm: {error}");
    }
    open.is_ok()
}

#[test]
fn arguments_that_cannot_be() {
    let place = Place::new();
    place.file("k", "");
    let long = "x".repeat(65);
    for (arguments, words) in [
        ("run", &["no kernel"][..]),
        ("--mem 1G", &["no kernel"]),
        ("--kernel k --mem 0", &["--mem 0"]),
        ("--kernel k --mem 1M", &["--mem 1M"]),
        ("--kernel k --mem 999T", &["--mem 999T"]),
        ("--kernel k --mem 99999999T", &["99999999T"]),
        ("--kernel k --mem 5000001", &["4096"]),
        ("--kernel k --mem lots", &["lots", "512M"]),
        ("--kernel k --mem", &["--mem"]),
        ("--kernel k --mem 512M,hugepages=3M", &["3M"]),
        ("--kernel k --mem 100M,hugepages=1G", &["huge page"]),
        ("--kernel k --cpus 0", &["--cpus 0"]),
        ("--kernel k --cpus 100000", &["100000"]),
        ("--kernel k --cpus two", &["two"]),
        ("--kernel k --disk path=d,raedonly", &["raedonly"]),
        ("--kernel k --disk readonly=on", &["path"]),
        ("--kernel k --disk path=d,block-size=1024", &["block size"]),
        ("--kernel k --console nowhere", &["nowhere", "stdio"]),
        ("--kernel k --console stdio --serial stdio", &["twice"]),
        ("--kernel k --port a=off --port a=pty", &["twice"]),
        ("--kernel k --port a", &["NAME=WHERE"]),
        ("--kernel k --name ../x", &["../x"]),
        (&format!("--kernel k --name {long}"), &["name"]),
        ("--kernel k --boot bios", &["bios", "linux64"]),
        ("--kernel k --on-reboot dance", &["dance", "reset"]),
        ("--kernel k --debug-exit=0x10000", &["65535"]),
        ("--kernel k --rng=perhaps", &["perhaps"]),
        ("--kernel k --stop-timeout -1", &["-1"]),
        ("--kernl k", &["--kernl"]),
        ("--kernel k --kernel k", &["--kernel"]),
        ("--kernel k surplus", &["surplus"]),
        ("run --kernel", &["--kernel"]),
        ("explode", &["explode"]),
        ("status", &["NAME"]),
        ("stop a --timeout soon", &["soon"]),
        ("stop a --timeout 1 --force", &["--force"]),
    ] {
        refused(&place, arguments, BAD_ARGUMENT, words);
        let dry = if arguments.contains("--") { format!("{arguments} --dry-run") } else { continue };
        if !arguments.starts_with("stop") && !arguments.ends_with("--mem") {
            refused(&place, &dry, BAD_ARGUMENT, words);
        }
    }
}

#[test]
fn configuration_files_that_cannot_be() {
    let place = Place::new();
    place.file("k", "");
    place.file("empty", "");
    place.file("text", "kernel = k");
    place.file("unknown", r#"{"kernel": "k", "colour": "red"}"#);
    place.file("type", r#"{"kernel": "k", "cpus": "many"}"#);
    place.file("value", r#"{"kernel": "k", "mem": "1M"}"#);
    place.file("list", r#"{"kernel": "k", "disk": ["path=a,b=c"]}"#);
    place.file("large", vec![b' '; (1 << 20) + 1]);
    place.file("deep", format!(r#"{{"mem": {}"#, "[".repeat(1 << 19)));
    for (file, words) in [
        ("missing", &["missing", "No such file"][..]),
        (".", &["directory"]),
        ("empty", &["empty", "line 1"]),
        ("text", &["line 1"]),
        ("unknown", &["colour", "cmdline"]),
        ("type", &["many"]),
        ("value", &["1M"]),
        ("list", &["unknown field `b`"]),
        ("large", &["larger"]),
        ("deep", &["recursion"]),
        ("/dev/zero", &["larger"]),
    ] {
        refused(&place, &format!("--config {file}"), BAD_ARGUMENT, words);
    }
}

#[test]
fn kernels_and_initrds_that_cannot_be() {
    if !has_kvm("kernels_and_initrds_that_cannot_be") {
        return;
    }
    let place = Place::new();
    place.file("empty", "");
    place.file(
        "random",
        (0..200_000u32).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect::<Vec<_>>(),
    );
    place.file("script", "#!/bin/sh\necho hello\n");
    place.file("kernel", kernel(&HALT));
    place.file("elf-cut", &kernel(&[0x90; 4096])[..5000]);
    place.file("elf-head", &kernel(&HALT)[..60]);
    let bz = bzimage(1, 64 << 10);
    place.file("bz", &bz);
    place.file("bz-cut", &bz[..bz.len() / 2]);
    place.file("bz-head", &bz[..0x210]);
    place.file("bz-32", bzimage(0, 64 << 10));
    let mut elf32 = kernel(&HALT);
    (elf32[4], elf32[18]) = (1, 3);
    place.file("elf-32", &elf32);
    let mut arm = kernel(&HALT);
    arm[18] = 183;
    place.file("elf-arm", &arm);
    fs::create_dir(place.path("directory")).unwrap();
    File::create(place.path("initrd")).unwrap().set_len(200 << 20).unwrap();
    place.file("small-initrd", "070701");
    for (arguments, words) in [
        ("--kernel missing", &["missing", "No such file"][..]),
        ("--kernel directory", &["directory"]),
        ("--kernel empty", &["empty"]),
        ("--kernel random", &["random", "not a kernel"]),
        ("--kernel script", &["script", "not a kernel"]),
        ("--kernel elf-cut", &["cut short"]),
        ("--kernel elf-head", &["elf-head"]),
        ("--kernel bz-cut", &["cut short"]),
        ("--kernel bz-head", &["bz-head"]),
        ("--kernel bz-32", &["32-bit"]),
        ("--kernel elf-32", &["elf-32"]),
        ("--kernel elf-arm", &["elf-arm"]),
        ("--kernel kernel --boot pvh", &["PVH"]),
        ("--kernel kernel --mem 8M", &["kernel", "8 MiB"]),
        ("--kernel kernel --initrd missing", &["initrd", "missing"]),
        ("--kernel kernel --initrd directory", &["initrd", "directory"]),
        ("--kernel kernel --initrd empty", &["initrd", "empty"]),
        ("--kernel kernel --initrd initrd --mem 128M", &["initrd", "200 MiB"]),
        (&format!("--kernel kernel --cmdline {}", "x".repeat(70_000)), &["command line", "70000"]),
        (&format!("--kernel bz --cmdline {}", "x".repeat(2100)), &["command line", "2100"]),
    ] {
        // The output file must not have been touched by a run that does not come about.
        let arguments = format!("{arguments} --console file=out --serial file=out2");
        refused(&place, &arguments, BAD_ARGUMENT, words);
    }
}

#[test]
fn disks_and_places_that_cannot_be() {
    if !has_kvm("disks_and_places_that_cannot_be") {
        return;
    }
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    place.file("odd", vec![0; 1000]);
    place.file("empty", "");
    place.file("disk", vec![7; 4096 * 4]);
    fs::create_dir(place.path("directory")).unwrap();
    for (arguments, words) in [
        ("--disk path=missing", &["missing", "No such file"][..]),
        ("--disk path=directory", &["directory"]),
        ("--disk path=odd", &["odd", "1000"]),
        ("--disk path=empty", &["empty"]),
        ("--disk path=/dev/null", &["/dev/null"]),
        ("--disk path=disk --disk path=missing", &["missing"]),
        ("--disk path=disk --disk path=disk", &["disk", "in use"]),
        ("--console file=no/such/place", &["no/such/place"]),
        ("--console socket=no/such/place", &["no/such/place"]),
        ("--serial file=directory --console off", &["directory"]),
    ] {
        refused(&place, &format!("--kernel kernel {arguments}"), BAD_ARGUMENT, words);
    }
    let many = "--disk path=disk,readonly ".repeat(40);
    refused(&place, &format!("--kernel kernel {many}"), BAD_ARGUMENT, &["devices"]);
}

#[test]
fn files_that_may_not_be_read() {
    let test = "files_that_may_not_be_read";
    if !has_kvm(test) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: {test} needs root, to become another user");
        return;
    }
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    for name in ["secret-kernel", "secret-disk"] {
        place.file(name, kernel(&HALT));
        fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    fs::set_permissions(place.path("kernel"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(place.path("run"), Some(65534), Some(65534)).unwrap();
    // Where the build directory is not open to others, neither is the command in it.
    let binary = place.path("vmm-copy");
    fs::copy(env!("CARGO_BIN_EXE_vmm"), &binary).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let open = |mode| fs::set_permissions(place.path("kvm"), fs::Permissions::from_mode(mode));
    let other_user = |arguments: &str| {
        let mut command = Command::new(&binary);
        command.args(arguments.split_whitespace());
        place.set_up(&mut command);
        command.env("VMM_KVM", place.path("kvm")).uid(65534).gid(65534);
        command
    };
    // A device node of our own, so that the host's need not be opened to others.
    let made = Command::new("mknod").arg(place.path("kvm")).args(["c", "10", "232"]).status();
    if !made.is_ok_and(|status| status.success()) || open(0o666).is_err() {
        eprintln!("SKIPPED: {test} needs mknod for a KVM device of its own");
        return;
    }
    let permission = &["Permission denied"];
    refused_command(&place, other_user("--kernel secret-kernel"), BAD_ARGUMENT, permission);
    refused_command(&place, other_user("--kernel kernel --initrd secret-kernel"), BAD_ARGUMENT, permission);
    refused_command(&place, other_user("--kernel kernel --disk secret-disk"), BAD_ARGUMENT, permission);
    open(0o600).unwrap();
    refused_command(&place, other_user("--kernel kernel"), HOST, &["kvm", "Permission denied"]);
}

#[test]
fn hosts_without_what_it_takes() {
    let place = Place::new();
    place.file("kernel", kernel(&HALT));
    let with_kvm = |path: &str| {
        let mut command = place.command("--kernel kernel --console file=out");
        command.env("VMM_KVM", path);
        command
    };
    refused_command(&place, with_kvm("/nonexistent/kvm"), HOST, &["/nonexistent/kvm", "No such file"]);
    refused_command(&place, with_kvm("/dev/null"), HOST, &["/dev/null"]);
    refused_command(&place, with_kvm("kernel"), HOST, &["kernel"]);
    if has_kvm("hosts_without_what_it_takes") {
        // More than any host has reserved, so it must be refused at the start, not met by a SIGBUS later.
        for memory in ["1T,hugepages=1G", "1T,hugepages=2M", "1T,hugepages=2M,backing=anonymous"] {
            refused(&place, &format!("--kernel kernel --console off --mem {memory}"), HOST, &["memory"]);
        }
    }
    // The runtime directory.
    fs::create_dir(place.path("run/vmm")).unwrap();
    fs::set_permissions(place.path("run/vmm"), fs::Permissions::from_mode(0o755)).unwrap();
    refused(&place, "--kernel kernel", HOST, &["open to other users"]);
    refused(&place, "list", HOST, &["open to other users"]);
}

#[test]
fn names_that_nothing_has() {
    let place = Place::new();
    for command in ["status", "pause", "resume", "stop", "kill"] {
        refused(&place, &format!("{command} nobody"), HOST, &["nobody"]);
        refused(&place, &format!("{command} ../../etc/passwd"), HOST, &["passwd"]);
    }
    let list = place.vmm("list --json");
    assert_eq!((list.status.code(), text(&list.stdout).trim()), (Some(0), "[]"));
}

#[test]
fn help_tells_the_codes_the_keys_and_examples() {
    let place = Place::new();
    for arguments in ["--help", "run --help", "-h"] {
        let output = place.vmm(arguments);
        let help = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{help}");
        for word in ["Examples:", "Exit codes:", "Ctrl-A x", "vmm --kernel", "triple fault"] {
            assert!(help.contains(word), "{arguments}: {word}");
        }
    }
    assert!(text(&place.vmm("--version").stdout).starts_with("vmm "));
    let nothing = place.vmm("");
    assert_eq!(nothing.status.code(), Some(BAD_ARGUMENT));
    assert!(text(&nothing.stderr).contains("Usage:"));
}

#[test]
fn a_dry_run_is_json_and_touches_nothing() {
    let place = Place::new();
    let before = place.contents();
    let output = place.vmm(
        "--kernel k --mem 5G --cpus 4 --disk d,readonly --rng --console file=out --serial pty --name x --dry-run",
    );
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["config"]["mem"]["size"], "5G");
    assert_eq!(plan["config"]["disk"][0]["readonly"], true);
    assert!(plan["memory_map"].as_array().unwrap().iter().any(|row| row["end"] == "0x17fffffff"), "{plan:#}");
    assert!(before == place.contents());
    // What it prints is a configuration that gives the same again.
    place.file("again.json", plan["config"].to_string());
    let again = place.vmm("--config again.json --dry-run");
    assert_eq!(text(&again.stdout), text(&output.stdout));
}

/// A command that runs while the test goes on, and is ended when the test is over.
struct Running(Option<Child>);

impl Running {
    fn pid(&self) -> i32 {
        self.0.as_ref().unwrap().id() as i32
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn finish(mut self) -> Output {
        finish(self.0.take().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Place {
    /// Starts a guest under a name and waits until its vCPU runs.
    fn start(&self, name: &str, arguments: &str) -> Running {
        let child = self.command(&format!("--kernel halt --console off --name {name} {arguments}")).spawn();
        let running = Running(Some(child.unwrap()));
        let deadline = Instant::now() + PATIENCE;
        while self.status(name)["state"] != "running" {
            assert!(Instant::now() < deadline, "{name} does not start");
            thread::sleep(Duration::from_millis(5));
        }
        running
    }

    fn status(&self, name: &str) -> Value {
        serde_json::from_slice(&self.vmm(&format!("status {name} --json")).stdout).unwrap_or_default()
    }

    #[track_caller]
    fn done(&self, arguments: &str) -> String {
        let output = self.vmm(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let dir = fs::read_dir(self.path("run/vmm")).into_iter().flatten();
        dir.map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn the_exit_code_tells_how_the_guest_ended() {
    if !has_kvm("the_exit_code_tells_how_the_guest_ended") {
        return;
    }
    let place = Place::new();
    place.file("exit", kernel(&out(0xf4, 21)));
    place.file("off", kernel(&out(0x600, 5 << 2 | 1 << 5)));
    place.file("reset", kernel(&out(0x602, 1)));
    place.file("i8042", kernel(&out(0x64, 0xfe)));
    place.file("crash", kernel(&[0x0f, 0x0b]));
    for (guest, code) in
        [("exit --debug-exit", 43), ("off", 0), ("reset", 0), ("i8042", 0), ("crash", GUEST_CRASH)]
    {
        let output = place.vmm(&format!("--kernel {guest} --mem 64M"));
        assert_eq!(output.status.code(), Some(code), "{guest}: {}", text(&output.stderr));
        if code == GUEST_CRASH {
            assert!(text(&output.stderr).starts_with("vmm: error: vcpu0: triple fault"), "{guest}");
        } else {
            assert!(output.stderr.is_empty(), "{guest}: {}", text(&output.stderr));
        }
        assert!(place.sockets().is_empty(), "{guest} left its socket");
    }
}

#[test]
fn a_guest_is_controlled_from_another_terminal() {
    if !has_kvm("a_guest_is_controlled_from_another_terminal") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let first = place.start("first", "--mem 64M --serial pty");
    let second = place.start("second", "--mem 32M --cpus 2");
    let status = place.status("first");
    assert_eq!(status["pid"], first.pid());
    assert_eq!((&status["cpus"], &status["memory_bytes"]), (&1.into(), &(64 << 20).into()));
    assert_eq!(status["kernel"], place.path("halt").canonicalize().unwrap().to_str().unwrap());
    let pty = status["ptys"][0]["path"].as_str().unwrap();
    assert!(fs::metadata(pty).unwrap().file_type().is_char_device(), "{pty}");
    assert!(place.done("status first").contains(pty));
    let list: Value = serde_json::from_str(&place.done("list --json")).unwrap();
    assert_eq!((&list[0]["name"], &list[1]["name"]), (&"first".into(), &"second".into()));
    assert_eq!(place.done("list").lines().count(), 3);

    refused(&place, "--kernel halt --console file=out --name first", HOST, &["first", "already"]);
    place.done("pause first");
    place.done("pause first");
    assert_eq!(place.status("first")["state"], "paused");
    assert_eq!(place.status("second")["state"], "running");
    place.done("resume first");
    assert_eq!(place.status("first")["state"], "running");

    // These guests do not know what a power button is.
    let asked = Instant::now();
    place.done("stop second --timeout 1");
    assert!(asked.elapsed() >= Duration::from_secs(1));
    let second = second.finish();
    assert_eq!(second.status.code(), Some(KILLED));
    assert!(text(&second.stderr).contains("did not power off in time"));
    // Killed although paused, and the name is free when the command returns.
    place.done("pause first");
    place.done("kill first");
    place.start("first", "");
    let first = first.finish();
    assert_eq!(first.status.code(), Some(KILLED));
    assert!(text(&first.stderr).contains(pty), "the pseudo-terminal is told at the start");
}

#[test]
fn signals_stop_a_guest() {
    use rustix::process::Signal;
    if !has_kvm("signals_stop_a_guest") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    for (signals, timeout) in [
        (&[Signal::TERM][..], 1),
        (&[Signal::TERM, Signal::TERM], 600),
        (&[Signal::INT, Signal::INT], 600),
        (&[Signal::HUP], 600),
    ] {
        let guest = place.start("guest", &format!("--stop-timeout {timeout}"));
        for signal in signals {
            guest.signal(*signal);
            // Two signals of a kind that come at once are one.
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(guest.finish().status.code(), Some(KILLED), "{signals:?}");
        assert!(place.sockets().is_empty());
    }
}

#[test]
fn a_guest_that_heeds_its_power_button_ends_well() {
    if !has_kvm("a_guest_that_heeds_its_power_button_ends_well") {
        return;
    }
    let place = Place::new();
    // Reads the event register (port 0x604) until the button is pressed, then powers off.
    let mut code = vec![0x66, 0xba, 0x04, 0x06, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    code.extend(out(0x600, 5 << 2 | 1 << 5));
    place.file("halt", kernel(&code));
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(guest.finish().status.code(), Some(0));
    let guest = place.start("guest", "");
    place.done("pause guest");
    place.done("stop guest");
    assert_eq!(guest.finish().status.code(), Some(0));
}

#[test]
fn a_reboot_really_restarts_if_asked_to() {
    if !has_kvm("a_reboot_really_restarts_if_asked_to") {
        return;
    }
    let place = Place::new();
    let mut code = out(0x3f8, b'r');
    code.truncate(7);
    code.extend(out(0x64, 0xfe));
    place.file("halt", kernel(&code));
    let output = place.vmm("--kernel halt --console off --serial file=out");
    assert_eq!((output.status.code(), fs::read(place.path("out")).unwrap()), (Some(0), b"r".to_vec()));

    let arguments = "--kernel halt --console off --serial file=out --on-reboot reset --name guest";
    let guest = Running(Some(place.command(arguments).spawn().unwrap()));
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(place.path("out")).map_or(0, |meta| meta.len()) < 5 {
        assert!(Instant::now() < deadline, "it does not restart");
        thread::sleep(Duration::from_millis(5));
    }
    // The end that was asked for is not undone by the next reboot.
    guest.signal(rustix::process::Signal::TERM);
    let output = guest.finish();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(fs::read(place.path("out")).unwrap().iter().all(|byte| *byte == b'r'));
}

#[test]
fn what_a_killed_monitor_leaves_does_not_take_its_name() {
    if !has_kvm("what_a_killed_monitor_leaves_does_not_take_its_name") {
        return;
    }
    let place = Place::new();
    place.file("halt", kernel(&HALT));
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::KILL);
    guest.finish();
    assert_eq!(place.sockets().len(), 1);
    let guest = place.start("guest", "");
    guest.signal(rustix::process::Signal::KILL);
    guest.finish();
    assert_eq!(place.done("list --json").trim(), "[]");
    assert!(place.sockets().is_empty(), "list cleans up");
}
