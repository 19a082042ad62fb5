//! What the monitors boot: Linux with an init that only speaks, and a guest of a few instructions.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::images;

/// Guest RAM, for every monitor and guest.
pub const RAM_MIB: u64 = 128;

/// The kernel and the initramfs of the Linux guest.
pub const FILES: [&str; 2] = ["tuned-vmlinux", "tiny.cpio"];

/// What is booted, and what it says first.
pub struct Guest {
    pub kernel: PathBuf,
    /// None: it is the tiny guest, which knows the serial port only.
    pub initrd: Option<PathBuf>,
    pub marker: &'static [u8],
}

impl Guest {
    /// Writes a byte to the serial port, then ends the run through the debug-exit port.
    pub fn tiny(dir: &Path) -> Result<Self, String> {
        const SAYS: u8 = b'x';
        let mut code = images::out(0x3f8, SAYS);
        // Without its halt.
        code.truncate(7);
        code.extend(images::out(0xf4, 0));
        let kernel = dir.join("tiny");
        fs::write(&kernel, images::pvh_kernel(&code)).map_err(|e| format!("write {kernel:?}: {e}"))?;
        Ok(Self { kernel, initrd: None, marker: &[SAYS] })
    }

    /// The tuned kernel, whose first program says "guest: init" and powers off.
    pub fn linux(dir: Option<&Path>) -> Result<Self, String> {
        let [kernel, initrd] = FILES.map(|name| folder(dir).map(|dir| dir.join(name)));
        Ok(Self { kernel: kernel?, initrd: Some(initrd?), marker: b"guest: init" })
    }
}

/// Where [`FILES`] are: `dir`, or `target/guests`. They are made if they are missing.
pub fn folder(dir: Option<&Path>) -> Result<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = dir.map_or(root.join("target/guests"), Path::to_owned);
    if FILES.iter().any(|name| !dir.join(name).exists()) {
        eprintln!("figures: making the guest in {}", dir.display());
        let mut make = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
        make.current_dir(root).args(["guest", "bundle", "--only", "tuned", "--out"]).arg(&dir);
        // Its output is not a result.
        let status = make.stdout(Stdio::null()).status().map_err(|e| format!("run {make:?}: {e}"))?;
        if !status.success() {
            return Err(format!("{make:?}: {status}"));
        }
    }
    fs::canonicalize(&dir).map_err(|e| format!("{dir:?}: {e}"))
}
