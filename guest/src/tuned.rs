//! The tuned kernel: Debian's linux-source with our fragment over `make tinyconfig`. Called by `Kernel::get`. Cached by
//! source version, fragment and compiler.

use crate::cache::Cache;
use crate::debian;
use crate::kconfig::Config;
use crate::kernel::Kernel;
use crate::run::{Tool, last_lines, say};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// The configuration that this module is about.
pub const FRAGMENT: &str = include_str!("../kernel/tuned.config");

const SOURCE_PACKAGE: &str = "linux-source-6.1";

/// What the kernel's build needs of Debian. libelf is for objtool, bc for its time constants.
const BUILD_PACKAGES: [&str; 10] =
    ["bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "lz4", "make", "patch", "xz-utils"];

/// A word of the source that we change, because no option does it.
struct Edit {
    file: &'static str,
    from: &'static str,
    to: &'static str,
    /// How often it stands there.
    times: usize,
}

const EDITS: [Edit; 6] = [
    // The kernel fills memory of its own that it frees with 0xcc, a help against bugs in its start-up code. -1 says: free only.
    Edit {
        file: "arch/x86/mm/init.c",
        from: "\t\t\t\t   POISON_FREE_INITMEM, what);",
        to: "\t\t\t\t   -1, what);",
        times: 1,
    },
    // Sections begin at multiples of 2 MiB for page table isolation, for memory encryption, and to be mapped by large pages each: of the 12
    // MiB that the kernel takes then, 5 are padding, and half a MiB of that is cleared with the bss. Side by side they take 6.6 MiB.
    Edit { file: "arch/x86/kernel/vmlinux.lds.S", from: "ALIGN(PMD_SIZE)", to: "ALIGN(PAGE_SIZE)", times: 4 },
    Edit {
        file: "arch/x86/kernel/vmlinux.lds.S",
        from: "ALIGN(HPAGE_SIZE)",
        to: "ALIGN(PAGE_SIZE)",
        times: 4,
    },
    // A kernel entered by PVH asks 256 CPUID leaves, an exit each, for Xen, also if it is built without Xen's support.
    Edit {
        file: "arch/x86/platform/pvh/enlighten.c",
        from: "u32 msr = xen_cpuid_base();",
        to: "u32 msr = 0;",
        times: 1,
    },
    // Some 4000 files that describe the allocator's caches in /sys/kernel/slab. The two files have to agree.
    Edit { file: "include/linux/slub_def.h", from: "CONFIG_SYSFS", to: "CONFIG_SLUB_SYSFS", times: 2 },
    Edit { file: "mm/slub.c", from: "CONFIG_SYSFS", to: "CONFIG_SLUB_SYSFS", times: 6 },
];

/// What no configuration of ours reads, more than half of the files: writing them takes as long as unpacking the rest. Kconfig and
/// make want their own files from everywhere.
const UNUSED: [&str; 12] = [
    "Documentation/*/*",
    "arch/[a-w]*/*.[chS]",
    "arch/[a-w]*/*.dts*",
    "tools/testing",
    "sound/*.[ch]",
    "drivers/gpu/*.[ch]",
    "drivers/iio/*.[ch]",
    "drivers/infiniband/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/[ew]*/*.[ch]",
    "drivers/scsi/*.[ch]",
    "drivers/staging/*.[ch]",
];

/// To be raised when this module makes something else of the same source and fragment.
const FORMAT: u8 = 3;

/// About how many steps (compilations, archives, links) a build prints; only the progress display uses it.
const STEPS: usize = 1750;

/// The cached one, or else one built now. With `refresh` apt is asked for a newer source first.
pub fn get(refresh: bool) -> Result<Kernel> {
    let cache = Cache::open("tuned")?;
    if !refresh && let Some(kernel) = current(&cache)? {
        return Ok(kernel);
    }

    debian::check_host()?;
    debian::refresh_lists(refresh)?;
    debian::ensure_installed(&BUILD_PACKAGES)?;
    let version = debian::available(SOURCE_PACKAGE)
        .with_context(|| format!("no package {SOURCE_PACKAGE}; this is made for Debian 12 (bookworm)"))?;
    let name = key(&version)?;
    if let Some(folder) = cache.get(&name) {
        cache.set_current(&name)?;
        return Kernel::open(&folder);
    }

    let work = cache.workplace()?;
    let package = work.path().join("package");
    fs::create_dir(&package)?;
    debian::download_and_unpack(SOURCE_PACKAGE, &package)?;
    say("unpacking the kernel's source");
    let archive = package.join(format!("usr/src/{SOURCE_PACKAGE}.tar.xz"));
    Tool::new("tar")
        .arg("-C")
        .arg(work.path())
        .args(UNUSED.map(|pattern| format!("--exclude={SOURCE_PACKAGE}/{pattern}")))
        .env("LC_ALL", "C")
        .arg("-xf")
        .arg(&archive)
        .quiet()
        .context("unpack the kernel's source")?;
    fs::remove_dir_all(&package)?;

    let (source, build) = (work.path().join(SOURCE_PACKAGE), work.path().join("build"));
    fs::create_dir(&build)?;
    for edit in &EDITS {
        edit.apply(&source)?;
    }
    configure(&source, &build)?;
    compile(&source, &build)?;

    let item = work.path().join("item");
    fs::create_dir(&item)?;
    for (from, to) in [
        ("arch/x86/boot/bzImage", "bzImage"),
        ("vmlinux", "vmlinux"),
        (".config", "config"),
        ("System.map", "System.map"),
        ("include/config/kernel.release", "release"),
    ] {
        fs::rename(build.join(from), item.join(to)).with_context(|| format!("the build left no {from}"))?;
    }
    fs::write(item.join("source-version"), &version)?;
    Kernel::open(&cache.publish(&item, &name)?)
}

/// The cached one, if it is still what would be built (but for what apt may have by now).
pub fn cached() -> Result<Option<Kernel>> {
    current(&Cache::open("tuned")?)
}

fn current(cache: &Cache) -> Result<Option<Kernel>> {
    match cache.current() {
        Some(folder)
            if source_version(&folder)
                .map(|version| key(&version))
                .transpose()?
                .is_some_and(|key| folder.ends_with(key)) =>
        {
            Kernel::open(&folder).map(Some)
        }
        _ => Ok(None),
    }
}

fn source_version(folder: &Path) -> Option<String> {
    fs::read_to_string(folder.join("source-version")).ok()
}

/// Names a build by all that decides what comes out; [`FORMAT`] stands for this module's own part in it.
fn key(version: &str) -> Result<String> {
    let compiler = Tool::new("gcc").arg("--version").output().context("ask gcc for its version")?;
    let mut hash = Sha256::new();
    hash.update(FRAGMENT);
    hash.update([0, FORMAT]);
    hash.update(compiler.lines().next().unwrap_or_default());
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{version}_{hash}"))
}

impl Edit {
    /// Fails unless the text is there as often as it should: a new source may need another look.
    fn apply(&self, source: &Path) -> Result<()> {
        let path = source.join(self.file);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", self.file))?;
        let edited = self.edited(&text)?;
        fs::write(&path, edited).with_context(|| format!("write {}", self.file))
    }

    fn edited(&self, text: &str) -> Result<String> {
        let count = text.matches(self.from).count();
        if count != self.times {
            let Self { file, from, times, .. } = self;
            bail!("{file}: {:?} is there {count} times, not {times}; has the source changed?", from.trim());
        }
        Ok(text.replace(self.from, self.to))
    }
}

/// Kbuild in `build`, with everything fixed that would make two builds differ.
fn make(source: &Path, build: &Path) -> Tool {
    Tool::new("nice")
        .args(["-n", "10", "make", "-C"])
        .arg(source)
        .arg(format!("O={}", build.display()))
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 UTC")
        .env("KBUILD_BUILD_USER", "guest")
        .env("KBUILD_BUILD_HOST", "vmm")
        .env("KBUILD_BUILD_VERSION", "1")
}

/// tinyconfig, our fragment over it, the rest by dependencies and defaults; then checks that nothing of ours was lost.
fn configure(source: &Path, build: &Path) -> Result<()> {
    let fragment = build.join("tuned.config");
    fs::write(&fragment, FRAGMENT)?;
    make(source, build).arg("tinyconfig").quiet()?;
    Tool::new(&source.join("scripts/kconfig/merge_config.sh").to_string_lossy())
        .args(["-m", "-O"])
        .arg(build)
        .arg(build.join(".config"))
        .arg(&fragment)
        .dir(source)
        .quiet()?;
    make(source, build).arg("olddefconfig").quiet()?;
    check(FRAGMENT, &fs::read_to_string(build.join(".config"))?)
}

/// Fails naming every line of `fragment` that `result` does not have.
pub fn check(fragment: &str, result: &str) -> Result<()> {
    let fragment = Config::parse(fragment).context("the fragment")?;
    let lost = fragment.lost_in(&Config::parse(result).context("the configuration that came out")?);
    if lost.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = lost.iter().map(|lost| format!("  {lost}")).collect();
    bail!(
        "{} of {} options of the fragment did not survive:\n{}",
        lost.len(),
        fragment.len(),
        lines.join("\n")
    )
}

fn compile(source: &Path, build: &Path) -> Result<()> {
    // One more than there are CPUs: some job waits for the disk.
    let jobs = std::thread::available_parallelism().map_or(1, usize::from) + 1;
    say(format_args!("building the tuned kernel with {jobs} jobs; some minutes, once"));
    let log_path = build.join("build.log");
    let mut log = File::create(&log_path)?;
    let mut child = make(source, build)
        .arg(format!("-j{jobs}"))
        .args(["vmlinux", "bzImage"])
        .into_command()
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("run make")?;
    let mut progress = Progress::new();
    for line in BufReader::new(child.stdout.take().context("make's output")?).lines() {
        let line = line?;
        writeln!(log, "{line}")?;
        if line.starts_with("  ") {
            progress.step();
        }
    }
    let status = child.wait()?;
    progress.end();
    if !status.success() {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        bail!("the kernel's build failed ({status}); its last words:\n{}", last_lines(&log, 30));
    }
    Ok(())
}

/// Steps done and time passed: one line rewritten on a terminal, else a line every 15 seconds.
#[derive(Debug)]
struct Progress {
    start: Instant,
    steps: usize,
    shown: Duration,
    terminal: bool,
}

impl Progress {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { start: Instant::now(), steps: 0, shown: Duration::ZERO, terminal }
    }

    fn step(&mut self) {
        self.steps += 1;
        let passed = self.start.elapsed();
        let pause = if self.terminal { Duration::from_millis(200) } else { Duration::from_secs(15) };
        if passed - self.shown >= pause {
            self.shown = passed;
            let (start, end) = if self.terminal { ("\r", "\x1b[K") } else { ("", "\n") };
            eprint!(
                "{start}guest: {} of about {} steps, {} s{end}",
                self.steps,
                STEPS.max(self.steps),
                passed.as_secs()
            );
        }
    }

    fn end(&self) {
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        eprintln!("{start}guest: {} steps in {} s", self.steps, self.start.elapsed().as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_option_fails_by_name() {
        check("CONFIG_A=y\n# CONFIG_B is not set\n", "CONFIG_A=y\n").unwrap();
        let error = check("CONFIG_A=y\nCONFIG_PVH=y\n", "CONFIG_A=y\n").unwrap_err().to_string();
        assert!(error.contains("1 of 2") && error.contains("CONFIG_PVH"), "{error}");
    }

    #[test]
    fn an_edit_happens_as_often_as_it_says_or_fails() {
        let edit = Edit { file: "x.c", from: "old", to: "new", times: 2 };
        assert_eq!(edit.edited("an old, old word").unwrap(), "an new, new word");
        assert!(edit.edited("nothing").is_err());
        assert!(edit.edited("old").unwrap_err().to_string().contains("1 times, not 2"));
    }
}
