//! The files that the rig's machine boots from, kept in the user's cache: the outer kernel, its
//! modules, and the initramfs around the machine's first process. Called once per run; knows
//! nothing of QEMU.

use crate::memory_root::Tree;
use crate::options::Options;
use crate::packages;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The machine's first process.
const INIT: &[u8] = include_bytes!(env!("RIG_INIT"));

/// Modules to load, after those that they need. The first is what the rig is for; the others
/// are there for networks, sockets and file systems of tests.
const MODULES: [&str; 11] = [
    "kvm_amd",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "overlay",
    "erofs",
    "loop",
    "nbd",
    "bridge",
    "veth",
    "macvtap",
];

/// A kernel and its modules in the cache.
#[derive(Debug)]
pub struct BootFiles {
    /// The uncompressed kernel, an ELF file.
    pub kernel: PathBuf,
    /// The whole cache of the rig.
    pub cache: PathBuf,
    /// Module files in load order.
    modules: Vec<PathBuf>,
}

/// What a machine runs that has everything from the start.
#[derive(Debug)]
pub struct FixedRun {
    /// The encoded request.
    pub request: Vec<u8>,
    /// The files of its root.
    pub root: Tree,
}

/// Finds the boot files, fetching and unpacking them if need be.
pub fn prepare(options: &Options) -> Result<BootFiles> {
    let cache = cache_folder()?;
    if let Some(files) = find(&cache)? {
        return Ok(files);
    }
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    let _lock = lock(&cache)?;
    if let Some(files) = find(&cache)? {
        return Ok(files);
    }
    let fresh = fresh_folder(&cache)?;
    let (release, package) = packages::fetch_kernel(options, &fresh)?;
    let root = fresh.join("root");
    packages::unpack(&package, &root)?;
    let kernel = extract_kernel(&root.join("boot").join(format!("vmlinuz-{release}")))?;
    fs::write(fresh.join("vmlinux"), kernel)?;
    unpack_modules(&root.join("lib/modules").join(&release), &fresh.join("modules"))?;
    fs::remove_dir_all(&root)?;
    fs::remove_file(&package)?;
    fs::rename(&fresh, cache.join(format!("kernel-{release}{}", suffix())))?;
    find(&cache)?.context("the kernel that was just unpacked is not there")
}

impl BootFiles {
    /// The initramfs: the first process, modules, and for a machine that takes no request later
    /// the request and the root that it runs in.
    pub fn initramfs(&self, fixed: Option<&FixedRun>) -> Result<Vec<u8>> {
        const FOLDER: u32 = 0o040755;
        const PROGRAM: u32 = 0o100755;
        const CHARACTER_DEVICE: u32 = 0o020600;
        let mut archive = Archive::default();
        archive.add("dev", FOLDER, &[]);
        archive.add("dev/console", CHARACTER_DEVICE, &[]);
        archive.add("init", PROGRAM, INIT);
        let folder = rig_init::MODULE_FOLDER.trim_start_matches('/');
        archive.add(folder, FOLDER, &[]);
        for module in &self.modules {
            let name = module.file_name().context("module")?.to_string_lossy();
            let bytes = fs::read(module).with_context(|| format!("read {}", module.display()))?;
            archive.add(&format!("{folder}/{name}"), PROGRAM, &bytes);
        }
        if let Some(FixedRun { request, root }) = fixed {
            let request_file = rig_init::REQUEST_FILE.trim_start_matches('/');
            archive.add(request_file, PROGRAM, request);
            let folder = rig_init::ROOT_FOLDER.trim_start_matches('/');
            archive.add(folder, FOLDER, &[]);
            for (path, entry) in root {
                archive.add(&format!("{folder}{}", path.display()), entry.mode, &entry.content);
            }
        }
        archive.add("TRAILER!!!", 0, &[]);
        Ok(archive.0)
    }

    /// What tells the kernel, its modules and the first process from others.
    pub fn identity(&self) -> (&Path, &[PathBuf], &'static [u8]) {
        (&self.kernel, &self.modules, INIT)
    }
}

/// An exclusive lock on the cache, until it is dropped.
pub fn lock(cache: &Path) -> Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(cache.join("lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// An empty folder in the cache to fill and then rename. To be called with the cache locked: what
/// an earlier, interrupted run left under that name is removed.
pub fn fresh_folder(cache: &Path) -> Result<PathBuf> {
    let fresh = cache.join("unfinished");
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    fs::create_dir(&fresh)?;
    Ok(fresh)
}

fn cache_folder() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let base = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or(variable("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: no place for the rig's cache")?;
    Ok(base.join("vmm/rig"))
}

/// The end of the name of a folder with these modules: one with others is not taken for it.
fn suffix() -> String {
    let names = MODULES.join(" ");
    let hash =
        names.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("-{hash:08x}")
}

/// The newest kernel in the cache.
fn find(cache: &Path) -> Result<Option<BootFiles>> {
    let kernels = fs::read_dir(cache).into_iter().flatten().flatten();
    let folder = kernels
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("kernel-") && name.ends_with(&suffix())
        })
        .max_by_key(|entry| entry.metadata().and_then(|data| data.modified()).ok());
    let Some(folder) = folder.map(|entry| entry.path()) else {
        return Ok(None);
    };
    let mut modules: Vec<_> =
        fs::read_dir(folder.join("modules"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    modules.sort();
    Ok(Some(BootFiles { kernel: folder.join("vmlinux"), cache: cache.to_owned(), modules }))
}

/// The ELF kernel inside a bzImage: entering it directly (PVH) spares the machine the work of
/// decompressing. Offsets are those of the x86 boot protocol's setup header.
fn extract_kernel(image: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(image).with_context(|| format!("read {}", image.display()))?;
    let field = |at: usize| -> Result<usize> {
        let field = bytes.get(at..at + 4).context("kernel image too short")?;
        Ok(u32::from_le_bytes(field.try_into()?) as usize)
    };
    ensure!(field(0x202)? & 0xffff >= 0x208, "kernel image of an old boot protocol");
    let sectors = match bytes[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (sectors + 1) * 512 + field(0x248)?;
    let end = start + field(0x24c)?;
    let payload = bytes.get(start..end).context("kernel image cut short")?;
    let kernel = decompress(payload)?;
    ensure!(kernel.starts_with(b"\x7fELF"), "no ELF file in {}", image.display());
    Ok(kernel)
}

/// Undoes xz or zstd, told apart by their first bytes. A kernel's payload ends in the length of
/// what it holds, which is no part of the compressed stream.
fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    let (program, arguments, stream): (_, &[&str], _) = match bytes {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", &["-dc", "--single-stream"], bytes),
        [0x28, 0xb5, 0x2f, 0xfd, .., _, _, _, _] => ("zstd", &["-dcq"], &bytes[..bytes.len() - 4]),
        [a, b, c, d, ..] => bail!("unknown compression {a:02x} {b:02x} {c:02x} {d:02x}"),
        _ => bail!("nothing to decompress"),
    };
    // Through a file: a pipe in both directions would need a thread.
    let mut file = tempfile()?;
    std::io::Write::write_all(&mut file, stream)?;
    std::io::Seek::rewind(&mut file)?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(file)
        .output()
        .with_context(|| format!("run {program}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {}", text.trim_end());
    Ok(output.stdout)
}

fn tempfile() -> Result<File> {
    let fd = rustix::fs::memfd_create("rig", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(fd.into())
}

/// Decompresses the wanted modules and those that they need from the tree `from` into `to`,
/// named so that they sort in load order.
fn unpack_modules(from: &Path, to: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    collect_modules(&from.join("kernel"), &mut files)?;
    fs::create_dir(to)?;
    let mut done = Vec::new();
    for wanted in MODULES {
        unpack_module(wanted, &files, to, &mut done)?;
    }
    ensure!(done.iter().any(|name| name == "kvm_amd"), "no module kvm_amd in {}", from.display());
    Ok(())
}

fn unpack_module(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    to: &Path,
    done: &mut Vec<String>,
) -> Result<()> {
    // A module that the package has not is built into the kernel, or not wanted by all.
    let (false, Some(file)) = (done.iter().any(|other| other == name), files.get(name)) else {
        return Ok(());
    };
    let bytes = match file.extension().is_some_and(|end| end == "xz") {
        true => decompress(&fs::read(file)?)?,
        false => fs::read(file)?,
    };
    for needed in needs(&bytes) {
        unpack_module(&needed, files, to, done)?;
    }
    let stem = file.file_name().context("module")?.to_string_lossy();
    let stem = stem.trim_end_matches(".xz");
    fs::write(to.join(format!("{:02}-{stem}", done.len())), bytes)?;
    done.push(name.to_owned());
    Ok(())
}

/// Finds every module under `folder`, by name with underscores.
fn collect_modules(folder: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect_modules(&path, into)?;
        } else if let Some(name) = path.file_name().map(|name| name.to_string_lossy())
            && let Some((stem, _)) = name.split_once(".ko")
        {
            into.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The names of the modules that a module needs, from its `depends=` field.
fn needs(module: &[u8]) -> Vec<String> {
    const FIELD: &[u8] = b"\0depends=";
    let Some(at) = module.windows(FIELD.len()).position(|bytes| bytes == FIELD) else {
        return vec![];
    };
    let value = module[at + FIELD.len()..].split(|&byte| byte == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// A cpio archive in the "newc" format that the kernel unpacks.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    /// Adds an entry; a character device is `/dev/console`, the only one there is need for.
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let (major, minor) = match mode & 0o170000 {
            0o020000 => (5, 1),
            _ => (0, 0),
        };
        let number = self.0.len() as u32; // unique, which is all that is asked of it
        let size = content.len() as u32;
        let name_size = name.len() as u32 + 1;
        self.0.extend(b"070701");
        for field in [number, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0] {
            self.0.extend(format!("{field:08x}").bytes());
        }
        self.0.extend(name.bytes());
        self.0.push(0);
        self.pad();
        self.0.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_needs_come_from_its_own_field() {
        let module = b"\x7fELF\0license=GPL\0depends=kvm,some-lib\0intree=Y\0";
        assert_eq!(needs(module), ["kvm", "some_lib"]);
        assert!(needs(b"license=GPL\0depends=\0").is_empty());
        assert!(needs(b"nothing").is_empty());
    }

    #[test]
    fn archive_entries_are_aligned_and_in_order() {
        let mut archive = Archive::default();
        archive.add("a", 0o100644, b"12345");
        archive.add("TRAILER!!!", 0, &[]);
        assert_eq!(archive.0.len() % 4, 0);
        assert!(archive.0.starts_with(b"070701"));
        let text = String::from_utf8_lossy(&archive.0).into_owned();
        let (first, second) = text[6..].split_once("070701").unwrap();
        assert!(first.ends_with("a\x0012345\0\0\0"), "{first:?}");
        assert!(second.ends_with("TRAILER!!!\0\0\0\0"), "{second:?}");
        assert_eq!(&text[54..62], "00000005", "the content's length");
    }

    #[test]
    fn unknown_compression_is_an_error() {
        assert!(decompress(b"\x1f\x8b\x08\x00rest").is_err());
        assert!(decompress(b"").is_err());
    }
}
