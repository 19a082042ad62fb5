//! The loaders against small kernels made here, against damaged ones, and against real ones where there are any.
//!
//! What the guest will see is read back from guest memory by the offsets of the specifications, not by the structures
//! that the loaders use.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::layout;

const MIB: u64 = 1 << 20;
const PREFERRED: u64 = 16 * MIB;

fn put(bytes: &mut [u8], at: usize, value: u64, len: usize) {
    bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
}

/// A bzImage by the offsets of Documentation/arch/x86/boot.rst. Its code is 0xc0, 0xc1, ... in each sector.
fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 0x400];
    b[0x1f1] = 1; // setup_sects
    put(&mut b, 0x1f4, 0x1000 / 16, 4); // syssize
    put(&mut b, 0x1fe, 0xaa55, 2);
    b[0x200] = 0xeb;
    put(&mut b, 0x201, 0x26c - 0x202, 1); // header length
    b[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut b, 0x206, 0x20f, 2); // version
    b[0x211] = 1; // loadflags: LOADED_HIGH
    put(&mut b, 0x22c, 0x7fff_ffff, 4); // initrd_addr_max
    put(&mut b, 0x230, 2 * MIB, 4); // kernel_alignment
    b[0x234] = 1; // relocatable_kernel
    put(&mut b, 0x236, 0b11, 2); // xloadflags: 64-bit entry, above 4 GiB
    put(&mut b, 0x238, 2047, 4); // cmdline_size
    put(&mut b, 0x250, 0xdead_0000, 8); // setup_data, which must not come through
    put(&mut b, 0x258, PREFERRED, 8);
    put(&mut b, 0x260, 8 * MIB, 4); // init_size
    b.extend((0..0x1000).map(|i: u32| 0xc0 | (i >> 9) as u8));
    b
}

/// An ELF kernel with two segments at [`PREFERRED`] and 1 MiB above, the second with a zero-filled end, and notes.
fn elf(notes: &[(&[u8], u32, &[u8])]) -> Vec<u8> {
    let mut b = vec![0; 0x1000];
    b[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&mut b, 16, 2, 2); // ET_EXEC
    put(&mut b, 18, 62, 2); // EM_X86_64
    put(&mut b, 24, PREFERRED + 0x10, 8); // entry
    put(&mut b, 32, 64, 8); // e_phoff
    put(&mut b, 54, 56, 2); // e_phentsize
    put(&mut b, 56, 3, 2); // e_phnum
    let mut segment = |i: usize, kind: u64, offset: u64, paddr: u64, file: u64, memory: u64| {
        let at = 64 + i * 56;
        put(&mut b, at, kind, 4);
        put(&mut b, at + 8, offset, 8);
        put(&mut b, at + 24, paddr, 8);
        put(&mut b, at + 32, file, 8);
        put(&mut b, at + 40, memory, 8);
    };
    let mut all = Vec::new();
    for (name, kind, value) in notes {
        for word in [name.len() as u32, value.len() as u32, *kind] {
            all.extend(word.to_le_bytes());
        }
        for part in [name, value] {
            all.extend(*part);
            all.resize(all.len().next_multiple_of(4), 0);
        }
    }
    segment(0, 1, 0x1000, PREFERRED, 0x1000, 0x1000);
    segment(1, 1, 0x2000, PREFERRED + MIB, 0x800, MIB);
    segment(2, 4, 0x2800, 0, all.len() as u64, all.len() as u64);
    b.resize(0x2000, 0xaa);
    b.resize(0x2800, 0xbb);
    b.extend(all);
    b
}

/// The notes of a PVH kernel, with others around as Linux has them.
fn pvh_elf() -> Vec<u8> {
    let entry = (PREFERRED as u32 + 0x500).to_le_bytes();
    elf(&[(b"GNU\0", 3, &[9; 20]), (b"Linux\0", 18, &[1]), (b"Xen\0", 6, b"linux\0"), (b"Xen\0", 18, &entry)])
}

struct Case {
    folder: tempfile::TempDir,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    protocol: BootProtocol,
}

impl Case {
    fn new(kernel: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some-kernel");
        fs::write(&path, kernel).unwrap();
        let (kernel, cmdline, protocol) = (path, "a=b c".to_owned(), BootProtocol::Auto);
        Self { folder, kernel, initrd: None, cmdline, protocol }
    }

    fn initrd(mut self, bytes: &[u8]) -> Self {
        let path = self.folder.path().join("some-initrd");
        fs::write(&path, bytes).unwrap();
        self.initrd = Some(path);
        self
    }

    fn protocol(mut self, protocol: BootProtocol) -> Self {
        self.protocol = protocol;
        self
    }

    fn boot(&self, mem: &str) -> Result<(Entry, Guest), Error> {
        let memory = Memory::new(&mem.parse().unwrap()).unwrap();
        let platform = tables::Platform { cpus: 1, generation: layout::GENERATION, ..Default::default() };
        let (kernel, initrd) = (self.kernel.clone().into(), self.initrd.as_deref());
        let payload = Payload::open(&kernel, initrd, self.cmdline.clone(), self.protocol)?;
        load(&memory, &payload, &platform).map(|entry| (entry, Guest(memory)))
    }

    /// The error, having checked that it names the file and has a hint.
    fn error(&self, mem: &str) -> String {
        let error = self.boot(mem).map(|(entry, _)| entry).expect_err("must not boot");
        let text = crate::error_chain(&error);
        assert!(text.contains("some-"), "names no file: {text}");
        assert!(error.hint().len() > 10 && text.len() < 300, "{text}");
        format!("{text} ({})", error.hint())
    }
}

/// Guest memory, read as the guest would.
struct Guest(Memory);

impl Guest {
    fn int(&self, at: u64, len: usize) -> u64 {
        self.bytes(at, len).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn text(&self, at: u64) -> String {
        let bytes = self.bytes(at, 4096);
        let end = bytes.iter().position(|b| *b == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }

    /// Walks the 4-level page tables (Intel SDM volume 3A, 4.5.4).
    fn translate(&self, address: u64) -> u64 {
        let mut table = layout::PAGE_TABLES;
        for level in [39, 30, 21] {
            let entry = self.int(table + (address >> level & 511) * 8, 8);
            assert_eq!(entry & 3, 3, "{address:#x} is mapped and writable at level {level}");
            table = entry & 0x000f_ffff_ffff_f000;
            if level == 21 {
                assert_eq!(entry & 0x80, 0x80, "2 MiB page");
            }
        }
        table + (address & (2 * MIB - 1))
    }
}

/// The entries to the small kernels that are made here.
fn linux64() -> Entry {
    entry::linux64(PREFERRED + 0x10, layout::BOOT_PARAMS)
}

fn pvh() -> Entry {
    entry::pvh(PREFERRED as u32 + 0x500, layout::BOOT_PARAMS as u32)
}

/// The protocol by which a kernel is entered so.
fn enters_by(entry: Entry) -> BootProtocol {
    let (rip, rbx) = (entry.rip as u32, entry.rbx as u32);
    match () {
        () if entry == entry::linux64(entry.rip, entry.rsi) => BootProtocol::Linux64,
        () if entry == entry::pvh(rip, rbx) => BootProtocol::Pvh,
        () if entry == entry::multiboot(rip, rbx) => BootProtocol::Multiboot,
        () => panic!("by no protocol: {entry:?}"),
    }
}

#[test]
fn a_bzimage_gets_what_the_64_bit_protocol_promises() {
    let (entry, guest) = Case::new(&bzimage()).initrd(&[0x5a; 5000]).boot("64M").unwrap();
    assert_eq!(entry, entry::linux64(PREFERRED + 0x200, layout::BOOT_PARAMS));
    assert_eq!((guest.int(PREFERRED, 1), guest.int(PREFERRED + 0xfff, 1)), (0xc0, 0xc7));
    let at = |offset: u64, len| guest.int(layout::BOOT_PARAMS + offset, len);
    assert_eq!(at(0x202, 4), 0x5372_6448);
    assert_eq!(
        (at(0x206, 2), at(0x236, 2), at(0x258, 8)),
        (0x20f, 0b11, PREFERRED),
        "the kernel's own header"
    );
    assert_eq!((at(0x210, 1), at(0x211, 1) & 1), (0xff, 1), "loader type and flags");
    assert_eq!(at(0x250, 8), 0, "setup_data is the loader's");
    assert_eq!(guest.text(at(0x228, 4)), "a=b c");
    assert_eq!(at(0x0c8, 4), 0, "high half of the command line's address");
    let (initrd, size) = (at(0x218, 4), at(0x21c, 4));
    assert_eq!((initrd, size), (64 * MIB - 0x2000, 5000));
    assert_eq!(guest.bytes(initrd, 5000), [0x5a; 5000]);
    assert_eq!(&guest.bytes(at(0x070, 8), 8), b"RSD PTR ");
    assert_eq!(at(0x1ef, 1), 0, "sentinel");
    // e820: 20 bytes each.
    let map = |i: u64| (at(0x2d0 + i * 20, 8), at(0x2d8 + i * 20, 8), at(0x2e0 + i * 20, 4));
    assert_eq!(at(0x1e8, 1), 3);
    assert_eq!([map(0), map(1), map(2)], [(0, 0xa0000, 1), (0xe0000, 0x20000, 2), (MIB, 63 * MIB, 1)]);
    for address in [0, layout::BOOT_PARAMS, PREFERRED + 0x200, initrd, 0xffff_ffff] {
        assert_eq!(guest.translate(address), address);
    }
    // __BOOT_CS and __BOOT_DS: present, code with L, data writable.
    assert_eq!(guest.int(layout::GDT + 0x10, 8) >> 40 & 0x20ff, 0x209b);
    assert_eq!(guest.int(layout::GDT + 0x18, 8) >> 40 & 0xff, 0x93);
}

/// Memory without an object behind it takes the kernel by reading instead of sending.
#[test]
fn anonymous_memory_is_loaded_just_the_same() {
    let case = Case::new(&pvh_elf()).initrd(&[0x5a; 5000]);
    let bytes = |mem| {
        let (_, guest) = case.boot(mem).unwrap();
        // That is random.
        let id = [0; tables::generation::SIZE];
        guest.0.ram().write_slice(&id, GuestAddress(layout::GENERATION)).unwrap();
        [(0, MIB), (PREFERRED, 2 * MIB), (62 * MIB, 2 * MIB)].map(|(at, len)| guest.bytes(at, len as usize))
    };
    let (sent, read) = (bytes("64M"), bytes("64M,backing=anonymous"));
    assert!(sent == read && read[2].contains(&0x5a));
}

#[test]
fn a_setup_header_is_copied_to_its_own_end_only() {
    let mut kernel = bzimage();
    put(&mut kernel, 0x201, 0x268 - 0x202, 1);
    put(&mut kernel, 0x268, 0x1234_5678, 4);
    let (_, guest) = Case::new(&kernel).boot("64M").unwrap();
    assert_eq!(guest.int(layout::BOOT_PARAMS + 0x268, 4), 0);
}

#[test]
fn an_initrd_that_only_fits_above_4_gib_goes_there_in_halves() {
    let mut kernel = bzimage();
    put(&mut kernel, 0x22c, 0x10_0fff, 4);
    let case = Case::new(&kernel).initrd(&[1; 0x1800]);
    let (_, guest) = case.boot("4G").unwrap();
    let at = |offset: u64| guest.int(layout::BOOT_PARAMS + offset, 4);
    let place = layout::HOLE.end + 1024 * MIB - 0x2000;
    assert_eq!((at(0x218), at(0x0c0)), (place & 0xffff_ffff, place >> 32));
    assert_eq!((at(0x21c), at(0x0c4)), (0x1800, 0));
    assert_eq!(guest.int(place + 0x17ff, 1), 1);
    assert!(case.error("1G").contains("`mem=3073M`"), "{}", case.error("1G"));
    kernel[0x236] = 1; // not above 4 GiB
    assert!(Case::new(&kernel).initrd(&[1; 0x1800]).error("4G").contains("no amount of memory"));
}

#[test]
fn an_elf_kernel_enters_by_pvh_if_it_can() {
    for protocol in [BootProtocol::Auto, BootProtocol::Pvh] {
        let case = Case::new(&pvh_elf()).initrd(b"ramdisk").protocol(protocol);
        let (entry, guest) = case.boot("5G").unwrap();
        assert_eq!(entry, pvh());
        assert_eq!((guest.int(PREFERRED, 1), guest.int(PREFERRED + MIB + 0x7ff, 1)), (0xaa, 0xbb));
        assert_eq!(guest.bytes(PREFERRED + MIB + 0x800, 0x1000), [0; 0x1000]);
        // hvm_start_info (Xen's public/arch-x86/hvm/start_info.h).
        let at = |offset: u64, len| guest.int(layout::BOOT_PARAMS + offset, len);
        assert_eq!((at(0, 4), at(4, 4), at(8, 4), at(12, 4)), (0x336e_c578, 1, 0, 1));
        assert_eq!(guest.text(at(24, 8)), "a=b c");
        assert_eq!(&guest.bytes(at(32, 8), 8), b"RSD PTR ");
        let module = at(16, 8);
        let (place, size) = (guest.int(module, 8), guest.int(module + 8, 8));
        assert_eq!((place, size), (layout::HOLE.start - 0x1000, 7));
        assert_eq!(guest.bytes(place, 7), b"ramdisk");
        let map = |i: u64| {
            let entry = at(40, 8) + i * 24;
            (guest.int(entry, 8), guest.int(entry + 8, 8), guest.int(entry + 16, 4))
        };
        assert_eq!(at(48, 4), 4);
        assert_eq!(map(2), (MIB, layout::HOLE.start - MIB, 1));
        assert_eq!(map(3), (layout::HOLE.end, 2048 * MIB, 1));
    }
    let (_, guest) = Case::new(&pvh_elf()).boot("64M").unwrap();
    assert_eq!(guest.int(layout::BOOT_PARAMS + 12, 4), 0, "no initrd, no module");
}

#[test]
fn an_elf_kernel_enters_in_long_mode_if_asked_to_or_without_the_note() {
    let plain = elf(&[]);
    let forced = Case::new(&pvh_elf()).protocol(BootProtocol::Linux64);
    for case in [forced, Case::new(&plain), Case::new(&plain).protocol(BootProtocol::Linux64)] {
        let (entry, guest) = case.boot("64M").unwrap();
        assert_eq!(entry, linux64());
        let at = |offset: u64, len| guest.int(layout::BOOT_PARAMS + offset, len);
        assert_eq!((at(0x1fe, 2), at(0x202, 4), at(0x1e8, 1)), (0xaa55, 0x5372_6448, 3));
        assert_eq!(guest.text(at(0x228, 4)), "a=b c");
    }
}

#[test]
fn pvh_that_cannot_be_is_refused_with_a_way_out() {
    let error = Case::new(&bzimage()).protocol(BootProtocol::Pvh).error("64M");
    assert!(error.contains("bzImage") && error.contains("extract-vmlinux"), "{error}");
    let error = Case::new(&elf(&[])).protocol(BootProtocol::Pvh).error("64M");
    assert!(error.contains("CONFIG_PVH"), "{error}");
}

/// `change` applied to a good kernel.
fn broken(mut kernel: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut kernel);
    kernel
}

/// FreeBSD's kernel names an interpreter, as programs do; its PVH note says what it is.
#[test]
fn an_interpreter_makes_no_program_of_a_pvh_kernel() {
    let kernel = broken(pvh_elf(), |b| put(b, 64 + 56, 3, 4));
    let (entry, _) = Case::new(&kernel).boot("64M").unwrap();
    assert_eq!(enters_by(entry), BootProtocol::Pvh);
}

#[test]
fn what_is_no_kernel_is_called_by_its_name() {
    let long = |start: &[u8]| broken(start.to_vec(), |b| b.resize(4096, 7));
    let bz = |change: fn(&mut Vec<u8>)| broken(bzimage(), change);
    let elf = |change: fn(&mut Vec<u8>)| broken(pvh_elf(), change);
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![], "is empty"),
        (b"x".to_vec(), "too short"),
        (vec![0; 4096], "all zeroes"),
        (long(b"nonsense"), "neither a bzImage nor an ELF"),
        (long(b"\x1f\x8b\x08"), "is a gzip file, not a kernel (unpack it"),
        (long(b"\xfd7zXZ\0"), "is an xz file"),
        (long(b"\x28\xb5\x2f\xfd"), "is a zstd file"),
        (long(b"070701"), "`initrd=FILE`"),
        (long(b"MZ"), "EFI program"),
        (bz(|b| b.truncate(0x1000)), "cut short"),
        (bz(|b| b.truncate(0x210)), "cut short"),
        (bz(|b| b[0x236] = 0), "32-bit x86 only"),
        (bz(|b| put(b, 0x206, 0x20b, 2)), "boot protocol 2.11"),
        (bz(|b| b[0x211] = 0), "zImage"),
        (bz(|b| b[0x201] = 0x20), "setup header ends"),
        (bz(|b| (b[0x234], b[0x25a], b[0x25b]) = (0, 0, 0)), "wants to be loaded at 0x0"),
        (bz(|b| put(b, 0x230, 3, 4)), "alignment"),
        (bz(|b| put(b, 0x258, u64::MAX, 8)), "damaged"),
        (bz(|b| put(b, 0x258, 0xb000_0000, 8)), "`mem=2824M`"),
        (bz(|b| put(b, 0x258, layout::HOLE.start, 8)), "no amount of memory"),
        (elf(|b| b[4] = 1), "32-bit x86 only"),
        (elf(|b| put(b, 18, 3, 2)), "32-bit x86 only"),
        (elf(|b| put(b, 18, 183, 2)), "arm64"),
        (elf(|b| put(b, 16, 1, 2)), "kernel module"),
        (elf(|b| put(b, 16, 3, 2)), "another type"),
        (broken(self::elf(&[]), |b| put(b, 64 + 56, 3, 4)), "is a program"),
        (elf(|b| b.truncate(100)), "cut short"),
        (elf(|b| b.truncate(0x1800)), "cut short"),
        (elf(|b| put(b, 32, u64::MAX - 8, 8)), "cut short"),
        (elf(|b| put(b, 56, 0, 2)), "0 program headers"),
        (elf(|b| put(b, 56, 0xffff, 2)), "65535 program headers"),
        (elf(|b| put(b, 64 + 24, 0x7c00, 8)), "below 0x100000"),
        (elf(|b| put(b, 64 + 24, u64::MAX - 5, 8)), "impossible sizes"),
        (elf(|b| put(b, 64 + 32, 0x2000, 8)), "impossible sizes"),
        (elf(|b| put(b, 64 + 24, 32 * MIB, 8)), "entry point 0x1000500 is in no segment"),
        (elf(|b| put(b, 64 + 40, 500 * MIB, 8)), "`mem=516M`"),
    ];
    for (kernel, expected) in cases {
        let error = Case::new(kernel).error("64M");
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
    }
}

#[test]
fn files_that_cannot_be_read_are_refused_at_once() {
    let mut case = Case::new(&bzimage()).initrd(b"");
    assert!(case.error("64M").contains("initrd") && case.error("64M").contains("is empty"));
    case.initrd = Some(case.folder.path().join("some-missing"));
    assert!(case.error("64M").contains("open initrd"));
    let folder = case.folder.path().join("some-folder");
    fs::create_dir(&folder).unwrap();
    case.kernel = folder;
    assert!(case.error("64M").contains("is a directory"));
    let pipe = case.folder.path().join("some-pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    case.kernel = pipe;
    assert!(case.error("64M").contains("is a pipe"));
}

#[test]
fn what_does_not_fit_says_how_much_memory_would_do() {
    let case = Case::new(&bzimage());
    assert!(case.error("20M").contains("`mem=24M`"), "{}", case.error("20M"));
    case.boot("24M").unwrap();
    let case = Case::new(&bzimage()).initrd(&vec![1; 16 << 20]);
    assert!(case.error("32M").contains("`mem=40M`"), "{}", case.error("32M"));
    let (_, guest) = case.boot("40M").unwrap();
    assert_eq!(guest.int(layout::BOOT_PARAMS + 0x218, 4), 24 * MIB);
    // The smallest memory there can be: everything is refused, nothing is written outside.
    assert!(Case::new(&pvh_elf()).error("2M").contains("`mem=18M`"));
}

#[test]
fn command_lines_that_the_kernel_would_cut_are_refused() {
    for kernel in [bzimage(), elf(&[]), pvh_elf()] {
        let mut case = Case::new(&kernel);
        case.cmdline = "x".repeat(2047);
        case.boot("64M").unwrap();
        case.cmdline.push('x');
        assert!(case.error("64M").contains("takes 2047"), "{}", case.error("64M"));
        case.cmdline = "a=\0".into();
        assert!(case.error("64M").contains("a NUL at byte 2"));
        case.cmdline = "ä".into();
        assert!(case.error("64M").contains("ASCII"));
    }
    let mut kernel = bzimage();
    put(&mut kernel, 0x238, u64::MAX, 4);
    let mut case = Case::new(&kernel);
    case.cmdline = "x".repeat(layout::CMDLINE_SIZE as usize);
    assert!(case.error("64M").contains("takes 65535"), "the layout's room is the limit");
}

/// A kernel that loaded must be wholly in RAM, above the boot structures, and clear of its initrd.
fn check(case: &Case) -> Result<(), TestCaseError> {
    match case.boot("64M") {
        Err(error) => prop_assert!(!error.hint().is_empty()),
        Ok((entry, guest)) => {
            let rip = entry.rip;
            prop_assert!((layout::HIGH_RAM..64 * MIB).contains(&rip));
            if enters_by(entry) == BootProtocol::Linux64 {
                let at = |offset: u64| guest.int(layout::BOOT_PARAMS + offset, 4);
                let initrd = at(0x218)..at(0x218) + at(0x21c);
                prop_assert!(!initrd.contains(&rip) && initrd.end <= 64 * MIB);
                prop_assert!(initrd.is_empty() || initrd.start >= layout::HIGH_RAM);
            }
        }
    }
    Ok(())
}

fn values() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..0x1000u64,
        Just(u64::MAX),
        (0..64u32, -2..3i64).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off)),
        (0..64 * MIB).prop_map(|a| a & !0xfff),
    ]
}

proptest! {
    /// Good kernels with some fields overwritten: the headers are in the first 0x300 bytes, the notes at the end.
    #[test]
    fn damaged_headers_never_harm(
        which in 0..3usize,
        patches in prop::collection::vec((0..0x300usize, values(), 1..9usize), 1..6),
        notes in prop::collection::vec((0..0x60usize, any::<u32>()), 0..3),
        protocol in prop_oneof![Just(BootProtocol::Auto), Just(BootProtocol::Linux64), Just(BootProtocol::Pvh)],
        cut in prop::option::weighted(0.2, 0..0x2900usize),
    ) {
        let mut kernel = match which { 0 => bzimage(), 1 => elf(&[]), _ => pvh_elf() };
        for (at, value, len) in patches {
            put(&mut kernel, at, value, len);
        }
        for (from_end, value) in notes {
            let at = kernel.len().saturating_sub(from_end + 4);
            put(&mut kernel, at, u64::from(value), 4);
        }
        if let Some(cut) = cut {
            kernel.truncate(cut);
        }
        check(&Case::new(&kernel).initrd(&[1; 0x1234]).protocol(protocol))?;
    }

    /// Any bytes, behind each of the signatures that lead into a loader.
    #[test]
    fn arbitrary_bytes_never_harm(
        mut kernel in prop::collection::vec(any::<u8>(), 0..0x1000),
        which in 0..3usize,
    ) {
        let signature: &[(usize, &[u8])] = match which {
            0 => &[(0x1fe, b"\x55\xaa"), (0x202, b"HdrS"), (0x207, b"\x02")],
            1 => &[(0, b"\x7fELF\x02\x01"), (16, b"\x02\0\x3e\0"), (54, b"\x38\0\x03\0")],
            _ => &[],
        };
        for (at, bytes) in signature {
            if let Some(place) = kernel.get_mut(*at..*at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        check(&Case::new(&kernel))?;
    }
}

/// Real kernels on this machine: `VMM_TEST_KERNEL` (a list like PATH), and what `cargo guest -- kernel` cached as
/// ITEM/VERSION/{bzImage,vmlinux}.
fn real_kernels() -> Vec<PathBuf> {
    let named = std::env::var_os("VMM_TEST_KERNEL");
    let mut found: Vec<_> = named.iter().flat_map(std::env::split_paths).collect();
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let Some(cache) = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home) else { return found };
    let below =
        |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for version in below(cache.join("vmm/guest")).flat_map(below) {
        found.extend(
            ["bzImage", "vmlinux"].map(|name| version.join(name)).into_iter().filter(|file| file.is_file()),
        );
    }
    found
}

#[test]
fn real_kernels_load() {
    let kernels = real_kernels();
    if kernels.is_empty() {
        eprintln!(
            "SKIP: real_kernels_load: no real kernel to load; set VMM_TEST_KERNEL or run `cargo guest -- kernel`"
        );
    }
    for kernel in kernels {
        let mut case = Case::new(&[]).initrd(&[1; 1 << 20]);
        case.kernel = kernel.clone();
        for protocol in [BootProtocol::Auto, BootProtocol::Linux64] {
            case.protocol = protocol;
            let (entry, guest) = case.boot("256M").unwrap_or_else(|e| panic!("{}", crate::error_chain(&e)));
            let pvh = enters_by(entry) == BootProtocol::Pvh;
            assert_eq!(pvh, protocol == BootProtocol::Auto && is_pvh(&kernel), "{}", kernel.display());
            assert_ne!(
                guest.int(entry.rip, 8),
                0,
                "there is code at the entry point of {}",
                kernel.display()
            );
        }
    }
}

/// All x86-64 kernels that distributions ship have the note in their vmlinux.
fn is_pvh(kernel: &Path) -> bool {
    let mut start = [0; 4];
    std::io::Read::read_exact(&mut fs::File::open(kernel).unwrap(), &mut start).unwrap();
    start == *b"\x7fELF"
}
