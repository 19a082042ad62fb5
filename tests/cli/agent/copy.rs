//! `vmm cp`, with the real agent. What a tar stream is, and cannot do, is tested where it is made.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use super::Guest;
use crate::place::*;

fn ok(guest: &Guest, arguments: &str) {
    let output = guest.vmm(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments}: {}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn files_and_folders_go_in_and_come_back() {
    let guest = Guest::new();
    let place = &guest.place;
    // The guest is this host: its paths are ours.
    let there = place.path("there").display().to_string();
    fs::create_dir(&there).unwrap();
    place.file("one", "1".repeat(1_000_000));
    fs::set_permissions(place.path("one"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::create_dir_all(place.path("tree/sub")).unwrap();
    place.file("tree/sub/file", "inner");
    symlink("sub/file", place.path("tree/link")).unwrap();

    ok(&guest, &format!("cp one web:{there}"));
    ok(&guest, &format!("cp one web:{there}/other"));
    ok(&guest, &format!("cp tree web:{there}"));
    ok(&guest, &format!("cp tree web:{there}/renamed"));
    ok(&guest, &format!("cp tree/. web:{there}/content"));
    ok(&guest, &format!("cp tree/. web:{there}"));
    for name in ["one", "other"] {
        let file = place.path("there").join(name);
        assert_eq!(fs::read(&file).unwrap().len(), 1_000_000);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o751);
    }
    for name in ["tree/", "renamed/", "content/", ""] {
        let at = place.path("there").join(name);
        assert_eq!(fs::read(at.join("sub/file")).unwrap(), b"inner", "{name}");
        assert_eq!(fs::read_link(at.join("link")).unwrap().to_str(), Some("sub/file"));
    }
    ok(&guest, &format!("cp web:{there}/tree back"));
    ok(&guest, &format!("cp web:{there}/one ."));
    ok(&guest, &format!("cp web:{there}/tree/sub/. flat"));
    assert_eq!(fs::read(place.path("back/link")).unwrap(), b"inner");
    assert_eq!(fs::read(place.path("flat/file")).unwrap(), b"inner");
}

#[test]
fn a_socket_that_is_left_out_hides_no_error_of_the_guest() {
    let guest = Guest::new();
    let place = &guest.place;
    let here = place.dir.path().display().to_string();
    fs::create_dir(place.path("tree")).unwrap();
    place.file("tree/file", "inner");
    let _socket = UnixListener::bind(place.path("tree/sock")).unwrap();
    let left = "tree/sock is a socket, and was left out";
    for (to, error) in [
        ("/no/such/folder", "in the guest: cannot copy to /no/such/folder: there is no folder to put it in"),
        ("/dev/null/tree", "in the guest: cannot copy to /dev/null/tree: "),
    ] {
        let output = guest.vmm(&format!("cp tree web:{to}"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{said}");
        // It may not have come as far as the socket.
        assert!(said.starts_with(&format!("vmm: error: {error}")), "{said}");
    }
    // What can be copied is, and the rest told, whichever end left it out.
    for arguments in [format!("cp tree web:{here}/copy"), format!("cp web:{here}/tree back")] {
        let output = guest.vmm(&arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(left) && !said.contains("cannot"), "{said}");
    }
    for folder in ["copy", "back"] {
        assert_eq!(fs::read(place.path(folder).join("file")).unwrap(), b"inner");
    }
}

#[test]
fn a_full_disk_is_told_of_the_stream_that_met_it() {
    let guest = Guest::new();
    guest.place.file("one", "content");
    let one = guest.place.path("one").display().to_string();
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    for arguments in [format!("cp web:{one} -"), format!("exec web cat {one}")] {
        let output = finish(guest.command(&arguments).stdout(full()).spawn().unwrap());
        let said = text(&output.stderr);
        assert!(said.contains("cannot write to standard output on the host: No space left"), "{said}");
    }
}

#[test]
fn a_dash_is_a_tar_stream() {
    let guest = Guest::new();
    let there = guest.place.path("there").display().to_string();
    fs::create_dir(&there).unwrap();
    guest.place.file("one", "content");
    let output = guest.vmm(&format!("cp web:{} -", guest.place.path("one").display()));
    assert_eq!((output.status.code(), output.stdout.len() % 512), (Some(0), 0));
    guest.place.file("one.tar", &output.stdout);
    let file = fs::File::open(guest.place.path("one.tar")).unwrap();
    let child = guest.command(&format!("cp - web:{there}")).stdin(Stdio::from(file)).spawn().unwrap();
    assert_eq!(finish(child).status.code(), Some(0));
    assert_eq!(fs::read(guest.place.path("there/one")).unwrap(), b"content");
    let tar = Command::new("tar").arg("-tf").arg(guest.place.path("one.tar")).output().unwrap();
    assert_eq!(text(&tar.stdout), "one\n");
}

#[test]
fn what_cannot_be_copied_is_one_error_that_says_why() {
    let guest = Guest::new();
    let place = &guest.place;
    place.file("one", "content");
    let here = place.dir.path().display().to_string();
    for (arguments, code, words) in [
        ("cp none web:/tmp", 2, &["none", "No such file"][..]),
        ("cp one two", 2, &["in a guest"]),
        ("cp web:/a web:/b", 2, &["in a guest"]),
        ("cp other:/a .", 4, &["other"]),
        ("cp web:/no/such/file .", 4, &["in the guest", "/no/such/file", "No such file"]),
        ("cp one web:/no/such/folder/", 4, &["in the guest", "/no/such/folder", "no such folder"]),
        ("cp one web:/no/such/folder", 4, &["in the guest", "no folder to put it in"]),
        (&format!("cp web:{here}/one no/such/folder"), 4, &["no/such/folder", "no folder to put it in"]),
        (&format!("cp web:{here}/run one"), 4, &["one"]),
    ] {
        let output = guest.vmm(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments}: {said}");
        assert_eq!(said.lines().filter(|line| line.starts_with("vmm: error: ")).count(), 1, "{said}");
        for word in words {
            assert!(said.contains(word), "{arguments}: no {word:?} in {said}");
        }
    }
    assert_eq!(fs::read(place.path("one")).unwrap(), b"content");
    let garbage = fs::File::open("/proc/self/exe").unwrap();
    let child = guest.command(&format!("cp - web:{here}")).stdin(Stdio::from(garbage)).spawn().unwrap();
    let output = finish(child);
    assert!(text(&output.stderr).contains("no tar archive"), "{}", text(&output.stderr));
}
