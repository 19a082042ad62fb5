//! The functions of the modules that are loaded: from the kernel's list of modules, each with the symbols of its ELF file.
//!
//! `struct module` and `struct mod_kallsyms` (include/linux/module.h) differ from kernel to kernel; where their members are
//! is told by the kernel's own type information. All of it is the guest's: each number has a bound here.

use super::{Space, Symbol, btf};

/// Modules at most; a distribution's kernel loads a hundred.
const MODULES: usize = 1024;
/// Symbols of one module, and of all, at most.
const SYMBOLS: u32 = 64 << 10;
const ALL: usize = 512 << 10;
/// Bytes of type information at most.
const BTF: u64 = 64 << 20;
/// Bytes of a name at most: KSYM_NAME_LEN.
const NAME: usize = 512;
/// Bytes of an `Elf64_Sym`.
const ENTRY: usize = 24;
const STT_FUNC: u8 = 2;

/// The name that ends a stretch of functions: what is behind it belongs to none of those before.
pub const END: &str = "-";

/// The functions of the modules of the kernel that has `symbols`; none if it does not tell how its modules look.
pub fn functions(space: &Space<'_>, symbols: &[Symbol]) -> Vec<Symbol> {
    list(space, symbols).unwrap_or_default()
}

fn list(space: &Space<'_>, symbols: &[Symbol]) -> Option<Vec<Symbol>> {
    let address = |name: &str| Some(symbols.iter().find(|symbol| symbol.name == name)?.address);
    let (head, start, stop) = (address("modules")?, address("__start_BTF")?, address("__stop_BTF")?);
    let len = stop.checked_sub(start).filter(|len| *len <= BTF && *len <= space.size() as u64)?;
    let mut types = vec![0; usize::try_from(len).ok()?];
    if !space.read(start, &mut types) {
        return None;
    }
    let [link, table] = btf::offsets(&types, "module", ["list", "kallsyms"])?;
    let table_members = btf::offsets(&types, "mod_kallsyms", ["symtab", "num_symtab", "strtab"])?;
    let mut found = Vec::new();
    let mut at = word(space, head)?;
    for _ in 0..MODULES {
        if at == head || found.len() > ALL {
            break;
        }
        let module = at.wrapping_sub(link);
        // One that is just being loaded has none yet.
        if let Some(table) = word(space, module.wrapping_add(table)) {
            of_module(space, table_members.map(|member| table.wrapping_add(member)), &mut found);
        }
        let Some(next) = word(space, at) else { break };
        at = next;
    }
    Some(found)
}

/// Adds the functions of the table whose members are at these addresses, and where they end.
fn of_module(space: &Space<'_>, [symbols, count, strings]: [u64; 3], found: &mut Vec<Symbol>) -> Option<()> {
    let (symbols, strings) = (word(space, symbols)?, word(space, strings)?);
    let count = (word(space, count)? as u32).min(SYMBOLS) as usize;
    let mut table = vec![0; count * ENTRY];
    if !space.read(symbols, &mut table) {
        return None;
    }
    let mut end = 0;
    for entry in table.as_chunks::<ENTRY>().0 {
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| entry[at + byte]));
        let (name, kind, [address, size]) = (number(0) as u32, entry[4] & 0xf, [8, 16].map(number));
        if kind != STT_FUNC || address == 0 {
            continue;
        }
        let Some(name) = string(space, strings.wrapping_add(name.into())) else { continue };
        if !space.budget().keep(size_of::<Symbol>() + name.capacity()) {
            break;
        }
        end = end.max(address.wrapping_add(size));
        found.push(Symbol { address, kind: 't', name });
    }
    found.push(Symbol { address: end, kind: 't', name: END.to_owned() });
    Some(())
}

fn word(space: &Space<'_>, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    space.read(at, &mut bytes).then(|| u64::from_le_bytes(bytes))
}

/// A name that fits on a line with others.
fn string(space: &Space<'_>, at: u64) -> Option<String> {
    const STEP: usize = 32;
    let mut name = Vec::new();
    while name.len() < NAME {
        // Not beyond the page: what follows it need not be there.
        let place = at.checked_add(name.len() as u64)?;
        let mut bytes = [0; STEP];
        let bytes = &mut bytes[..STEP.min(4096 - (place % 4096) as usize)];
        if !space.read(place, bytes) {
            return None;
        }
        let end = bytes.iter().position(|byte| *byte == 0);
        name.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
        if end.is_some() {
            let name = String::from_utf8(name).ok()?;
            return (!name.is_empty() && name.chars().all(|c| c.is_ascii_graphic())).then_some(name);
        }
    }
    None
}
