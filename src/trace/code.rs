//! Instructions as text: those that exits came from.

use std::collections::HashMap;

use iced_x86::{
    Code as Opcode, Decoder, DecoderOptions, Formatter, Instruction, InstructionInfoFactory, NasmFormatter,
    OpAccess,
};

use super::file::Trace;
use vmm_monitor::recorder::{Event, Kind};

/// Longest x86 instruction (SDM vol. 2, 2.3.11), and so the bytes in a [`Kind::Code`] event.
const MAX: u64 = 15;

/// The code that a trace has the bytes of, by its address.
#[derive(Debug, Default)]
pub struct Code {
    bytes: HashMap<u64, (u32, Vec<u8>)>,
}

impl Code {
    /// Of all [`Kind::Code`] events.
    pub fn of(trace: &Trace) -> Self {
        let codes =
            trace.events.iter().map(|(_, event)| event).filter(|event| event.kind() == Some(Kind::Code));
        Self { bytes: codes.map(|event| (event.rip, (bits(event), bytes(event)))).collect() }
    }

    /// All code by its address: 15 bytes or fewer at each.
    pub fn all(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.bytes.iter().map(|(address, (_, bytes))| (*address, bytes.as_slice()))
    }

    /// The size of the code at `address`: 16, 32 or 64 bits.
    pub fn size(&self, address: u64) -> Option<u32> {
        let near = (0..MAX).find_map(|back| self.bytes.get(&address.wrapping_sub(back)));
        near.map(|(bits, _)| *bits)
    }

    /// Where the instruction is that `event` came from, and the instruction in Intel's syntax, where the trace has its code.
    ///
    /// RIP is at the instruction as a rule; but KVM's emulator finishes one that writes before it leaves the guest, and RIP is
    /// behind it: always after a write to memory, unless that is one step of a string. The code before RIP is then read
    /// forwards from each byte: the beginnings that lead to RIP soon agree, and what most of them end with is taken, if it makes
    /// just such an access.
    pub fn instruction(&self, event: &Event) -> (u64, Option<String>) {
        let at = self.decode(event.rip, 0);
        let behind = event.kind() == Some(Kind::MmioWrite);
        let is_it = |instruction: &Instruction| {
            fits(instruction, event) && (!behind || instruction.is_string_instruction())
        };
        if at.as_ref().is_some_and(is_it) {
            return (event.rip, at.map(|instruction| text(&instruction)));
        }
        let start = event.rip.wrapping_sub(MAX);
        let mut votes: Vec<(usize, Instruction)> = Vec::new();
        for last in (0..MAX as usize).filter_map(|skip| self.last_before(event.rip, start, skip)) {
            match votes.iter_mut().find(|(_, known)| known.ip() == last.ip()) {
                Some((count, _)) => *count += 1,
                None if fits(&last, event) => votes.push((1, last)),
                None => {}
            }
        }
        match votes.into_iter().max_by_key(|(count, _)| *count) {
            Some((_, instruction)) => (instruction.ip(), Some(text(&instruction))),
            None => (event.rip, at.filter(|at| fits(at, event)).map(|at| text(&at))),
        }
    }

    /// The instruction that ends at `rip` for who reads forwards from `skip` bytes behind `start`.
    fn last_before(&self, rip: u64, start: u64, skip: usize) -> Option<Instruction> {
        let mut at = skip;
        while at < MAX as usize {
            let instruction = self.decode(start, at)?;
            at += instruction.len();
            if instruction.next_ip() == rip {
                return Some(instruction);
            }
        }
        None
    }

    /// The instruction `skip` bytes into the code recorded for `start`.
    fn decode(&self, start: u64, skip: usize) -> Option<Instruction> {
        let (bits, bytes) = self.bytes.get(&start)?;
        let bytes = bytes.get(skip..).filter(|bytes| !bytes.is_empty())?;
        let mut decoder =
            Decoder::with_ip(*bits, bytes, start.wrapping_add(skip as u64), DecoderOptions::NONE);
        Some(decoder.decode()).filter(|instruction| !instruction.is_invalid())
    }
}

/// Whether `instruction` makes an access like that of `event`.
fn fits(instruction: &Instruction, event: &Event) -> bool {
    let size = usize::from(event.size);
    let memory = |wanted: &[OpAccess]| {
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(instruction).used_memory();
        used.iter().any(|used| wanted.contains(&used.access()) && used.memory_size().size() == size)
    };
    match event.kind() {
        Some(Kind::PioOut) => match instruction.code() {
            Opcode::Out_DX_AL | Opcode::Out_imm8_AL | Opcode::Outsb_DX_m8 => size == 1,
            Opcode::Out_DX_AX | Opcode::Out_imm8_AX | Opcode::Outsw_DX_m16 => size == 2,
            Opcode::Out_DX_EAX | Opcode::Out_imm8_EAX | Opcode::Outsd_DX_m32 => size == 4,
            _ => false,
        },
        Some(Kind::MsrWrite) => instruction.code() == Opcode::Wrmsr,
        Some(Kind::MmioWrite) => {
            memory(&[OpAccess::Write, OpAccess::ReadWrite, OpAccess::CondWrite, OpAccess::ReadCondWrite])
        }
        _ => true,
    }
}

/// In Intel's syntax.
pub fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    let mut formatter = NasmFormatter::new();
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.options_mut().set_uppercase_hex(false);
    formatter.format(instruction, &mut text);
    text
}

/// The bytes in a [`Kind::Code`] event.
pub(super) fn bytes(event: &Event) -> Vec<u8> {
    let mut bytes = [event.address.to_le_bytes(), event.value.to_le_bytes()].concat();
    bytes.truncate(event.count.into());
    bytes
}

fn bits(event: &Event) -> u32 {
    match event.size {
        16 => 16,
        32 => 32,
        _ => 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(address: u64, bits: u8, bytes: &[u8]) -> (u32, Event) {
        let mut all = [0; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| all[at + i]));
        let (kind, count) = (Kind::Code as u8, bytes.len() as u8);
        (
            0,
            Event {
                rip: address,
                address: half(0),
                value: half(8),
                kind,
                size: bits,
                count,
                ..Event::default()
            },
        )
    }

    fn event(kind: Kind, rip: u64, size: u8) -> Event {
        Event { kind: kind as u8, rip, size, count: 1, ..Event::default() }
    }

    #[test]
    fn an_instruction_is_found_at_rip_or_before_it() {
        // nops; mov dx, 0x3f8 (32-bit code); out dx, al; then mov [r13+0x50], eax (64-bit), whose REX prefix counts.
        let before = [&[0x90; 8][..], &[0x66, 0xba, 0xf8, 0x03, 0xee]].concat();
        let mut before15 = vec![0x90; 2];
        before15.extend(&before);
        let write = [&[0x90; 11][..], &[0x41, 0x89, 0x45, 0x50]].concat();
        // Two stores alike, one after the other: mov dword [esi+0x70], 3; mov dword [esi+0x24], 1.
        let stores = [&[0x90; 8][..], &[0xc7, 0x46, 0x70, 3, 0, 0, 0]].concat();
        let mut trace = Trace::default();
        trace.events = vec![
            code(0x1000 - 15, 32, &before15),
            code(0x1000, 32, &[0xf4]),
            code(0x2000 - 15, 64, &write),
            code(0x2000, 64, &[0xc3]),
            code(0x3000, 64, &[0xec]),
            code(0x4000, 64, &[0xee]),
            code(0x6000 - 15, 32, &stores),
            // WRMSR that is done, and one that is not.
            code(0x7000 - 15, 64, &[[0x90; 13].as_slice(), &[0x0f, 0x30]].concat()),
            code(0x7000, 64, &[0xc3]),
            code(0x8000, 64, &[0x0f, 0x30]),
            code(0x6000, 32, &[0xc7, 0x46, 0x24, 1, 0, 0, 0]),
        ];
        let code = Code::of(&trace);
        let tell = |kind, rip, size| code.instruction(&event(kind, rip, size));
        assert_eq!(tell(Kind::PioOut, 0x1000, 1), (0xfff, Some("out dx,al".to_owned())));
        assert_eq!(tell(Kind::MmioWrite, 0x2000, 4), (0x1ffc, Some("mov [r13+0x50],eax".to_owned())));
        assert_eq!(tell(Kind::PioIn, 0x3000, 1), (0x3000, Some("in al,dx".to_owned())));
        assert_eq!(tell(Kind::PioOut, 0x4000, 1), (0x4000, Some("out dx,al".to_owned())));
        assert_eq!(tell(Kind::PioOut, 0x5000, 1), (0x5000, None));
        assert_eq!(tell(Kind::MsrWrite, 0x7000, 8), (0x6ffe, Some("wrmsr".to_owned())));
        assert_eq!(tell(Kind::MsrWrite, 0x8000, 8), (0x8000, Some("wrmsr".to_owned())));
        let store = (0x5ff9, Some("mov dword [esi+0x70],3".to_owned()));
        assert_eq!(tell(Kind::MmioWrite, 0x6000, 4), store);
    }
}
