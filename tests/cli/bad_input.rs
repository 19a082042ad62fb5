//! A table of input that cannot work.
//!
//! Each row gives one error and one hint, the documented exit code, no panic, and leaves everything as it was.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;

use crate::images::*;
use crate::place::*;

#[test]
fn arguments_that_cannot_be() {
    let place = Place::new();
    place.file("k", "");
    let long = "x".repeat(65);
    for (arguments, words) in [
        ("run", &["no kernel"][..]),
        ("--mem 1G", &["no kernel", "no disk"]),
        ("--initrd k --disk d", &["--initrd without --kernel"]),
        ("--boot linux64 --disk d", &["--boot without --kernel"]),
        ("--kernel k --mem 0", &["--mem 0"]),
        ("--kernel k --mem 1M", &["--mem 1M"]),
        ("--kernel k --mem 999T", &["--mem 999T"]),
        ("--kernel k --mem 16T", &["--mem 16T"]),
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
        ("--kernel k --share .:/a --share k:/a", &["another is mounted there"]),
        ("--kernel k --share path=.,to=a", &["no place"]),
        ("--kernel k --share .:/a,cache=some", &["some"]),
        ("--kernel k --share vhost-user=s,to=/a,readonly", &["readonly", "vhost-user="]),
        ("--kernel k --share to=/a", &["path=PATH"]),
        ("--kernel k --net mac=02:00:00:00:00:01", &["one of user", "tap=NAME"]),
        ("--kernel k --net tap=a,fd=3", &["one of user", "tap=NAME"]),
        ("--kernel k --net user,tap=a", &["one of user"]),
        ("--kernel k --net user,restrict=perhaps", &["perhaps"]),
        ("--kernel k --net user,dns=one.one", &["one.one", "9.9.9.9"]),
        ("--kernel k --net user,allow=localhost", &["localhost", "127.0.0.1:8080"]),
        ("--kernel k --net user,publish=80", &["80", "the guest's port"]),
        ("--kernel k --net tap=a,allow=10.0.0.0/8", &["net=user"]),
        ("--kernel k --net user --net user", &["one user network"]),
        ("--kernel k -p 80", &["80", "the guest's port"]),
        ("--kernel k -p 80-90:80-81", &["11 ports", "2 of the guest"]),
        ("--kernel k -p eth0:80:80", &["eth0", "address"]),
        ("--kernel k -p 80:80/sctp", &["sctp"]),
        ("--kernel k -p 8080:80 -p 8080:81", &["127.0.0.1:8080/tcp", "published twice"]),
        ("--kernel k --net user,publish=0.0.0.0:53:53/udp -p 53:53/udp", &["53/udp", "published twice"]),
        ("--kernel k --net user,dns=0.0.0.0", &["0.0.0.0", "9.9.9.9"]),
        ("--kernel k --net user,", &["user,", "nothing before or after one of the commas"]),
        ("--kernel k --net user,=9", &["\"=9\" has no key"]),
        ("--kernel k --vsock=", &["is empty: expected PATH"]),
        ("--kernel k --net tap=a -p 8080:80", &["user network"]),
        ("--kernel k --net tap=a,sped=9", &["sped"]),
        ("--kernel k --net fd=three", &["three"]),
        ("--kernel k --net tap=a/b", &["a/b", "--net tap=a/b"]),
        ("--kernel k --net tap=a,mac=ff:ff:ff:ff:ff:ff", &["ff:ff"]),
        ("--kernel k --net tap=a,mtu=1", &["MTU"]),
        ("--kernel k --net tap=a,queues=17", &["17"]),
        ("--kernel k --net socket=a,queues=2", &["tap"]),
        ("--kernel k --net tap=a --net tap=a", &["two"]),
        ("--kernel k --test-device --console off --net tap=a", &["test device"]),
        ("--kernel k --console nowhere", &["nowhere", "stdio"]),
        ("--kernel k --console stdio --serial stdio", &["stdio", "two"]),
        ("--kernel k --port a=off --port a=pty", &["two", "\"a\""]),
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
    place.file("bytes", r#"{"kernel": "k", "mem": 64}"#);
    place.file("size", r#"{"kernel": "k", "mem": [64]}"#);
    place.file("comma", r#"{"kernel": "k", "disk": ["a,b.img"]}"#);
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
        ("bytes", &["--mem 64:"]),
        ("size", &["[64] is neither a text nor an object"]),
        ("comma", &["a,,b.img"]),
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
    place.file("elf-cut", &kernel(&[0x90; 4096])[..4300]);
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
    place.file("disk.xz", b"\xfd7zXZ\0 and so on");
    fs::create_dir(place.path("directory")).unwrap();
    for (arguments, words) in [
        ("--disk path=disk.xz", &["disk.xz", "is xz"][..]),
        ("--disk path=missing", &["missing", "No such file"][..]),
        ("--disk path=directory", &["directory"]),
        ("--disk path=odd", &["odd", "1000"]),
        ("--disk path=empty", &["empty"]),
        ("--disk path=/dev/null", &["/dev/null"]),
        ("--disk path=disk --disk path=missing", &["missing"]),
        ("--disk path=disk --disk path=disk", &["disk", "in use"]),
        ("--share vhost-user=missing,to=/x", &["vhost-user back end missing", "No such file"]),
        ("--share vhost-user=disk,to=/x", &["vhost-user back end disk", "this is no socket"]),
        ("--share missing:/x", &["cannot share missing", "No such file"]),
        ("--share /dev/null:/x", &["cannot share /dev/null", "Not a directory"]),
        ("--debug-exit=0x604", &["debug-exit", "overlaps"]),
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
fn hints_are_in_the_words_of_the_command_line_and_lead_on() {
    let place = Place::new();
    for (arguments, hint) in [
        ("--mem 1G", "give a kernel, --kernel FILE, or a disk with an installed system, --disk FILE"),
        ("--kernel k --mem 64", "that is 64 bytes; for 64 MiB write --mem 64M"),
        ("--kernel k --mem 1M", "try --mem 128M"),
        ("--kernel k --mem 100M,hugepages=1G", "round it up: --mem 1G,hugepages=1G"),
        (
            "--kernel k --mem 16T",
            "at most --mem 8T; the host's own memory (free -h) is the limit that matters",
        ),
        ("--kernel k --cpus 0", "give 1 to 254 CPUs: --cpus 2"),
        ("--option-rom r --kernel k", "add --firmware FILE"),
        ("exec --quiet web -- ls", "see vmm --help, or vmm run --help for every option"),
        ("--kernel k --disk path=a,b.img", "write a comma that belongs to a path twice: path=a,,b.img"),
        ("--kernel k --disk a=b.img", "give a path that has a '=' its key: path=a=b.img"),
        ("--kernel k --serial file=a,b", "write a comma that belongs to a path twice: file=a,,b"),
        ("--kernel k --port p=file=a,b", "write a comma that belongs to a path twice: file=a,,b"),
    ] {
        let said = text(&place.vmm(arguments).stderr);
        assert!(said.ends_with(&format!("\nhint: {hint}\n")), "{arguments}: {said}");
    }
}

#[test]
fn paths_may_have_any_character() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    if !has_kvm("paths_may_have_any_character") {
        return;
    }
    let place = Place::new();
    // A comma, '=', a blank, and bytes that are no UTF-8.
    let odd = |name: &str| OsString::from_vec([name.as_bytes(), b",=\xff x"].concat());
    let given = |before: &str, name: &str| {
        OsString::from_vec([before.as_bytes(), name.as_bytes(), b",,=\xff x"].concat())
    };
    let path = |name: &str| place.dir.path().join(odd(name));
    fs::write(path("kernel"), kernel(&out(0xf4, 21))).unwrap();
    fs::write(path("disk"), [0; 512]).unwrap();
    fs::write(path("config"), "{\"rng\": \"on\"}").unwrap();
    let mut arguments = vec![OsString::from("--kernel"), odd("kernel"), "--config".into(), odd("config")];
    arguments.extend(["--disk".into(), given("path=", "disk"), "--serial".into(), given("file=", "serial")]);
    arguments.extend(["--port".into(), given("log=file=", "port"), "--trace".into(), odd("trace")]);
    arguments.extend(["--debug-exit", "--console", "off"].map(OsString::from));
    let run = |more: &[&OsStr]| {
        let mut command = place.command("");
        finish(command.args(&arguments).args(more).spawn().unwrap())
    };
    let ran = run(&[]);
    assert_eq!(ran.status.code(), Some(43), "{}", text(&ran.stderr));
    for name in ["serial", "port", "trace"] {
        assert!(path(name).exists(), "{name}");
    }
    let report = |more: &[&OsStr]| {
        let mut command = place.command("trace report");
        finish(command.arg(odd("trace")).args(more).spawn().unwrap())
    };
    let told = report(&[]);
    assert!(text(&told.stdout).contains("debug-exit <- 0x15"), "{}", text(&told.stderr));
    let page = report(&[OsStr::new("--html"), &odd("page")]);
    assert!(page.status.success() && path("page").exists(), "{}", text(&page.stderr));

    // What is printed is a configuration that gives the same again.
    let plan = run(&[OsStr::new("--dry-run")]);
    let json: Value = serde_json::from_slice(&plan.stdout).unwrap();
    let bytes: Vec<_> = odd("kernel").as_bytes().iter().copied().map(Value::from).collect();
    assert_eq!(json["config"]["kernel"], Value::from(bytes));
    place.file("again.json", json["config"].to_string());
    let again = place.vmm("--config again.json --dry-run");
    assert_eq!(text(&again.stdout), text(&plan.stdout), "{}", text(&again.stderr));
}

#[test]
fn too_few_descriptors_have_one_code_and_one_hint() {
    if !has_kvm("too_few_descriptors_have_one_code_and_one_hint") {
        return;
    }
    let place = Place::new();
    place.file("kernel", kernel(&out(0xf4, 21)));
    place.file("disk", [0; 512]);
    let _wire = std::os::unix::net::UnixListener::bind(place.path("wire")).unwrap();
    let limited = |kind: &str, most: u32| {
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            &format!("ulimit {kind} -n {most}; exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_vmm"),
        ]);
        shell.args(
            "--kernel kernel --disk disk --rng --net socket=wire --console pty --debug-exit".split(' '),
        );
        place.set_up(&mut shell);
        finish(shell.spawn().unwrap())
    };
    // As few as the command itself needs to be loaded, and then one more each time, until it runs.
    let mut met = 0;
    for most in 5.. {
        let output = limited("", most);
        let said = text(&output.stderr);
        if output.status.code() == Some(43) {
            break;
        }
        assert_eq!(output.status.code(), Some(HOST), "{most}: {said}");
        assert!(
            said.contains("os error 24") && said.contains("hint: raise this shell's limit on open files"),
            "{most}: {said}"
        );
        met += 1;
        assert!(most < 200, "it never runs");
    }
    assert!(met > 3, "{met}");
    // A soft limit is no limit.
    assert_eq!(limited("-S", 5).status.code(), Some(43));
}

#[test]
fn an_output_that_is_a_file_of_the_same_run_is_refused() {
    let place = Place::new();
    for name in ["kernel", "initrd", "disk", "rom", "option", "log", "older.1"] {
        place.file(name, [name.as_bytes(), &[0; 1024]].concat());
    }
    place.file("vm.json", r#"{"kernel": "kernel"}"#);
    fs::create_dir(place.path("folder")).unwrap();
    fs::hard_link(place.path("disk"), place.path("hard")).unwrap();
    symlink("disk", place.path("soft")).unwrap();
    symlink("../soft", place.path("folder/chain")).unwrap();
    symlink("new", place.path("to-new")).unwrap();
    let run = "--kernel kernel --initrd initrd --disk disk --firmware rom --option-rom option --console off";
    for (arguments, words) in [
        ("--serial file=kernel", &["serial port", "kernel"][..]),
        ("--serial file=initrd", &["initrd"]),
        ("--serial file=./disk", &["disk"]),
        ("--serial file=rom", &["firmware"]),
        ("--serial file=option", &["option ROM"]),
        ("--serial file=hard", &["disk"]),
        ("--serial file=soft", &["disk"]),
        ("--serial file=folder/chain", &["disk"]),
        ("--console file=disk", &["console", "disk"]),
        ("--port log=file=kernel", &["port log", "kernel"]),
        ("--trace disk", &["trace", "disk"]),
        ("--config vm.json --trace vm.json", &["trace", "configuration"]),
        ("--console file=log --serial file=folder/../log", &["serial port", "console"]),
        ("--console file=new --serial file=folder/../new", &["serial port", "console"]),
        ("--console file=to-new --trace new", &["trace", "console"]),
        ("--port a=file=new --port b=file=new", &["port b", "port a"]),
        // What is full takes a second name.
        ("--serial file=older,max=64K --disk older.1", &["serial port", "when it is full", "disk"]),
        ("--serial file=new,max=64K --console file=new.1", &["serial port", "console"]),
    ] {
        // An option that is given twice would be an error of its own.
        let run =
            if arguments.contains("--console") { run.replace(" --console off", "") } else { run.to_owned() };
        refused(&place, &format!("{run} {arguments}"), BAD_ARGUMENT, words);
    }
    let trace = "trace --html kernel -- --kernel kernel --console off";
    refused(&place, trace, BAD_ARGUMENT, &["report", "kernel"]);
    let report = "trace report log --html folder/../log";
    refused(&place, report, BAD_ARGUMENT, &["report", "record"]);
    for command in ["trace report log --symbols kernel", "trace --symbols log"] {
        let run = if command.contains("report") { "" } else { " -- --kernel kernel --console off" };
        let html = if command.contains("report") { "kernel" } else { "log" };
        refused(&place, &format!("{command} --html {html}{run}"), BAD_ARGUMENT, &["report", "symbols"]);
    }
    let mut appending = place.command("--kernel kernel --disk disk --serial stdio");
    appending.stdout(File::options().append(true).open(place.path("disk")).unwrap());
    refused_command(&place, appending, BAD_ARGUMENT, &["standard output", "disk"]);
    // What any number of writers can share is nobody's.
    let shared = format!("{run} --serial file=/dev/null --port a=file=/dev/null --trace /dev/null --dry-run");
    assert_eq!(place.vmm(&shared).status.code(), Some(0));
}

#[test]
fn files_that_may_not_be_read() {
    let test = "files_that_may_not_be_read";
    if !has_kvm(test) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: {test}: needs root, to become another user");
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
        eprintln!("SKIP: {test}: needs mknod for a KVM device of its own");
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
        for (memory, pages, pool) in [
            ("1T,hugepages=1G", 1024, "1048576kB"),
            ("1T,hugepages=2M", 524_288, "2048kB"),
            ("1T,hugepages=2M,backing=memfd", 524_288, "2048kB"),
        ] {
            let arguments = format!("--kernel kernel --console off --mem {memory}");
            refused(&place, &arguments, HOST, &["memory"]);
            let said = text(&place.vmm(&arguments).stderr);
            let (begin, end) = said.trim_end().split_once(" | sudo tee ").unwrap();
            let (begin, all) = begin.rsplit_once(" echo ").unwrap();
            assert!(begin.ends_with(&format!("hint: {pages} huge pages must be free:")), "{said}");
            // Beside those that others have.
            assert!(all.parse::<u64>().unwrap() >= pages, "{said}");
            assert_eq!(end, format!("/sys/kernel/mm/hugepages/hugepages-{pool}/nr_hugepages"), "{said}");
        }
    }
    // The runtime directory.
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
