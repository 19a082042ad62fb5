//! The cgroup hierarchy (cgroups(7), version 2): where this process is in it, and making a cgroup that has the controllers it needs.
//!
//! A controller reaches a cgroup if every cgroup above it passes it on (`cgroup.subtree_control`), and one that does so, but for the
//! root, must have no processes of its own. So in a delegated cgroup vmm's own processes step aside into a child, [`STARTERS`], and
//! machines are its siblings.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::Error;

/// By which a cgroup passes controllers on.
const SUBTREE_CONTROL: &str = "cgroup.subtree_control";
/// Which it has itself.
const CONTROLLERS: &str = "cgroup.controllers";
/// Its processes.
const PROCS: &str = "cgroup.procs";

/// For processes of vmm that have no guest, in a delegated cgroup. It goes with that.
const STARTERS: &str = "vmm-starters";
/// Of a machine's: the number of its process follows.
const OWN: &str = "vmm-";

/// The hierarchy, as this process sees it.
pub(super) struct Hierarchy {
    /// Where it is mounted.
    root: PathBuf,
    /// The cgroup that this process, or who started it, was started in.
    base: PathBuf,
    /// That of this process: `base`, or [`STARTERS`] in it.
    current: PathBuf,
}

/// Cgroups that were made, outermost first. Dropped, they go again.
#[derive(Debug)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    /// They stay.
    pub fn keep(mut self) {
        self.0.clear();
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Outermost first.
    pub fn paths(&self) -> &[PathBuf] {
        &self.0
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.0.iter().rev().for_each(|path| _ = fs::remove_dir(path));
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// Writes `value` to a file of the hierarchy, by one system call.
pub(super) fn write(path: &Path, value: &str) -> Result<(), Error> {
    let written = fs::File::options()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.map_err(failed("write to", path))
}

/// The process enters `cgroup`.
pub(super) fn join(cgroup: &Path) -> Result<(), Error> {
    write(&cgroup.join(PROCS), "0")
}

/// Where a cgroup2 file system shows what, of mountinfo (proc(5)): its root within the hierarchy, and its place.
fn mounts(mountinfo: &str) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        file_system.starts_with("cgroup2 ").then_some(())?;
        Some((unescaped(fields.next()?), unescaped(fields.next()?)))
    })
}

/// Blanks and the like are octal in mountinfo.
fn unescaped(text: &str) -> PathBuf {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\").into()
}

impl Hierarchy {
    pub fn find() -> Result<Self, Error> {
        let [cgroups, mountinfo] = ["/proc/self/cgroup", "/proc/self/mountinfo"].map(Path::new);
        Self::of(&read(cgroups)?, &read(mountinfo)?).ok_or(Error::NoCgroups)
    }

    fn of(cgroups: &str, mountinfo: &str) -> Option<Self> {
        let own = Path::new(cgroups.lines().find_map(|line| line.strip_prefix("0::"))?);
        let (root, current) = mounts(mountinfo).find_map(|(shown, place)| {
            let below = own.strip_prefix(shown).ok()?;
            let current = if below == Path::new("") { place.clone() } else { place.join(below) };
            Some((place, current))
        })?;
        let base = match current.parent() {
            Some(base) if current.ends_with(STARTERS) => base.to_owned(),
            _ => current.clone(),
        };
        Some(Self { root, base, current })
    }

    /// The cgroup that `wanted` names, or one for this process alone.
    pub fn target(&self, wanted: Option<&Path>) -> Result<PathBuf, Error> {
        let Some(wanted) = wanted else { return Ok(self.base.join(format!("{OWN}{}", std::process::id()))) };
        let below = match wanted.strip_prefix(&self.root) {
            Ok(below) => self.root.join(below),
            Err(_) if wanted.is_absolute() => self.root.join(wanted.strip_prefix("/").unwrap_or(wanted)),
            Err(_) => self.base.join(wanted),
        };
        let is_plain = |path: &Path| path.components().all(|part| part != Component::ParentDir);
        match is_plain(wanted) && below != self.root {
            // Without a slash at its end.
            true => Ok(below.components().collect()),
            false => Err(Error::Path(wanted.to_owned())),
        }
    }

    /// Makes `cgroup` and those above it, unless they are there, and has them pass these `controllers` on to it.
    pub fn make(&self, cgroup: &Path, controllers: &BTreeSet<&'static str>) -> Result<Made, Error> {
        self.check(&self.root, controllers)?;
        self.sweep();
        let mut made = Made(Vec::new());
        let above: Vec<_> =
            cgroup.ancestors().skip(1).take_while(|path| path.starts_with(&self.root)).collect();
        for path in above.iter().copied().rev().chain([cgroup]) {
            match fs::create_dir(path) {
                Ok(()) => made.0.push(path.to_owned()),
                Err(_) if path.is_dir() => {}
                Err(error) => return Err(failed("create", path)(error)),
            }
        }
        if !controllers.is_empty() {
            self.make_way(cgroup)?;
        }
        match above.into_iter().rev().try_for_each(|path| self.pass_on(path, controllers)) {
            Ok(()) => Ok(made),
            Err(error) => {
                self.come_back();
                Err(error)
            }
        }
    }

    /// Has the cgroup at `path` pass `controllers` on to its children.
    fn pass_on(&self, path: &Path, controllers: &BTreeSet<&'static str>) -> Result<(), Error> {
        let passed = read(&path.join(SUBTREE_CONTROL))?;
        let has = |controller: &&&str| passed.split_whitespace().any(|passed| passed == **controller);
        let missing: BTreeSet<_> =
            controllers.iter().filter(|controller| !has(controller)).copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.check(path, &missing)?;
        // The kernel says so of most controllers; others it passes on, and makes the cgroup another kind (Documentation/admin-guide/
        // cgroup-v2.rst, "Threads").
        let control = path.join(SUBTREE_CONTROL);
        if path != self.root && !read(&path.join(PROCS))?.trim().is_empty() {
            return Err(failed("write to", &control)(io::ErrorKind::ResourceBusy.into()));
        }
        let words: Vec<_> = missing.iter().map(|controller| format!("+{controller}")).collect();
        write(&control, &words.join(" "))
    }

    /// That the cgroup at `path` has `controllers`.
    fn check(&self, path: &Path, controllers: &BTreeSet<&'static str>) -> Result<(), Error> {
        let there = read(&path.join(CONTROLLERS))?;
        match controllers
            .iter()
            .find(|controller| !there.split_whitespace().any(|there| there == **controller))
        {
            None => Ok(()),
            Some(controller) => {
                let is_root = path == self.root;
                Err(Error::NoController { controller, cgroup: path.to_owned(), is_root })
            }
        }
    }

    /// Leaves `base` if it is to pass controllers on to `cgroup`.
    pub fn make_way(&self, cgroup: &Path) -> Result<(), Error> {
        // The root of the whole hierarchy has no type, and may have processes.
        let may_have_processes = !self.base.join("cgroup.type").exists();
        if self.current != self.base || may_have_processes || !cgroup.starts_with(&self.base) {
            return Ok(());
        }
        let aside = self.base.join(STARTERS);
        match fs::create_dir(&aside) {
            Err(error) if !aside.is_dir() => Err(failed("create", &aside)(error)),
            _ => join(&aside),
        }
    }

    /// Undoes [`make_way`](Self::make_way), as far as that can be.
    fn come_back(&self) {
        if self.current == self.base && join(&self.base).is_ok() {
            // Another starter may be in it.
            let _ = fs::remove_dir(self.base.join(STARTERS));
        }
    }

    /// Removes what killed machines and their caretakers have left.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.base).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(OWN)?.parse::<u32>().ok());
            if let Some(pid) = pid
                && !Path::new("/proc").join(pid.to_string()).exists()
            {
                // One that has processes stays.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "24 1 0:22 / /sys rw - sysfs sysfs rw\n\
                           30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn a_process_is_where_proc_and_the_mount_say() {
        let at = |cgroups: &str, mountinfo: &str| {
            Hierarchy::of(cgroups, mountinfo).map(|found| (found.root, found.base, found.current))
        };
        let paths = |root: &str, base: &str, current: &str| Some((root.into(), base.into(), current.into()));
        let root = "/sys/fs/cgroup";
        assert_eq!(at("0::/\n", UNIFIED), paths(root, root, root));
        let scope = "/sys/fs/cgroup/a/b.scope";
        assert_eq!(at("1:cpu:/x\n0::/a/b.scope\n", UNIFIED), paths(root, scope, scope));
        let aside = "/sys/fs/cgroup/a/b.scope/vmm-starters";
        assert_eq!(at("0::/a/b.scope/vmm-starters\n", UNIFIED), paths(root, scope, aside));
        // A container that sees its own cgroup alone, without a namespace.
        let part = "30 24 0:26 /docker/1 /my\\040cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(at("0::/docker/1/x\n", part), paths("/my cgroup", "/my cgroup/x", "/my cgroup/x"));
        assert_eq!(at("0::/\n", part), None);
        assert_eq!(at("4:memory:/\n", UNIFIED), None);
    }

    #[test]
    fn a_path_is_from_the_root_or_from_the_callers_own() {
        let hierarchy = Hierarchy::of("0::/a\n", UNIFIED).unwrap();
        let target = |path: &str| hierarchy.target(Some(Path::new(path))).ok();
        for path in ["/vmm/web", "/sys/fs/cgroup/vmm/web", "/vmm/web/"] {
            assert_eq!(target(path).unwrap().as_os_str(), "/sys/fs/cgroup/vmm/web", "{path}");
        }
        assert_eq!(target("web").unwrap().as_os_str(), "/sys/fs/cgroup/a/web");
        for path in ["/", "/sys/fs/cgroup", "../web", "/a/../../x"] {
            assert_eq!(target(path), None, "{path}");
        }
        let own = format!("/sys/fs/cgroup/a/vmm-{}", std::process::id());
        assert_eq!(hierarchy.target(None).unwrap().as_os_str(), own.as_str());
    }
}
