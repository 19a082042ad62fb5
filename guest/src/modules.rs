//! Which kernel modules to load, and in which order: what modprobe would find out, done once on the host so that init
//! only has a list to walk. Called by `initramfs`; reads `modules.dep` and `modules.builtin` as depmod wrote them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Why no order could be given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a module nor built in.
    #[error("the kernel has no module {0:?}")]
    Unknown(String),
    /// `modules.dep` names a module that it does not list.
    #[error("modules.dep: {module} needs {needs}, which is not listed")]
    Dangling {
        /// The module with the need.
        module: String,
        /// What is missing.
        needs: String,
    },
    /// One of the two lists.
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
}

/// The modules of one kernel.
#[derive(Debug, Default)]
pub struct Modules {
    /// Name to path (relative to the modules folder) and the paths it needs.
    modules: HashMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
}

impl Modules {
    /// Reads the lists of a `lib/modules/RELEASE` folder.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let read = |name| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|error| Error::Read(path, error))
        };
        Ok(Self::parse(&read("modules.dep")?, &read("modules.builtin")?))
    }

    /// From the text of `modules.dep` and `modules.builtin`.
    pub fn parse(dependencies: &str, builtin: &str) -> Self {
        let modules = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().map(str::to_owned).collect();
                (name_of(path), (path.to_owned(), needs))
            })
            .collect();
        Self { modules, builtin: builtin.lines().map(name_of).collect() }
    }

    /// The files to load for `names`, each after what it needs and none twice, as paths relative to the modules folder.
    /// A name that is built in needs nothing.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<String>, Error> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in names {
            let key = name.replace('-', "_");
            if self.modules.contains_key(&key) {
                self.visit(&key, &mut seen, &mut order)?;
            } else if !self.builtin.contains(&key) {
                return Err(Error::Unknown((*name).to_owned()));
            }
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut HashSet<String>, order: &mut Vec<String>) -> Result<(), Error> {
        // Marked before its needs are visited, so that a circle ends.
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let (path, needs) = &self.modules[name];
        // depmod lists what must come first last.
        for need in needs.iter().rev() {
            let key = name_of(need);
            if !self.modules.contains_key(&key) {
                return Err(Error::Dangling { module: path.clone(), needs: need.clone() });
            }
            self.visit(&key, seen, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`: to the kernel `-` and `_` are the same.
pub fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/v/virtio.ko: kernel/v/virtio_ring.ko
kernel/v/virtio_ring.ko:
kernel/v/virtio_mmio.ko: kernel/v/virtio.ko kernel/v/virtio_ring.ko
kernel/c/virtio-rng.ko.xz: kernel/v/virtio.ko kernel/v/virtio_ring.ko
kernel/x/a.ko: kernel/x/b.ko
kernel/x/b.ko: kernel/x/a.ko
kernel/x/lost.ko: kernel/x/nowhere.ko
";

    fn order(names: &[&str]) -> Result<Vec<String>, Error> {
        Modules::parse(DEP, "kernel/fs/ext4/ext4.ko\n").load_order(names)
    }

    #[test]
    fn needs_come_first_and_once() {
        let expected = [
            "kernel/v/virtio_ring.ko",
            "kernel/v/virtio.ko",
            "kernel/v/virtio_mmio.ko",
            "kernel/c/virtio-rng.ko.xz",
        ];
        assert_eq!(order(&["virtio_mmio", "virtio-rng"]).unwrap(), expected);
        assert_eq!(order(&["virtio-mmio", "virtio_rng", "virtio"]).unwrap(), expected);
    }

    #[test]
    fn built_in_needs_nothing_and_unknown_is_an_error() {
        assert!(order(&["ext4"]).unwrap().is_empty());
        assert!(matches!(order(&["ext5"]), Err(Error::Unknown(name)) if name == "ext5"));
        assert!(matches!(order(&["lost"]), Err(Error::Dangling { .. })));
    }

    #[test]
    fn a_circle_ends() {
        assert_eq!(order(&["a"]).unwrap(), ["kernel/x/b.ko", "kernel/x/a.ko"]);
    }
}
