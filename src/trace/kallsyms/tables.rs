//! The tables behind /proc/kallsyms, from the one of them that is easy to find: `kallsyms_token_index`.
//!
//! Names are compressed: each byte stands for one of 256 tokens. Before Linux 6.4 the tables stand in the order offsets,
//! relative_base, num_syms, names, markers, (6.1.y, 6.2, 6.3: seqs_of_names,) token_table, token_index; since then offsets and
//! relative_base come last, and seqs_of_names behind them. Each begins at a multiple of 8.

use super::{Budget, IMAGE, Space, Symbol};

/// Tokens.
const TOKENS: usize = 256;
/// A marker for so many names.
const STRIDE: usize = 256;
/// Symbols at least and at most: a kernel has tens or hundreds of thousands.
const FEW: usize = 100;
const SYMBOLS: usize = 1 << 20;
/// Numbers that are tried as that of the symbols.
const TRIES: usize = 1000;
/// Bytes of a name at most: KSYM_NAME_LEN is 512.
const NAME: usize = 1024;
/// Bytes of all names, markers and sequence numbers at most.
const NAMES: usize = 16 << 20;
/// Bytes of a token at most.
const TOKEN: usize = 256;

/// Whether these may be the first four numbers of the index: offsets of short strings that follow each other.
pub fn may_begin_index(word: [u8; 8]) -> bool {
    let numbers = word.as_chunks::<2>().0;
    let number = |at: usize| u16::from_le_bytes(numbers[at]);
    number(0) == 0 && (1..4).all(|at| number(at) > number(at - 1) && number(at) - number(at - 1) < 64)
}

/// The symbols of the tables whose index is at `index`.
pub fn read(space: &Space<'_>, index: u64) -> Option<Vec<Symbol>> {
    let bytes = space.budget().bytes();
    let before = bytes.get();
    // No more of them than the guest has memory for, as far as that goes: their names are packed.
    bytes.set(before.min(space.size().saturating_mul(4)));
    let symbols = symbols(space, index);
    if symbols.is_none() {
        bytes.set(before);
    }
    symbols
}

fn symbols(space: &Space<'_>, index: u64) -> Option<Vec<Symbol>> {
    let (table, tokens) = tokens(space, index)?;
    let (head, names) = names(space, table, &tokens)?;
    let count = names.len() as u64;
    let before = head.checked_sub(8)?;
    let after = index.checked_add(2 * TOKENS as u64)?;
    let size = (4 * count).next_multiple_of(8);
    // Up to 6.3, and since 6.4: where the offsets are, and where the base is.
    let orders = [(before.checked_sub(size), before), (Some(after), after.checked_add(size)?)];
    let found = orders.into_iter().find_map(|(offsets, base)| {
        space.budget().goes_on(WAYS.len() * 8 * names.len()).then_some(())?;
        let offsets = words(space, offsets?, names.len())?;
        let mut bytes = [0; 8];
        let base = if space.read(base, &mut bytes) { u64::from_le_bytes(bytes) } else { 0 };
        WAYS.into_iter().map(|way| way(&offsets, base, after)).find(|addresses| plausible(addresses, &names))
    })?;
    let symbol = |(address, (kind, name))| Symbol { address, kind, name };
    Some(found.into_iter().zip(names).map(symbol).collect())
}

/// How offsets become addresses: what is not negative is absolute (CONFIG_KALLSYMS_ABSOLUTE_PERCPU, up to 6.14), all are above
/// the base, or each is as far from its own place.
type Way = fn(&[u32], u64, u64) -> Vec<u64>;
const WAYS: [Way; 3] = [
    |offsets, base, _| {
        let one = |offset: &u32| match offset.cast_signed() {
            absolute @ 0.. => absolute as u64,
            below => base.wrapping_sub(1).wrapping_sub(i64::from(below).cast_unsigned()),
        };
        offsets.iter().map(one).collect()
    },
    |offsets, base, _| offsets.iter().map(|offset| base.wrapping_add((*offset).into())).collect(),
    |offsets, _, place| {
        let one = |(offset, place): (&u32, u64)| {
            place.wrapping_add(i64::from(offset.cast_signed()).cast_unsigned())
        };
        offsets.iter().zip((place..).step_by(4)).map(one).collect()
    },
];

/// Whether functions lie in the kernel's image, in order.
fn plausible(addresses: &[u64], names: &[(char, String)]) -> bool {
    let code = addresses.iter().zip(names).filter(|(_, (kind, _))| matches!(kind, 't' | 'T'));
    let (mut count, mut inside, mut ordered, mut last) = (0, 0, 0, 0);
    for (address, _) in code {
        count += 1;
        inside += usize::from(IMAGE.contains(address));
        ordered += usize::from(*address >= last);
        last = *address;
    }
    count > 0 && inside * 10 >= count * 9 && ordered * 10 >= count * 9
}

/// Where the table of tokens is that the index at `index` belongs to, and the tokens.
fn tokens(space: &Space<'_>, index: u64) -> Option<(u64, Vec<Vec<u8>>)> {
    let mut bytes = [0; 2 * TOKENS];
    if !space.read(index, &mut bytes) {
        return None;
    }
    let offsets: Vec<_> =
        bytes.as_chunks::<2>().0.iter().map(|pair| usize::from(u16::from_le_bytes(*pair))).collect();
    if offsets[0] != 0 || !offsets.windows(2).all(|pair| pair[0] < pair[1]) {
        return None;
    }
    let last = *offsets.last()?;
    let mut before = vec![0; (last + TOKEN).next_multiple_of(8)];
    let first = index.checked_sub(before.len() as u64)?;
    // The first of them may not be mapped where a section begins: then as much as there is.
    space.budget().goes_on(16 * before.len()).then_some(())?;
    let skip =
        (0..before.len()).step_by(8).find(|skip| space.read(first + *skip as u64, &mut before[*skip..]))?;
    let string = |at: usize| before.get(at..)?.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
    let fits = |start: usize| {
        let ends = |offset: &usize| before.get(start + offset - 1) == Some(&0);
        let digit =
            |digit: u8| string(start + offsets[usize::from(digit)]).is_some_and(|text| text == [digit]);
        let end = start + last + string(start + last)?.len() + 1;
        (offsets[1..].iter().all(ends) && (b'0'..=b'9').all(digit) && end.next_multiple_of(8) == before.len())
            .then_some(start)
    };
    let start = (skip..before.len().saturating_sub(last)).step_by(8).rev().find_map(fits)?;
    let tokens = offsets.iter().map(|offset| string(start + offset)).collect::<Option<_>>()?;
    Some((first + start as u64, tokens))
}

/// Where the number of symbols stands, and the type and name of each: the last tables before that of the tokens.
fn names(space: &Space<'_>, table: u64, tokens: &[Vec<u8>]) -> Option<(u64, Vec<(char, String)>)> {
    // What stands there is small as a rule.
    [4 << 20, NAMES].into_iter().find_map(|most| {
        let bytes = before(space, table, most.min(space.size()));
        // Each of its numbers is looked at.
        space.budget().goes_on(bytes.len() / 4).then_some(())?;
        let mut tries = TRIES;
        let numbers = bytes.as_chunks::<8>().0.iter().enumerate().rev();
        for (at, number) in numbers {
            let count = usize::try_from(u64::from_le_bytes(*number)).unwrap_or(0);
            let rest = &bytes[8 * at + 8..];
            if !(FEW..=SYMBOLS).contains(&count) || count * 2 > rest.len() {
                continue;
            }
            tries = usize::checked_sub(tries, 1)?;
            if let Some(starts) = starts(rest, count, space.budget()) {
                let mut space_for_one = Vec::with_capacity(NAME);
                let kept = |at| {
                    let (kind, name) = expand(rest, at, tokens, &mut space_for_one)?;
                    let size = size_of::<Symbol>() + name.capacity();
                    (space.budget().goes_on(2 * size) && space.budget().keep(size)).then_some((kind, name))
                };
                let names = starts.into_iter().map(kept).collect::<Option<_>>()?;
                return Some((table - bytes.len() as u64 + 8 * at as u64, names));
            }
        }
        None
    })
}

/// Up to `most` bytes before `end`, as far as there is memory; a multiple of 8.
fn before(space: &Space<'_>, end: u64, most: usize) -> Vec<u8> {
    const PAGE: u64 = 0x1000;
    let mut bytes = vec![0; most.next_multiple_of(PAGE as usize)];
    // It is filled from its end.
    let mut free = bytes.len();
    let mut first = end;
    while let Some(page) = first.checked_sub(1).map(|last| last & !(PAGE - 1)) {
        let Some(start) = free.checked_sub((first - page) as usize) else { break };
        if !space.read(page, &mut bytes[start..free]) {
            break;
        }
        (free, first) = (start, page);
    }
    bytes.drain(..free);
    bytes
}

/// Where each of `count` names begins in `bytes`, if what follows them are their markers (the offset of every 256th name),
/// perhaps sequence numbers of 3 bytes for each (6.1.y, 6.2, 6.3), and nothing else.
fn starts(bytes: &[u8], count: usize, budget: &Budget<'_>) -> Option<Vec<usize>> {
    let mut starts = Vec::new();
    let mut at = 0;
    for number in 0..count {
        if number % STRIDE == 0 && !budget.goes_on(2 * STRIDE) {
            return None;
        }
        starts.push(at);
        at += length(bytes, at).map(|(head, len)| head + len)?;
    }
    let markers = bytes.get(at.next_multiple_of(8)..)?;
    let marked = starts.iter().step_by(STRIDE);
    let (size, sequences) = ((4 * marked.len()).next_multiple_of(8), (3 * count).next_multiple_of(8));
    let read = markers.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word) as usize);
    let end = markers.len() == size || markers.len() == size + sequences;
    (end && read.take(marked.len()).eq(marked.copied())).then_some(starts)
}

/// Bytes of the length of the compressed name at `at`, and the length.
fn length(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    match usize::from(*bytes.get(at)?) {
        len @ ..0x80 => Some((1, len)),
        low => Some((2, low & 0x7f | usize::from(*bytes.get(at + 1)?) << 7)),
    }
}

/// The type and the name at `at`; put together in `whole`.
fn expand(bytes: &[u8], at: usize, tokens: &[Vec<u8>], whole: &mut Vec<u8>) -> Option<(char, String)> {
    let (head, len) = length(bytes, at)?;
    whole.clear();
    for token in bytes.get(at + head..at + head + len)? {
        whole.extend_from_slice(tokens.get(usize::from(*token))?);
        if whole.len() > NAME {
            return None;
        }
    }
    let (kind, name) = whole.split_first()?;
    let name = std::str::from_utf8(name).ok()?;
    kind.is_ascii_alphabetic().then(|| (char::from(*kind), name.to_owned()))
}

fn words(space: &Space<'_>, at: u64, count: usize) -> Option<Vec<u32>> {
    let mut bytes = vec![0; 4 * count];
    let read = space.read(at, &mut bytes);
    read.then(|| bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}
