//! The program that every contender runs, and the root file system that it stands in: a static ELF file of a few hundred bytes
//! that says one line and ends. Assembled here, so that it is the same everywhere and its start costs nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, dword_ptr, dx, eax, ebx, ecx, edi, edx, esi, qword_ptr, r12, r13, rax, rbx,
    rcx, rdi, rsi, rsp,
};

use super::Life;
use crate::elf;
use cpio::{Archive, Entry};

/// What it says, and a newline, which a terminal may turn into two bytes. Nothing else that a contender prints has it.
pub const MARKER: &[u8] = b"bench: here";

/// Its path in the root file system.
pub const INIT: &str = "/init";

/// Its last argument, which makes it power the machine off in place of exiting: it is PID 1 of a VM. (A kernel hands words that
/// it does not know to its first program too, before those that are meant for it.)
pub const POWER_OFF: &str = "off";
/// The same by a reset, for machines that know no power-off.
pub const RESET: &str = "reset";
/// It stays, asleep, once it has spoken.
pub const WAIT: &str = "wait";
/// Before any of these: it speaks by writing to the port of the first serial line itself, with no driver in between.
pub const BY_PORT: &str = "port-";

/// Before any of those: it says [`HELD`], and goes on once the clock has jumped: its machine was saved, and goes on some seconds
/// later. Until then it looks every millisecond.
pub const HOLD: &str = "held-";
/// What it says then.
pub const HELD: &[u8] = b"bench: held";

/// Where the program begins, in the page where most static programs are loaded.
const START: u64 = 0x40_0000 + elf::CODE;
/// The first serial port.
const COM1: u32 = 0x3f8;

// arch/x86/entry/syscalls/syscall_64.tbl
const WRITE: u32 = 1;
const PAUSE: u32 = 34;
const NANOSLEEP: u32 = 35;
const GETPID: u32 = 39;
const REBOOT: u32 = 169;
const IOPERM: u32 = 173;
const CLOCK_GETTIME: u32 = 228;
const EXIT_GROUP: u32 = 231;

// linux/reboot.h
const MAGIC1: u32 = 0xfee1_dead;
const MAGIC2: u32 = 672_274_793;
const CMD_RESTART: u32 = 0x0123_4567;
const CMD_POWER_OFF: u32 = 0x4321_fedc;

/// The program's file.
///
/// # Errors
/// None that a user can cause.
pub fn image() -> Result<Vec<u8>, String> {
    code().map(|code| elf::program(&code, START)).map_err(|error| format!("assemble the program: {error}"))
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let [mut marker, mut by_port, mut end, mut reboot, mut wait, mut fail, mut exit] =
        [(); 7].map(|()| a.create_label());
    let [mut hold, mut held, mut look, mut speak, mut nap] = [(); 5].map(|()| a.create_label());
    let length = MARKER.len() as u32 + 1;

    // The stack as the kernel leaves it (System V ABI for x86-64, 3.4.1): argc, argv[0], argv[1] and so on.
    a.mov(r12, qword_ptr(rsp))?;
    a.mov(r13, qword_ptr(rsp + r12 * 8))?;
    a.cmp(byte_ptr(r13), i32::from(HOLD.as_bytes()[0]))?;
    a.je(hold)?;
    a.set_label(&mut speak)?;
    a.lea(rsi, qword_ptr(marker))?;
    // Alone it sees its own path, which does not begin like this.
    a.cmp(byte_ptr(r13), i32::from(BY_PORT.as_bytes()[0]))?;
    a.je(by_port)?;

    a.mov(eax, WRITE)?;
    a.mov(edi, 1)?;
    a.mov(edx, length)?;
    a.syscall()?;
    a.cmp(eax, length)?;
    a.jne(fail)?;
    a.jmp(end)?;

    a.set_label(&mut by_port)?;
    a.add(r13, BY_PORT.len() as i32)?;
    a.mov(eax, IOPERM)?;
    a.mov(edi, COM1)?;
    a.mov(esi, 1)?;
    a.mov(edx, 1)?;
    a.syscall()?;
    a.test(eax, eax)?;
    a.jne(fail)?;
    a.lea(rsi, qword_ptr(marker))?;
    a.mov(ecx, length)?;
    a.mov(edx, COM1)?;
    a.rep().outsb()?;

    a.set_label(&mut end)?;
    a.mov(edi, 0)?;
    a.cmp(r12, 1)?;
    a.je(exit)?;
    a.mov(al, byte_ptr(r13))?;
    a.cmp(al, i32::from(WAIT.as_bytes()[0]))?;
    a.je(wait)?;

    // Whoever starts it as root outside of a VM keeps the machine.
    a.mov(eax, GETPID)?;
    a.syscall()?;
    a.cmp(eax, 1)?;
    a.jne(fail)?;
    a.mov(edx, CMD_RESTART)?;
    a.mov(al, byte_ptr(r13))?;
    a.cmp(al, i32::from(RESET.as_bytes()[0]))?;
    a.je(reboot)?;
    a.mov(edx, CMD_POWER_OFF)?;
    a.cmp(al, i32::from(POWER_OFF.as_bytes()[0]))?;
    a.jne(fail)?;

    a.set_label(&mut reboot)?;
    a.mov(eax, REBOOT)?;
    a.mov(edi, MAGIC1)?;
    a.mov(esi, MAGIC2)?;
    a.syscall()?;

    a.set_label(&mut fail)?;
    a.mov(edi, 1)?;
    a.set_label(&mut exit)?;
    a.mov(eax, EXIT_GROUP)?;
    a.syscall()?;

    a.set_label(&mut hold)?;
    a.add(r13, HOLD.len() as i32)?;
    a.mov(eax, WRITE)?;
    a.mov(edi, 1)?;
    a.lea(rsi, qword_ptr(held))?;
    a.mov(edx, HELD.len() as u32 + 1)?;
    a.syscall()?;
    a.sub(rsp, 16)?;
    a.mov(rbx, i64::MAX)?;
    a.set_label(&mut look)?;
    a.mov(eax, CLOCK_GETTIME)?;
    // CLOCK_REALTIME
    a.xor(edi, edi)?;
    a.mov(rsi, rsp)?;
    a.syscall()?;
    a.mov(rax, qword_ptr(rsp))?;
    a.mov(rcx, rax)?;
    a.sub(rcx, rbx)?;
    a.mov(rbx, rax)?;
    // The first time it is far below.
    a.cmp(rcx, 2)?;
    a.jge(speak)?;
    a.mov(eax, NANOSLEEP)?;
    a.lea(rdi, qword_ptr(nap))?;
    a.xor(esi, esi)?;
    a.syscall()?;
    a.jmp(look)?;

    a.set_label(&mut wait)?;
    a.mov(eax, PAUSE)?;
    a.syscall()?;
    a.jmp(wait)?;

    a.set_label(&mut marker)?;
    a.db(MARKER)?;
    a.db(b"\n")?;
    a.set_label(&mut held)?;
    a.db(HELD)?;
    a.db(b"\n")?;
    // struct timespec
    a.set_label(&mut nap)?;
    a.dq(&[0, 1_000_000])?;
    a.assemble(START)
}

/// How a guest without a kernel ends its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A 0 to the debug-exit port 0xf4, of QEMU's device of that name and of vmm's.
    DebugExit,
    /// S5 and SLP_EN (0x34) to a sleep control register (ACPI 6.5, 4.8.3.7) at port 0x600, where alioth has it.
    SleepControl,
}

/// A kernel of five or six instructions, for any monitor that enters an ELF file by PVH (in 32-bit mode): it writes
/// [`BARE_MARKER`] to the serial port and ends the run by one more port, or halts for good.
///
/// # Errors
/// None that a user can cause.
pub fn bare_metal(life: Life, ending: Ending) -> Result<Vec<u8>, String> {
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        a.mov(dx, COM1)?;
        a.mov(al, u32::from(BARE_MARKER))?;
        a.out(dx, al)?;
        match (life, ending) {
            (Life::Once, Ending::DebugExit) => {
                a.xor(eax, eax)?;
                a.out(0xf4, al)?;
            }
            (Life::Once, Ending::SleepControl) => {
                a.mov(dx, 0x600)?;
                a.mov(al, 0x34)?;
                a.out(dx, al)?;
            }
            (Life::Idle, _) => {
                // No interrupt will come.
                a.cli()?;
                a.hlt()?;
            }
        }
        a.assemble(elf::LOAD)
    };
    code().map(|code| elf::pvh_kernel(&code)).map_err(|error| format!("assemble the guest: {error}"))
}

/// The same for a machine that is saved: it writes to `touched` MiB from 16 MiB on, says [`BARE_HELD`], and waits for a jump of the
/// time-stamp counter by 2^32 before it goes on as that does.
///
/// # Errors
/// None that a user can cause.
pub fn bare_metal_held(life: Life, touched: u32) -> Result<Vec<u8>, String> {
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let [mut touch, mut look] = [(); 2].map(|()| a.create_label());
        a.mov(edi, 16u32 << 20)?;
        a.set_label(&mut touch)?;
        a.mov(dword_ptr(edi), edi)?;
        a.add(edi, 4096)?;
        a.cmp(edi, ((16 + touched) << 20) as i32)?;
        a.jb(touch)?;
        a.mov(dx, COM1)?;
        a.mov(al, u32::from(BARE_HELD))?;
        a.out(dx, al)?;
        a.rdtsc()?;
        a.mov(ebx, edx)?;
        a.set_label(&mut look)?;
        a.rdtsc()?;
        a.mov(ecx, edx)?;
        a.sub(ecx, ebx)?;
        a.mov(ebx, edx)?;
        // The upper half counts up by one every second or two.
        a.cmp(ecx, 2)?;
        a.jb(look)?;
        a.mov(dx, COM1)?;
        a.mov(al, u32::from(BARE_MARKER))?;
        a.out(dx, al)?;
        match life {
            Life::Once => {
                a.xor(eax, eax)?;
                a.out(0xf4, al)?;
            }
            Life::Idle => {
                a.cli()?;
                a.hlt()?;
            }
        }
        a.assemble(elf::LOAD)
    };
    code().map(|code| elf::pvh_kernel(&code)).map_err(|error| format!("assemble the guest: {error}"))
}

/// What [`bare_metal_held`] says first.
pub const BARE_HELD: u8 = b'h';
/// What [`bare_metal`] says.
pub const BARE_MARKER: u8 = b'x';

/// The root file system, as a folder and as an initramfs of the same content.
#[derive(Debug, Clone)]
pub struct Root {
    /// `/init`, and `/dev`, `/proc` and `/sys`, empty.
    pub folder: PathBuf,
    /// The same, and /dev/console, without which a kernel gives its first program no output.
    pub initramfs: PathBuf,
}

impl Root {
    /// Makes both in `scratch`.
    ///
    /// # Errors
    /// A file cannot be written: which and why.
    pub fn make(scratch: &Path) -> Result<Self, String> {
        let root = Self { folder: scratch.join("root"), initramfs: scratch.join("root.cpio") };
        let program = image()?;
        let mut archive = Archive::new();
        let mut add = |path: &str, entry| archive.add(path, entry).map_err(|error| error.to_string());
        for folder in ["dev", "proc", "sys"] {
            let path = root.folder.join(folder);
            fs::create_dir_all(&path).map_err(|error| format!("make {}: {error}", path.display()))?;
            add(folder, Entry::Directory { mode: 0o755 })?;
        }
        add("dev/console", Entry::CharDevice { mode: 0o600, major: 5, minor: 1 })?;
        write(&root.folder.join("init"), &program)?;
        add("init", Entry::File { mode: 0o755, data: program })?;
        let mut bytes = Vec::new();
        archive.write(&mut bytes).map_err(|error| error.to_string())?;
        write(&root.initramfs, &bytes)?;
        Ok(root)
    }
}

/// Writes an executable file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .map_err(|error| format!("write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn program() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::make(folder.path()).unwrap();
        (folder, root.folder.join("init"))
    }

    #[test]
    fn it_says_its_line_and_ends_well() {
        let (_folder, init) = program();
        assert!(fs::metadata(&init).unwrap().len() < 1024);
        let output = Command::new(&init).output().unwrap();
        assert_eq!((output.stdout.trim_ascii_end(), output.status.code()), (MARKER, Some(0)), "{output:?}");
    }

    #[test]
    fn what_it_cannot_say_is_no_success() {
        let (_folder, init) = program();
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(Command::new(&init).stdout(full).status().unwrap().code(), Some(1));
    }

    #[test]
    fn it_ends_no_machine_that_is_not_its_own() {
        let (_folder, init) = program();
        for word in [POWER_OFF, RESET, "else"] {
            assert_eq!(Command::new(&init).arg(word).output().unwrap().status.code(), Some(1), "{word}");
        }
    }

    #[test]
    fn it_waits_if_told_to() {
        use std::io::Read;
        let (_folder, init) = program();
        let mut child = Command::new(&init).args(["noacpi", WAIT]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = vec![0; MARKER.len()];
        child.stdout.take().unwrap().read_exact(&mut said).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((said.as_slice(), ended), (MARKER, None));
    }
}
