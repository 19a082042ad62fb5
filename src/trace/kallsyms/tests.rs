//! Tables made as the kernel's build makes them, in guest memory behind page tables; and what is no table.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use vmm_monitor::memory::Memory;

/// Where the kernel is in the guest, and in its RAM.
const KERNEL: u64 = 0xffff_ffff_a540_0000;
const PHYSICAL: u64 = 0x40_0000;
/// Page tables: one of each level, and then those of the lowest.
const ROOT: u64 = 0x1000;

/// RAM in which `image` is mapped at [`KERNEL`], by small pages.
fn ram(image: &[u8]) -> Arc<GuestRam> {
    let ram = Memory::new(&"16M".parse().unwrap()).unwrap().ram().clone();
    let entry = |at: u64, entry: u64| ram.write_obj(entry | 3, GuestAddress(at)).unwrap();
    let index = |level: u32| (KERNEL >> (12 + 9 * level) & 0x1ff) * 8;
    for level in 1..=3 {
        entry(ROOT * u64::from(4 - level) + index(level), ROOT * u64::from(5 - level));
    }
    for page in 0..image.len().div_ceil(4096) as u64 {
        // More than one lowest table.
        let table = ROOT * (4 + page / 512);
        entry(ROOT * 3 + index(1) + page / 512 * 8, table);
        entry(table + page % 512 * 8, PHYSICAL + page * 4096);
    }
    ram.write_slice(image, GuestAddress(PHYSICAL)).unwrap();
    ram
}

/// Enough for everything.
fn budget() -> Budget<'static> {
    Budget::new(Duration::from_secs(600), &|| false)
}

fn wanted() -> Vec<Symbol> {
    let symbol = |(at, kind): (u64, char)| Symbol {
        address: KERNEL + at * 0x40,
        kind,
        name: format!("function_{at}{}", "_long".repeat(if at == 77 { 40 } else { 0 })),
    };
    let percpu = Symbol { address: 0x1000, kind: 'A', name: "percpu".to_owned() };
    std::iter::once(percpu).chain((0..1000).zip(['T', 't'].into_iter().cycle()).map(symbol)).collect()
}

/// How a kernel of some time has them.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    /// 4.20 to 6.1
    Old,
    /// 6.1.y to 6.3
    OldWithSequences,
    /// 6.4 to 6.14
    New,
    /// Since 6.15
    NewUnsigned,
    Placed,
}

fn image(form: Form) -> Vec<u8> {
    let symbols = wanted();
    let mut image = vec![0x90u8; 0x3000];
    let base = KERNEL;
    let offset = |symbol: &Symbol, place: u64| -> u32 {
        match form {
            Form::Old | Form::OldWithSequences | Form::New if symbol.kind == 'A' => symbol.address as u32,
            Form::Old | Form::OldWithSequences | Form::New => {
                (base.wrapping_sub(1).wrapping_sub(symbol.address)) as u32
            }
            Form::NewUnsigned => symbol.address.wrapping_sub(base) as u32,
            Form::Placed => symbol.address.wrapping_sub(place) as u32,
        }
    };
    let align = |image: &mut Vec<u8>| image.resize(image.len().next_multiple_of(8), 0);
    let offsets = |image: &mut Vec<u8>| {
        for symbol in &symbols {
            let place = KERNEL + image.len() as u64;
            image.extend(offset(symbol, place).to_le_bytes());
        }
        align(image);
        image.extend(base.to_le_bytes());
    };
    let is_old = matches!(form, Form::Old | Form::OldWithSequences);
    if is_old {
        offsets(&mut image);
    }
    image.extend((symbols.len() as u64).to_le_bytes());
    let names = image.len();
    let mut markers = Vec::new();
    for (number, symbol) in symbols.iter().enumerate() {
        if number % 256 == 0 {
            markers.push((image.len() - names) as u32);
        }
        // 0x80 stands for "function_".
        let text = format!("{}{}", symbol.kind, symbol.name);
        let mut packed = text.replace("function_", "\u{80}").chars().map(|c| c as u8).collect::<Vec<_>>();
        match packed.len() {
            len @ ..0x80 => image.push(len as u8),
            len => image.extend([len as u8 | 0x80, (len >> 7) as u8]),
        }
        image.append(&mut packed);
    }
    align(&mut image);
    markers.iter().for_each(|marker| image.extend(marker.to_le_bytes()));
    align(&mut image);
    if form == Form::OldWithSequences {
        (0..symbols.len()).for_each(|number| image.extend(&(number as u32).to_be_bytes()[1..]));
        align(&mut image);
    }
    let table = image.len();
    let mut index = Vec::new();
    for token in 0..=255u8 {
        index.push((image.len() - table) as u16);
        match token {
            0x80 => image.extend(b"function_"),
            // All the others are bytes of their own, or stand for something that no name here has.
            0..0x20 | 0x7f.. => image.extend(b"??"),
            byte => image.push(byte),
        }
        image.push(0);
    }
    align(&mut image);
    index.iter().for_each(|offset| image.extend(offset.to_le_bytes()));
    if !is_old {
        offsets(&mut image);
    }
    image.extend([0x90; 0x1000]);
    image
}

const FORMS: [Form; 5] = [Form::Old, Form::OldWithSequences, Form::New, Form::NewUnsigned, Form::Placed];

#[test]
fn tables_of_each_form_are_found_where_the_kernel_runs() {
    for form in FORMS {
        let ram = ram(&image(form));
        let found =
            find(&Space::new(&ram, ROOT, 0, &budget())).unwrap_or_else(|| panic!("{form:?}: nothing"));
        let relative =
            |symbols: &[Symbol]| symbols.iter().filter(|s| s.kind != 'A').cloned().collect::<Vec<_>>();
        assert_eq!(relative(&found), relative(&wanted()), "{form:?}");
        let list = list(&ram, &[(0xdead_0000, 0), (ROOT, 0)], &budget()).unwrap();
        assert!(list.starts_with("ffffffffa5400000 T function_0\nffffffffa5400040 t function_1\n"));
    }
}

#[test]
fn damaged_tables_are_no_tables_and_nothing_panics() {
    let whole = image(Form::Old);
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    };
    let ram = ram(&whole);
    for _ in 0..60 {
        let mut bad = whole.clone();
        for _ in 0..=random(40) {
            let at = random(bad.len());
            bad[at] = random(256) as u8;
        }
        ram.write_slice(&bad, GuestAddress(PHYSICAL)).unwrap();
        let _ = find(&Space::new(&ram, ROOT, 0, &budget()));
    }
    for (cr3, cr4) in [(0, 0), (u64::MAX, u64::MAX), (ROOT, 1 << 12), (PHYSICAL, 0)] {
        let _ = find(&Space::new(&ram, cr3, cr4, &budget()));
    }
    // Page tables that lead in circles map everything to themselves.
    for level in [0x7, 0x87] {
        let entries: Vec<u8> = (0..512).flat_map(|_| (ROOT | level).to_le_bytes()).collect();
        ram.write_slice(&entries, GuestAddress(ROOT)).unwrap();
        assert_eq!(find(&Space::new(&ram, ROOT, 0, &budget())), None);
    }
}

/// A kernel with a module of two functions (and a variable), and what it says of its structures.
fn with_module() -> (Vec<u8>, Vec<Symbol>) {
    let mut image = vec![0u8; 0x4000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let to = |at: u64| (KERNEL + at).to_le_bytes();
    // The head of the list, the module's link in it, its symbols.
    put(0, &to(0x1008));
    put(0x1008, &to(0));
    put(0x1100, &to(0x2000));
    put(0x2000, &to(0x2100));
    put(0x2008, &4u32.to_le_bytes());
    put(0x2010, &to(0x2400));
    for (at, (name, kind, address)) in
        [(0u32, 0u8, 0u64), (1, 2, 0x100), (7, 1, 0x180), (13, 2, 0x140)].into_iter().enumerate()
    {
        let entry = 0x2100 + at * 24;
        put(entry, &name.to_le_bytes());
        put(entry + 4, &[0x10 | kind]);
        put(entry + 8, &(0xffff_ffff_c020_0000 + address).to_le_bytes());
        put(entry + 16, &0x20u64.to_le_bytes());
    }
    put(0x2400, b"\0first\0datum\0second\0");
    let btf = btf::tests::btf(&[
        ("module", &[("list", 8), ("kallsyms", 0x100)]),
        ("mod_kallsyms", &[("symtab", 0), ("num_symtab", 8), ("strtab", 16)]),
    ]);
    put(0x3000, &btf);
    let symbol = |name: &str, at: u64| Symbol { address: KERNEL + at, kind: 'D', name: name.to_owned() };
    let end = 0x3000 + btf.len() as u64;
    (image, vec![symbol("modules", 0), symbol("__start_BTF", 0x3000), symbol("__stop_BTF", end)])
}

fn of_modules(image: &[u8], symbols: &[Symbol]) -> Vec<(u64, String)> {
    let ram = ram(image);
    let found = modules::functions(&Space::new(&ram, ROOT, 0, &budget()), symbols);
    found.into_iter().map(|symbol| (symbol.address & 0xfff, symbol.name)).collect()
}

#[test]
fn functions_of_modules_are_found_and_where_they_end() {
    let (image, symbols) = with_module();
    let expected =
        [(0x100, "first"), (0x140, "second"), (0x160, END)].map(|(at, name)| (at, name.to_owned()));
    assert_eq!(of_modules(&image, &symbols), expected);
    assert_eq!(of_modules(&image, &symbols[..1]), [], "no type information");
}

#[test]
fn modules_that_a_guest_made_up_come_to_an_end() {
    let (mut image, symbols) = with_module();
    // The list never comes back to its head.
    image[0x1008..0x1010].copy_from_slice(&(KERNEL + 0x1008).to_le_bytes());
    assert_eq!(of_modules(&image, &symbols).len(), 3 * 1024);
    // A table of 4 billion symbols, names that lead nowhere.
    image[0x2008..0x200c].fill(0xff);
    of_modules(&image, &symbols);
    image[0x2010..0x2018].fill(0xff);
    of_modules(&image, &symbols);
}

/// RAM of which one table of pages stands for all of the kernel's part of the address space, again and again.
fn everywhere(image: &[u8]) -> Arc<GuestRam> {
    let ram = ram(image);
    let leaf = |page: usize| (PHYSICAL + (page % image.len().div_ceil(4096)) as u64 * 4096) | 3;
    let fill = |table: u64, entry: &dyn Fn(usize) -> u64| {
        let entries: Vec<u8> = (0..512).flat_map(|at| entry(at).to_le_bytes()).collect();
        ram.write_slice(&entries, GuestAddress(table)).unwrap();
    };
    fill(ROOT, &|_| (ROOT * 2) | 3);
    fill(ROOT * 2, &|_| (ROOT * 3) | 3);
    fill(ROOT * 3, &|_| (ROOT * 4) | 3);
    fill(ROOT * 4, &leaf);
    ram
}

#[test]
fn a_search_ends_when_its_time_is_over_or_somebody_wants_it_to() {
    // Whatever is looked at, it may be the beginning of an index; and what stands before it may be names.
    let image: Vec<u8> =
        [0u16, 2, 4, 6].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>().repeat(8192);
    let ram = everywhere(&image);
    let roots: Vec<_> = (0..16).map(|_| (ROOT, 0)).collect();
    let limit = Duration::from_millis(50);
    for (budget, cut) in [
        // By its steps, wherever this runs; and by the clock.
        (Budget::new(limit, &|| false), Cut::Time),
        (Budget::new(Duration::from_secs(600), &|| true), Cut::Interrupted),
    ] {
        let start = Instant::now();
        assert_eq!(list(&ram, &roots, &budget), None);
        // Between two looks at the clock little is done.
        assert!(start.elapsed() < limit * 40, "{:?}", start.elapsed());
        assert_eq!(budget.cut(), Some(cut));
    }
}

#[test]
fn names_take_no_more_memory_than_the_guest_has() {
    // A table of a million names of 500 letters each, in a guest of 16 MiB: one byte stands for each of them.
    let whole = image(Form::New);
    let ram = ram(&whole);
    let budget = budget();
    let before = budget.bytes().get();
    let space = Space::new(&ram, ROOT, 0, &budget);
    assert!(find(&space).is_some());
    let kept = before.min(4 * (16 << 20)) - budget.bytes().get();
    let names: usize = wanted().iter().map(|symbol| size_of::<Symbol>() + symbol.name.len()).sum();
    assert!((names..2 * names).contains(&kept), "{kept} of {names}");
    // With less than they need there are none, and what was kept for them is given back.
    budget.bytes().set(names / 2);
    assert_eq!(find(&space), None);
    assert_eq!(budget.bytes().get(), names / 2);
}
