//! The guests that are debugged, and `vmm` that waits for gdb with one of them.

use std::process::{Child, Command, Output};

use iced_x86::code_asm::*;
use vmm_bench::elf::LOAD;

use crate::images::{kernel, pvh_kernel};
use crate::place::*;

/// Assembles code of `bits` bits to lie at `address`.
pub fn assemble(
    bits: u32,
    address: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut code = CodeAssembler::new(bits).unwrap();
    write(&mut code).unwrap();
    code.assemble(address).unwrap()
}

/// Protected mode to long mode, by page tables of its own; then a loop; status 2.
pub fn up() -> Vec<u8> {
    const TABLES: u32 = 0x110_0000;
    let mut code = assemble(32, LOAD, |a| {
        // The 2 MiB that the GDT lies in and those of the code, mapped to themselves.
        a.mov(dword_ptr(TABLES), (TABLES + 0x1000) as i32 | 3)?;
        a.mov(dword_ptr(TABLES + 0x1000), (TABLES + 0x2000) as i32 | 3)?;
        a.mov(dword_ptr(TABLES + 0x2000), 0x83)?;
        a.mov(dword_ptr(TABLES + 0x2000 + 8 * 8), LOAD as i32 | 0x83)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as i32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.bts(eax, 8)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.bts(eax, 31)?;
        a.mov(cr0, eax)
    });
    let long = LOAD as u32 + code.len() as u32 + 7;
    code.extend([&[0xea][..], &long.to_le_bytes(), &[0x10, 0]].concat());
    code.extend(assemble(64, u64::from(long), |a| {
        let (mut text, mut again) = (a.create_label(), a.create_label());
        a.lea(rsi, ptr(text))?;
        a.mov(ecx, 5)?;
        a.mov(dx, 0x3f8)?;
        a.rep().outsb()?;
        a.xor(eax, eax)?;
        a.mov(r8, 0x0123_4567_89ab_cdefu64)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut again)?;
        a.add(rax, r8)?;
        a.ror(r8, 1)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(dx, 0xf4)?;
        a.mov(al, 2)?;
        a.out(dx, al)?;
        a.hlt()?;
        a.set_label(&mut text)?;
        a.db(b"hello")
    }));
    pvh_kernel(&code)
}

/// Protected mode to real mode, by a GDT of its own with 16-bit code; status 3.
pub fn down() -> Vec<u8> {
    const LOW: u32 = 0x8000;
    // mov eax, cr0; and al, 0xfe; mov cr0, eax; jmp 0:0x800d; mov dx, 0xf4; mov al, 3; out dx, al; hlt
    let low: [u8; 20] = [
        0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22, 0xc0, 0xea, 0x0d, 0x80, 0, 0, 0xba, 0xf4, 0, 0xb0, 3, 0xee,
        0xf4,
    ];
    pvh_kernel(&assemble(32, LOAD, |a| {
        // Behind five instructions of ten bytes and two of seven.
        const GDTR: u32 = LOAD as u32 + 64;
        for (n, word) in low.chunks(4).enumerate() {
            let word = i32::from_le_bytes(word.try_into().unwrap());
            a.mov(dword_ptr(LOW + 4 * n as u32), word)?;
        }
        a.lgdt(fword_ptr(GDTR))?;
        a.db(&[0xea, 0, 0x80, 0, 0, 8, 0])?;
        a.dw(&[15])?;
        a.dd(&[GDTR + 6])?;
        a.dq(&[0, 0x0000_9b00_0000_ffff])
    }))
}

/// Says 'x' on the serial port, then counts in RAX and at [`COUNT`], for ever.
pub fn counter() -> Vec<u8> {
    kernel(&assemble(64, LOAD, |a| {
        let mut again = a.create_label();
        a.mov(dx, 0x3f8)?;
        a.mov(al, b'x' as i32)?;
        a.out(dx, al)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(rax)?;
        a.mov(qword_ptr(COUNT), rax)?;
        a.jmp(again)
    }))
}

/// Where [`counter`] starts counting.
pub const LOOP: u64 = LOAD + 9;
/// Where it counts.
pub const COUNT: u64 = 0x110_0000;

/// `vmm` with `arguments`, waiting for gdb at the unix socket `gdb` in `place`.
pub fn start(place: &Place, arguments: &str) -> Running {
    let socket = place.path("gdb").display().to_string();
    let command = format!("--gdb unix:{socket} --console off --serial file=out --debug-exit {arguments}");
    let running = Running::new(place.command(&command));
    until("the socket", || is_listening(&socket));
    running
}

pub fn signal_child(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Whether somebody listens at the unix socket `path`: its file is there a moment earlier.
fn is_listening(path: &str) -> bool {
    const ACCEPTCON: &str = "00010000";
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let is_ours = |line: &&str| line.split_whitespace().nth(7) == Some(path);
    sockets.lines().filter(is_ours).any(|line| line.split_whitespace().nth(3) == Some(ACCEPTCON))
}

/// gdb in batch mode, connected to `target`, with `commands`.
pub fn gdb(place: &Place, target: &str, commands: &[&str]) -> Command {
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]);
    gdb.arg("-ex").arg(format!("target remote {target}"));
    commands.iter().for_each(|command| _ = gdb.args(["-ex", command]));
    place.set_up(&mut gdb);
    gdb
}

/// What it says; it must end by itself.
pub fn ask(place: &Place, commands: &[&str]) -> String {
    said(finish(gdb(place, "gdb", commands).spawn().expect("gdb is there: make tools")))
}

pub fn said(output: Output) -> String {
    text(&output.stdout) + &text(&output.stderr)
}
