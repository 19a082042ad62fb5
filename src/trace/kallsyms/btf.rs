//! Where a kernel has the members of its structures, by the type information that it carries (CONFIG_DEBUG_INFO_BTF).
//!
//! Format: Documentation/bpf/btf.rst. The bytes are the guest's: all is checked, and one pass over them is enough.

const MAGIC: u16 = 0xeb9f;
/// Bytes of `struct btf_type`.
const TYPE: usize = 12;
const STRUCT: u32 = 4;

/// Byte offsets of `members` of `structure`, in their order; none if there is no structure of that name that has them all.
pub fn offsets<const N: usize>(btf: &[u8], structure: &str, members: [&str; N]) -> Option<[u64; N]> {
    let number = |at: usize| Some(u32::from_le_bytes(*btf.get(at..)?.first_chunk()?));
    if u16::from_le_bytes(*btf.first_chunk()?) != MAGIC {
        return None;
    }
    let section = |at: usize| {
        let start = (number(4)? as usize).checked_add(number(at)? as usize)?;
        btf.get(start..start.checked_add(number(at + 4)? as usize)?)
    };
    let (mut types, strings) = (section(8)?, section(16)?);
    let is_called = |name: u32, wanted: &str| {
        let rest = strings.get(name as usize..).and_then(|rest| rest.strip_prefix(wanted.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    };
    while let Some((head, rest)) = types.split_at_checked(TYPE) {
        let (words, _) = head.as_chunks::<4>();
        let [name, info] = [0, 1].map(|at| u32::from_le_bytes(words[at]));
        let (count, kind) = ((info & 0xffff) as usize, info >> 24 & 0x1f);
        let (own, after) = rest.split_at_checked(size(kind, count)?)?;
        if kind == STRUCT && is_called(name, structure) {
            let (own, _) = own.as_chunks::<12>();
            let place = |wanted: &str| {
                let member = own.iter().find(|member| is_called(word(member, 0), wanted))?;
                // With the flag the upper byte is the width of a bit field.
                let bits = if info >> 31 == 1 { word(member, 2) & 0xff_ffff } else { word(member, 2) };
                Some(u64::from(bits / 8))
            };
            let places = members.map(place);
            if places.iter().all(Option::is_some) {
                return Some(places.map(Option::unwrap_or_default));
            }
        }
        types = after;
    }
    None
}

fn word(member: &[u8; 12], at: usize) -> u32 {
    u32::from_le_bytes(member.as_chunks::<4>().0[at])
}

/// Bytes that follow a type of this kind.
fn size(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // ARRAY
        3 => 12,
        // ENUM, FUNC_PROTO
        6 | 13 => 8 * count,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => 12 * count,
        _ => return None,
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Type information with a pointer, an enumeration, and `structures` with their members and those's places in bytes.
    pub fn btf(structures: &[(&str, &[(&str, u32)])]) -> Vec<u8> {
        let (mut types, mut strings) = (Vec::new(), vec![0]);
        let mut name = |name: &str| {
            let at = strings.len() as u32;
            strings.extend(name.as_bytes());
            strings.push(0);
            at
        };
        let mut put = |words: &[u32]| words.iter().for_each(|word| types.extend(word.to_le_bytes()));
        put(&[0, 2 << 24, 1]);
        put(&[0, 6 << 24 | 1, 4, 0, 7]);
        for (structure, members) in structures {
            put(&[name(structure), 1 << 31 | STRUCT << 24 | members.len() as u32, 0]);
            members.iter().for_each(|(member, at)| put(&[name(member), 1, at * 8]));
        }
        let mut btf = Vec::new();
        btf.extend(MAGIC.to_le_bytes());
        btf.extend([1, 0]);
        let (types_len, strings_len) = (types.len() as u32, strings.len() as u32);
        for word in [24, 0, types_len, types_len, strings_len] {
            btf.extend(u32::to_le_bytes(word));
        }
        btf.extend(types);
        btf.extend(strings);
        btf
    }

    #[test]
    fn members_are_where_the_types_say() {
        let btf =
            btf(&[("mod", &[("name", 8)]), ("module", &[("list", 8), ("name", 24), ("kallsyms", 0x200)])]);
        assert_eq!(offsets(&btf, "module", ["name", "kallsyms"]), Some([24, 0x200]));
        assert_eq!(offsets(&btf, "module", ["nam"]), None);
        assert_eq!(offsets(&btf, "modul", ["name"]), None);
        // Cut anywhere, and with any byte another: no panic.
        for at in 0..btf.len() {
            let _ = offsets(&btf[..at], "module", ["name", "kallsyms"]);
            let mut other = btf.clone();
            other[at] ^= 0xff;
            let _ = offsets(&other, "module", ["name", "kallsyms"]);
        }
    }
}
