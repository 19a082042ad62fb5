//! The program that every contender runs, and the root file system that it stands in: a static ELF file of a few hundred bytes
//! that says one line and ends. Assembled here, so that it is the same everywhere and its start costs nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, dword_ptr, dx, eax, ebx, edi, edx, esi, qword_ptr, r10d, r12, r13, rbx, rcx,
    rdi, rdx, rsi, rsp,
};

use super::Life;
use super::restored::hold;
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

/// The same through the kernel's file of ports, for machines that go on from a snapshot: QEMU's emulated processors, the rig's among
/// them, deny a program its ports once its task register was set by KVM (they take a busy task for none).
pub const BY_NODE: &str = "node-";

/// Before any of those: it says [`HELD`] and spins until somebody has let it go in its machine's saved memory
/// (`restored::hold`). Then it says [`ON`] and becomes, by execve, a command that was given what follows.
pub const HOLD: &str = "held-";
/// What it says when it can be saved.
pub const HELD: &[u8] = b"bench: held";
/// What it says when it goes on.
pub const ON: &[u8] = b"bench: on";

/// Where the program begins, in the page where most static programs are loaded.
const START: u64 = 0x40_0000 + elf::CODE;
/// The first serial port.
const COM1: u32 = 0x3f8;

// arch/x86/entry/syscalls/syscall_64.tbl
const WRITE: u32 = 1;
const OPEN: u32 = 2;
const PWRITE64: u32 = 18;
const PAUSE: u32 = 34;
const GETPID: u32 = 39;
const EXECVE: u32 = 59;
const REBOOT: u32 = 169;
const IOPERM: u32 = 173;
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
    let [mut hold, mut look, mut say, mut held, mut on, mut word, mut path] =
        [(); 7].map(|()| a.create_label());
    let [mut by_node, mut byte, mut node, mut end_of_word] = [(); 4].map(|()| a.create_label());
    debug_assert_eq!(BY_PORT.len(), BY_NODE.len());

    // The stack as the kernel leaves it (System V ABI for x86-64, 3.4.1): argc, argv[0], argv[1] and so on.
    a.mov(r12, qword_ptr(rsp))?;
    a.mov(r13, qword_ptr(rsp + r12 * 8))?;
    // Alone it sees its own path, which does not begin like any of the words.
    a.cmp(byte_ptr(r13), i32::from(HOLD.as_bytes()[0]))?;
    a.je(hold)?;
    a.lea(rsi, qword_ptr(marker))?;
    a.mov(edx, MARKER.len() as u32 + 1)?;
    a.call(say)?;
    a.cmp(byte_ptr(r13), i32::from(BY_PORT.as_bytes()[0]))?;
    a.je(end_of_word)?;
    a.cmp(byte_ptr(r13), i32::from(BY_NODE.as_bytes()[0]))?;
    a.jne(end)?;
    a.set_label(&mut end_of_word)?;
    a.add(r13, BY_PORT.len() as i32)?;

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

    // RDX bytes at RSI, by the port or not, as the word at R13 has it.
    a.set_label(&mut say)?;
    a.cmp(byte_ptr(r13), i32::from(BY_PORT.as_bytes()[0]))?;
    a.je(by_port)?;
    a.cmp(byte_ptr(r13), i32::from(BY_NODE.as_bytes()[0]))?;
    a.je(by_node)?;
    a.mov(eax, WRITE)?;
    a.mov(edi, 1)?;
    a.syscall()?;
    a.cmp(eax, edx)?;
    a.jne(fail)?;
    a.ret()?;

    a.set_label(&mut by_port)?;
    a.push(rsi)?;
    a.push(rdx)?;
    a.mov(eax, IOPERM)?;
    a.mov(edi, COM1)?;
    a.mov(esi, 1)?;
    a.mov(edx, 1)?;
    a.syscall()?;
    a.test(eax, eax)?;
    a.jne(fail)?;
    a.pop(rcx)?;
    a.pop(rsi)?;
    a.mov(edx, COM1)?;
    a.rep().outsb()?;
    a.ret()?;

    a.set_label(&mut by_node)?;
    a.push(rsi)?;
    a.mov(ebx, edx)?;
    a.mov(eax, OPEN)?;
    a.lea(rdi, qword_ptr(node))?;
    // O_WRONLY
    a.mov(esi, 1)?;
    a.syscall()?;
    a.test(eax, eax)?;
    a.js(fail)?;
    a.mov(edi, eax)?;
    a.pop(rsi)?;
    a.set_label(&mut byte)?;
    a.mov(eax, PWRITE64)?;
    a.mov(edx, 1)?;
    a.mov(r10d, COM1)?;
    a.syscall()?;
    a.cmp(eax, 1)?;
    a.jne(fail)?;
    a.inc(rsi)?;
    a.dec(ebx)?;
    a.jne(byte)?;
    a.ret()?;

    a.set_label(&mut hold)?;
    a.add(r13, HOLD.len() as i32)?;
    a.lea(rsi, qword_ptr(held))?;
    a.mov(edx, HELD.len() as u32 + 1)?;
    a.call(say)?;
    a.lea(rbx, qword_ptr(word))?;
    a.set_label(&mut look)?;
    a.pause()?;
    a.cmp(byte_ptr(rbx + hold::LAST as i32), i32::from(hold::HELD[hold::LAST]))?;
    a.je(look)?;
    a.lea(rsi, qword_ptr(on))?;
    a.mov(edx, ON.len() as u32 + 1)?;
    a.call(say)?;
    // argv: its path, the rest of the word, and the end; no environment.
    a.lea(rdi, qword_ptr(path))?;
    a.xor(edx, edx)?;
    a.push(rdx)?;
    a.push(r13)?;
    a.push(rdi)?;
    a.mov(rsi, rsp)?;
    a.mov(eax, EXECVE)?;
    a.syscall()?;
    a.jmp(fail)?;

    a.set_label(&mut wait)?;
    a.mov(eax, PAUSE)?;
    a.syscall()?;
    a.jmp(wait)?;

    for (label, text) in [(&mut marker, MARKER), (&mut held, HELD), (&mut on, ON)] {
        a.set_label(label)?;
        a.db(text)?;
        a.db(b"\n")?;
    }
    a.set_label(&mut word)?;
    a.db(&hold::HELD)?;
    a.set_label(&mut path)?;
    a.db(INIT.as_bytes())?;
    a.db(b"\0")?;
    a.set_label(&mut node)?;
    a.db(b"/dev/port\0")?;
    a.assemble(START)
}

/// How a guest without a kernel ends its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A 0 to the debug-exit port 0xf4, of QEMU's device of that name and of vmm's.
    DebugExit,
    /// S5 and SLP_EN (0x34) to a sleep control register (ACPI 6.5, 4.8.3.7) at port 0x600, where alioth and Cloud Hypervisor
    /// have it.
    SleepControl,
    /// The keyboard controller's reset, 0xfe to port 0x64, which is all that Firecracker has.
    Reset,
}

impl Ending {
    /// The file name of the guest that ends so, or sleeps.
    pub fn file(self, life: Life, prefix: &str) -> String {
        let ending = match (life, self) {
            (Life::Idle, _) => "idle",
            (Life::Once, Self::DebugExit) => "debug-exit",
            (Life::Once, Self::SleepControl) => "sleep-control",
            (Life::Once, Self::Reset) => "reset",
        };
        format!("{prefix}-{ending}.elf")
    }

    /// The instructions, or those that halt for good.
    fn put(self, life: Life, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match (life, self) {
            (Life::Once, Self::DebugExit) => {
                a.xor(eax, eax)?;
                a.out(0xf4, al)
            }
            (Life::Once, Self::SleepControl) => {
                a.mov(dx, 0x600)?;
                a.mov(al, 0x34)?;
                a.out(dx, al)
            }
            (Life::Once, Self::Reset) => {
                a.mov(al, 0xfe)?;
                a.out(0x64, al)
            }
            (Life::Idle, _) => {
                // No interrupt will come.
                a.cli()?;
                a.hlt()
            }
        }
    }
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
        ending.put(life, &mut a)?;
        a.assemble(elf::LOAD)
    };
    code().map(|code| elf::pvh_kernel(&code)).map_err(|error| format!("assemble the guest: {error}"))
}

/// The same for a machine that is saved: it writes to `touched` MiB from 16 MiB on, but for the first page, where it is itself, says
/// [`BARE_HELD`], and spins until somebody has let it go in the saved memory (`restored::hold`).
///
/// # Errors
/// None that a user can cause.
pub fn bare_metal_held(life: Life, ending: Ending, touched: u32) -> Result<Vec<u8>, String> {
    let code = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        let [mut touch, mut look] = [(); 2].map(|()| a.create_label());
        // Behind the code, in its page.
        let (start, word) = (elf::LOAD as u32, elf::LOAD + 2048);
        for (part, at) in hold::HELD.chunks_exact(4).zip((word..).step_by(4)) {
            a.mov(dword_ptr(at), i32::from_le_bytes([part[0], part[1], part[2], part[3]]))?;
        }
        a.mov(edi, start + 4096)?;
        a.set_label(&mut touch)?;
        a.mov(dword_ptr(edi), edi)?;
        a.add(edi, 4096)?;
        a.cmp(edi, (start + (touched << 20)) as i32)?;
        a.jb(touch)?;
        a.mov(dx, COM1)?;
        a.mov(al, u32::from(BARE_HELD))?;
        a.out(dx, al)?;
        a.set_label(&mut look)?;
        a.pause()?;
        a.cmp(byte_ptr(word + hold::LAST as u64), i32::from(hold::HELD[hold::LAST]))?;
        a.je(look)?;
        a.mov(al, u32::from(BARE_MARKER))?;
        a.out(dx, al)?;
        ending.put(life, &mut a)?;
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
    /// The same, and /dev/console, without which a kernel gives its first program no output, and /dev/port.
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
        add("dev/port", Entry::CharDevice { mode: 0o600, major: 1, minor: 4 })?;
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
    fn a_held_one_says_so_and_stays() {
        use std::io::Read;
        let (_folder, init) = program();
        let mut child = Command::new(&init).arg("held-wait").stdout(Stdio::piped()).spawn().unwrap();
        let mut said = vec![0; HELD.len() + 1];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        let mut more = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut more).unwrap();
        child.wait().unwrap();
        assert_eq!((said.trim_ascii_end(), ended, more), (HELD, None, Vec::new()));
    }

    #[test]
    fn what_is_held_has_its_word_in_one_place() {
        assert_eq!(hold::places(&image().unwrap()).len(), 1);
        // It writes the word itself, and has room for it.
        let guest = bare_metal_held(Life::Once, Ending::Reset, 1).unwrap();
        assert!(guest.len() < 2048 && hold::places(&guest).is_empty(), "{}", guest.len());
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
