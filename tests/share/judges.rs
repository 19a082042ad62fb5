//! What others wrote, on a shared folder: each script in `judges/` works in the folder that it is started in, and says by its exit code whether
//! all is well. `make share-judges` runs them all.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::mount::{Mounted, available, folder};

/// Who shares, and what the guest's kernel believes for how long.
const WAYS: [(bool, &str); 6] =
    [(false, "auto"), (false, "never"), (false, "always"), (true, "auto"), (true, "never"), (true, "always")];

/// Runs `judges/NAME` in folders that are shared in all [`WAYS`], and as `how` says. `user` of the guest runs it. `right` is told what it says.
fn judged_by(name: &str, how: &str, user: u32, right: impl Fn(&str)) {
    if !available(name) {
        return;
    }
    let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/share/judges")).join(name);
    for (by_user, cache) in WAYS {
        let (_keep, share) = folder(by_user);
        let mounted = Mounted::new(&share, &format!(",cache={cache}{how}"), by_user);
        let mut command = Command::new(&script);
        command.current_dir(mounted.path()).uid(user).gid(user);
        let output = command.output().unwrap();
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        let by = if by_user { "a user" } else { "root" };
        assert!(output.status.success(), "{name}, shared by {by}, cache={cache}{how}:\n{said}");
        println!("{name}, shared by {by}, cache={cache}{how}: {}", said.lines().last().unwrap_or_default());
        right(&said);
    }
}

fn judged(name: &str, how: &str, user: u32) {
    judged_by(name, how, user, |_| ());
}

/// Whether a tree of others' is named, which is built.
fn named(variable: &str) -> bool {
    let is_named = std::env::var_os(variable).is_some_and(|path| !path.is_empty());
    if !is_named {
        println!(
            "SKIP: what needs {variable}, a tree of theirs that is built: make share-judges {variable}=PATH"
        );
    }
    is_named
}

/// Those of pjdfstest that fail.
fn failed(said: &str) -> BTreeSet<&str> {
    let of = |word: &str| {
        let lines = said.lines().filter(|line| !line.starts_with(char::is_whitespace));
        lines.filter_map(|line| line.strip_suffix(word)?.split_whitespace().next()).collect::<BTreeSet<_>>()
    };
    let (failed, passed) = (of("FAILED"), of(" ok").len());
    assert!(failed.len() + passed > 300, "{said}");
    println!("{passed} passed, {} failed", failed.len());
    failed
}

#[test]
#[ignore = "make share-judges"]
fn pjdfstest() {
    let listed = include_str!("../boot/share/pjdfstest.list").lines().filter(|line| !line.starts_with('#'));
    let listed = listed.collect::<BTreeSet<_>>();
    judged_by("pjdfstest", "", 0, |said| assert_eq!(failed(said), listed));
    judged_by("pjdfstest", ",owners=xattr", 0, |said| assert_eq!(failed(said), BTreeSet::new()));
}

#[test]
#[ignore = "make share-judges"]
fn fsx() {
    judged("fsx", "", 0);
}

#[test]
#[ignore = "make share-judges"]
fn sqlite() {
    judged("sqlite", "", 0);
    judged("sqlite", ",locks=shared", 0);
}

#[test]
#[ignore = "make share-judges"]
fn postgres() {
    judged("postgres", ",uid=1000,locks=shared", 1000);
}

#[test]
#[ignore = "make share-judges"]
fn git() {
    if named("GIT_SOURCE") {
        judged("git", "", 0);
    }
}

#[test]
#[ignore = "make share-judges"]
fn fsstress() {
    if named("XFSTESTS") {
        judged("fsstress", ",owners=xattr", 0);
    }
}

#[test]
#[ignore = "make share-judges"]
fn cargo() {
    judged("cargo", "", 0);
}

#[test]
#[ignore = "make share-judges"]
fn npm() {
    judged("npm", "", 0);
}
