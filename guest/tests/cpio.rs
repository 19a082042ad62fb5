//! Our archives, as the `cpio` program reads them.

use cpio::{Archive, Entry};
use guest::initramfs::{Compression, Recipe};
use guest::run::Tool;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn has_cpio(test: &str) -> bool {
    let found = Tool::new("cpio").arg("--version").quiet().is_ok();
    if !found {
        let message = format!("SKIP: {test}: no cpio (apt-get install cpio)\n");
        assert!(std::env::var_os("CI").is_none(), "{message}");
        let _ = std::io::stderr().write_all(message.as_bytes());
    }
    found
}

fn list(archive: &[u8]) -> String {
    String::from_utf8(
        Tool::new("cpio").args(["-itv", "--quiet", "--numeric-uid-gid"]).filter(archive).unwrap(),
    )
    .unwrap()
}

#[test]
fn cpio_reads_every_kind_of_entry() {
    if !has_cpio("cpio_reads_every_kind_of_entry") {
        return;
    }
    let mut archive = Archive::new();
    // Every remainder by 4, of names and of contents.
    for length in 0..9 {
        let name = format!("files/{}", "n".repeat(length + 1));
        archive.add(&name, Entry::File { mode: 0o640, data: vec![b'x'; length] }).unwrap();
    }
    archive.add("dev/console", Entry::CharDevice { mode: 0o600, major: 5, minor: 1 }).unwrap();
    archive.add("bin/sh", Entry::Symlink("/bin/busybox".to_owned())).unwrap();
    let mut bytes = Vec::new();
    archive.write(&mut bytes).unwrap();

    let listing = list(&bytes);
    let lines: Vec<&str> = listing.lines().collect();
    assert_eq!(lines.len(), archive.len(), "{listing}");
    let find = |end: &str| {
        *lines.iter().find(|line| line.ends_with(end)).unwrap_or_else(|| panic!("{end}:\n{listing}"))
    };
    assert!(find(" bin").starts_with("drwxr-xr-x"));
    assert!(find("bin/sh -> /bin/busybox").starts_with("lrwxrwxrwx"));
    assert!(find("dev/console").starts_with("crw-------") && find("dev/console").contains("5,   1"));
    assert!(find(" files/nnn").contains("-rw-r-----") && find(" files/nnn").contains(" 2 "));

    let folder = tempfile::tempdir().unwrap();
    Tool::new("cpio").args(["-idm", "--quiet", "files/*"]).dir(folder.path()).filter(&bytes).unwrap();
    for length in 0..9 {
        let path = folder.path().join("files").join("n".repeat(length + 1));
        assert_eq!(fs::read(&path).unwrap(), vec![b'x'; length]);
        assert_eq!(fs::metadata(&path).unwrap().mtime(), 0);
    }
}

#[test]
fn an_initramfs_has_what_was_added_and_is_the_same_twice() {
    if !has_cpio("an_initramfs_has_what_was_added_and_is_the_same_twice") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/script"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("sub/script"), PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("sub/script", tree.join("link")).unwrap();
    let init = folder.path().join("init");
    fs::write(&init, "not a real one").unwrap();
    let recipe = Recipe {
        init: Some(init.clone()),
        add: vec![(tree.clone(), "/opt/tree".to_owned()), (init, "etc/copy".to_owned())],
        ..Recipe::default()
    };
    let path = folder.path().join("out.cpio");
    recipe.write(&path, Compression::None).unwrap();
    let first = fs::read(&path).unwrap();
    recipe.write(&path, Compression::None).unwrap();
    assert!(first == fs::read(&path).unwrap(), "two builds differ");
    let listing = list(&first);
    for line in ["init", "opt/tree/sub/script", "opt/tree/link -> sub/script", "etc/copy", "dev/console"] {
        assert!(listing.lines().any(|entry| entry.ends_with(&format!(" {line}"))), "no {line}:\n{listing}");
    }
    for (compression, program) in [(Compression::Gzip, "gzip"), (Compression::Lz4, "lz4")] {
        recipe.write(&path, compression).unwrap();
        let packed = fs::read(&path).unwrap();
        assert!(Tool::new(program).args(["-d", "-c"]).filter(&packed).unwrap() == first, "{program}");
    }
}

#[test]
fn bad_additions_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let init = folder.path().join("init");
    fs::write(&init, "").unwrap();
    let build = |host: &str, guest: &str| {
        let add = vec![(folder.path().join(host), guest.to_owned())];
        Recipe { init: Some(init.clone()), add, ..Recipe::default() }.build().map(|archive| archive.len())
    };
    assert!(build("init", "x").is_ok());
    assert!(build("missing", "x").unwrap_err().to_string().contains("missing"));
    assert!(build("init", "../x").is_err());
    assert!(build("init", "dev").is_err(), "a file over a folder");
    let modules = Recipe { init: Some(init.clone()), modules: vec!["ext4".to_owned()], ..Recipe::default() };
    assert!(modules.build().unwrap_err().to_string().contains("modules"));
}
