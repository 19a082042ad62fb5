//! The files that a machine with a repeatable clock needs in its own memory: any file read from
//! the host would take a time of the host's. Called by `session` for `--icount`; knows nothing of
//! how the files get into the machine.

use crate::options::Options;
use crate::packages::capture;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Folders that every root has.
const FOLDERS: [&str; 5] = ["/dev", "/proc", "/sys", "/run", "/tmp"];

/// Small files that the C library reads.
const SYSTEM_FILES: [&str; 4] = ["/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"];

/// What stands at a path: file mode and content (of a symbolic link: its target).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    /// The content.
    pub content: Vec<u8>,
}

/// Files by absolute path, folders before what they hold.
pub type Tree = BTreeMap<PathBuf, Entry>;

/// The command, what else the user named, every word of an argument that is a file or a command,
/// and the libraries of all of them.
pub fn collect(options: &Options) -> Result<Tree> {
    let cwd = std::env::current_dir().context("working directory")?;
    let mut named: Vec<PathBuf> = FOLDERS.iter().chain(&SYSTEM_FILES).map(PathBuf::from).collect();
    named.retain(|path| path.exists());
    named.extend(find_program(&options.command[0]));
    for path in &options.with {
        fs::symlink_metadata(path).with_context(|| format!("--with {}", path.display()))?;
        named.push(cwd.join(path));
    }
    // Also the FILE in `--option=FILE` and `key=FILE,key=FILE`, and what a script in an argument
    // calls: a file too many costs memory, one too few the run.
    let ends_word = |byte: &u8| byte.is_ascii_whitespace() || b"=,;:|&<>()'\"`".contains(byte);
    for argument in &options.command[1..] {
        let words = argument.as_bytes().split(ends_word).map(OsStr::from_bytes);
        for word in words.filter(|word| !word.is_empty()) {
            let path = cwd.join(word);
            named.extend(path.is_file().then_some(path).or_else(|| find_program(word)));
        }
    }
    let mut tree = Tree::new();
    add(&mut tree, &cwd)?;
    for path in named {
        match path.is_dir() && !FOLDERS.iter().any(|folder| path == Path::new(folder)) {
            true => add_below(&mut tree, &path)?,
            false => add(&mut tree, &path)?,
        }
    }
    Ok(tree)
}

/// The file that execvp(3) would take for `name`.
fn find_program(name: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return std::path::absolute(name).ok().filter(|path| path.is_file());
    }
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file() && is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o111 != 0)
}

/// Adds a folder and everything in it.
fn add_below(tree: &mut Tree, folder: &Path) -> Result<()> {
    add(tree, folder)?;
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => add_below(tree, &entry.path())?,
            false => add(tree, &entry.path())?,
        }
    }
    Ok(())
}

/// Adds what stands at `path` with the folders and links on the way, and a program's libraries.
fn add(tree: &mut Tree, path: &Path) -> Result<()> {
    let mut waiting: VecDeque<PathBuf> = VecDeque::from([path.to_owned()]);
    while let Some(path) = waiting.pop_front() {
        let mut at = PathBuf::from("/");
        let mut rest = path.components();
        rest.next(); // the root itself
        while let Some(part) = rest.next() {
            match part {
                Component::ParentDir => {
                    at.pop();
                    continue;
                }
                part => at.push(part),
            }
            let known = tree.contains_key(&at);
            let Ok(data) = fs::symlink_metadata(&at) else {
                break; // a link to nowhere is copied as such
            };
            let kind = data.file_type();
            let content = if kind.is_symlink() {
                let target = fs::read_link(&at)?;
                let parent = at.parent().unwrap_or(Path::new("/"));
                waiting.push_back(parent.join(&target).join(rest.as_path()));
                target.into_os_string().into_encoded_bytes()
            } else if kind.is_file() && !known {
                let content = fs::read(&at).with_context(|| format!("read {}", at.display()))?;
                waiting.extend(needs(&at, &content));
                content
            } else {
                vec![]
            };
            if !known && (kind.is_symlink() || kind.is_file() || kind.is_dir()) {
                let mode = data.permissions().mode();
                tree.insert(at.clone(), Entry { mode, content });
            }
            if kind.is_symlink() {
                break;
            }
        }
    }
    Ok(())
}

/// The other files that running this one takes: a script's interpreter, a program's libraries.
fn needs(path: &Path, content: &[u8]) -> Vec<PathBuf> {
    if !is_executable(path) {
        return vec![];
    }
    if let Some(line) = content.strip_prefix(b"#!") {
        let line = line.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let words = line.split(|byte| byte.is_ascii_whitespace());
        return words
            .filter(|word| word.starts_with(b"/"))
            .map(|word| PathBuf::from(OsStr::from_bytes(word)))
            .collect();
    }
    if !content.starts_with(b"\x7fELF") {
        return vec![];
    }
    // ldd fails for a static program, which needs nothing.
    let list = capture(Command::new("ldd").arg(path)).unwrap_or_default();
    libraries(&String::from_utf8_lossy(&list))
}

/// The paths in ldd's list.
fn libraries(list: &str) -> Vec<PathBuf> {
    list.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_the_absolute_paths_of_ldd() {
        let list =
            "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld.so (0x7f)\n";
        let paths: Vec<_> = ["/lib/libc.so.6", "/lib64/ld.so"].map(PathBuf::from).into();
        assert_eq!(libraries(list), paths);
        assert!(libraries("\tstatically linked\n").is_empty());
    }

    #[test]
    fn links_bring_what_they_lead_to() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        fs::create_dir(at("real")).unwrap();
        fs::write(at("real/file"), "x").unwrap();
        std::os::unix::fs::symlink("real", at("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("real/lost")).unwrap();
        let mut tree = Tree::new();
        add(&mut tree, &at("link/file")).unwrap();
        add(&mut tree, &at("link/lost")).unwrap();
        assert_eq!(tree[&at("link")].content, b"real");
        assert_eq!(tree[&at("real/file")].content, b"x");
        assert_eq!(tree[&at("real/lost")].content, b"nowhere");
        assert!(tree.contains_key(folder.path().parent().unwrap()));
        assert!(!tree.contains_key(Path::new("/")));
    }
}
