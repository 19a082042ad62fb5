//! virtio-blk on a real file: data against a model, every answer, limits, durability, the image's own errors.

use std::fs::{File, read};
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmm_monitor::backends::Backends;
use vmm_monitor::config;
use vmm_monitor::disk::{Error, Raw};
use vmm_monitor::event_loop::EventLoop;

use crate::guest::{DATA, Guest, HIGH};
use crate::subjects::{header, image, open};

pub const SIZE: u64 = 1 << 20;
const SECTORS: u64 = SIZE / 512;
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH
const WCE: u64 = 1 << 11;
const F_FLUSH: u64 = 1 << 9;

const STATUS_BYTE: u64 = DATA + 0x20;
pub const BUFFER: u64 = DATA + 0x1000;

pub fn guest(disk: &config::Disk) -> Guest {
    let mut guest = Guest::new(open(disk));
    guest.start(0);
    guest
}

/// One request, with `out` behind its header and the given buffers for the answer: status, and bytes written.
pub fn ask(guest: &mut Guest, kind: u32, sector: u64, out: &[(u64, u32)], back: &[(u64, u32)]) -> (u8, u32) {
    header(guest, DATA, kind, sector);
    guest.store(STATUS_BYTE, &[0xee]);
    let readable = [&[(DATA, 16)], out].concat();
    let writable = [back, &[(STATUS_BYTE, 1)]].concat();
    let written = guest.request(0, &readable, &writable);
    (guest.load(STATUS_BYTE, 1)[0], written)
}

/// A discard or write-zeroes request.
pub fn range(guest: &mut Guest, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
    guest.store(BUFFER, &[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat());
    ask(guest, kind, 0, &[(BUFFER, 16)], &[]).0
}

#[derive(Debug, Clone)]
enum Op {
    Read { sector: u64, cuts: Vec<u32> },
    Write { sector: u64, cuts: Vec<u32>, byte: u8 },
    Zero { sector: u64, sectors: u32, unmap: bool },
    Flush,
    Reopen,
}

/// Lengths of segments, of a whole number of sectors in all.
fn cuts() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![1..1500u32, Just(512), Just(4096)], 1..20).prop_map(|mut cuts| {
        let odd = cuts.iter().sum::<u32>() % 512;
        cuts.push(512 - odd);
        cuts
    })
}

fn op() -> impl Strategy<Value = Op> {
    let sector = || 0..SECTORS - 200;
    prop_oneof![
        4 => (sector(), cuts()).prop_map(|(sector, cuts)| Op::Read { sector, cuts }),
        4 => (sector(), cuts(), any::<u8>()).prop_map(|(sector, cuts, byte)| Op::Write { sector, cuts, byte }),
        2 => (sector(), 0..64u32, any::<bool>())
            .prop_map(|(sector, sectors, unmap)| Op::Zero { sector, sectors, unmap }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

/// Buffers for the segments: scattered, in both halves of RAM, next to each other only by chance.
fn scatter(cuts: &[u32]) -> Vec<(u64, u32)> {
    let place = |(i, len): (usize, &u32)| {
        let at = if i % 3 == 2 && i < 12 { HIGH + i as u64 * 0x1000 } else { BUFFER + i as u64 * 0x1007 };
        (at, *len)
    };
    cuts.iter().enumerate().map(place).collect()
}

#[test]
fn random_requests_agree_with_a_model() {
    agrees_with_a_model(image, |disk, _, model| read(&disk.path).unwrap() == model);
}

/// Does random requests with disks that `image` makes, and compares what they answer, and what is `right` at the end: of the disk,
/// and of a guest that has it, which is paused.
pub fn agrees_with_a_model(
    image: fn(u64) -> (tempfile::TempDir, config::Disk),
    right: fn(&config::Disk, Guest, &[u8]) -> bool,
) {
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&prop::collection::vec(op(), 1..40), |ops| {
        let (_keep, disk) = image(SIZE);
        let mut model = read(&disk.path).unwrap();
        let mut vm = guest(&disk);
        for op in ops {
            match op {
                Op::Read { sector, cuts } => {
                    let buffers = scatter(&cuts);
                    let total: u32 = cuts.iter().sum();
                    let before = vm.load(BUFFER + 40 * 0x1007, 64);
                    prop_assert_eq!(ask(&mut vm, IN, sector, &[], &buffers), (OK, total + 1));
                    let mut at = sector as usize * 512;
                    for (address, len) in buffers {
                        let expect = &model[at..at + len as usize];
                        prop_assert_eq!(&vm.load(address, len as usize)[..], expect);
                        at += len as usize;
                    }
                    prop_assert_eq!(vm.load(BUFFER + 40 * 0x1007, 64), before);
                }
                Op::Write { sector, cuts, byte } => {
                    let buffers = scatter(&cuts);
                    let mut at = sector as usize * 512;
                    for (i, (address, len)) in buffers.iter().enumerate() {
                        let bytes: Vec<u8> =
                            (0..*len).map(|n| byte.wrapping_add(i as u8).wrapping_mul(n as u8 | 1)).collect();
                        vm.store(*address, &bytes);
                        model[at..at + bytes.len()].copy_from_slice(&bytes);
                        at += bytes.len();
                    }
                    prop_assert_eq!(ask(&mut vm, OUT, sector, &buffers, &[]), (OK, 1));
                }
                Op::Zero { sector, sectors, unmap } => {
                    prop_assert_eq!(range(&mut vm, WRITE_ZEROES, sector, sectors, unmap.into()), OK);
                    model[sector as usize * 512..][..sectors as usize * 512].fill(0);
                }
                Op::Flush => prop_assert_eq!(ask(&mut vm, FLUSH, 0, &[], &[]), (OK, 1)),
                Op::Reopen => {
                    drop(vm);
                    vm = guest(&disk);
                }
            }
        }
        vm.check_guards();
        vm.pause();
        prop_assert!(right(&disk, vm, &model), "the disk is the model");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn many_requests_in_flight_and_many_segments() {
    let (_keep, disk) = image(SIZE);
    let mut vm = guest(&disk);
    // 60 segments in one indirect request, then a full ring of indirect ones.
    let segments: Vec<_> = (0..60).map(|i| (BUFFER + i * 1024, 512)).collect();
    assert_eq!(ask(&mut vm, IN, 5, &[], &segments), (OK, 60 * 512 + 1));
    for (i, (address, _)) in segments.iter().enumerate() {
        assert_eq!(vm.load(*address, 512), [i as u8 + 5; 512]);
    }
    for round in 0..50u64 {
        let old = vm.rings[0].available();
        let mut sectors = std::collections::HashMap::new();
        for i in 0..64u64 {
            let at = BUFFER + i * 0x800;
            let sector = (round * 64 + i * 7) % SECTORS;
            header(&vm, at, IN, sector);
            vm.store(at + 0x20, &[0xee]);
            let head = vm.rings[0].add_indirect(at + 0x40, &[(at, 16)], &[(at + 0x200, 512), (at + 0x20, 1)]);
            sectors.insert(head, (at, sector));
        }
        vm.kick(0, old);
        for _ in 0..64 {
            let (head, written) = vm.rings[0].wait_used(10);
            let (at, sector) = sectors.remove(&head).expect("each comes back once");
            assert_eq!((written, vm.load(at + 0x20, 1)[0]), (513, OK));
            assert_eq!(vm.load(at + 0x200, 512), [sector as u8; 512]);
        }
    }
}

#[test]
fn a_request_that_nobody_saw_before_the_save_is_served_after_the_restore() {
    let (_keep, disk) = image(SIZE);
    let mut vm = guest(&disk);
    vm.pause();
    header(&vm, DATA, IN, 9);
    let head = vm.rings[0].add(&[(DATA, 16)], &[(BUFFER, 512), (STATUS_BYTE, 1)]);
    // The driver's kick went to the old device's doorbell, which is gone.
    let saved = vm.device.save_bytes();
    let mut vm = Guest::on(vm.unplug(), open(&disk));
    vm.device.restore_bytes(&saved).unwrap();
    vm.device.resume();
    assert_eq!(vm.rings[0].wait_used(10), (head, 513));
    assert_eq!(vm.load(BUFFER, 512), [9; 512]);
}

#[test]
fn what_a_request_may_not_do_is_an_error_in_its_status() {
    let (_keep, disk) = image(SIZE);
    let before = read(&disk.path).unwrap();
    let mut vm = guest(&disk);
    let sector = (BUFFER, 512);
    for at in [SECTORS, SECTORS + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(ask(&mut vm, IN, at, &[], &[sector]), (IOERR, 0), "read {at}");
        assert_eq!(ask(&mut vm, OUT, at, &[sector], &[]), (IOERR, 1), "write {at}");
        assert_eq!(range(&mut vm, DISCARD, at, 1, 0), IOERR, "discard {at}");
        assert_eq!(range(&mut vm, WRITE_ZEROES, at, 1, 0), IOERR, "zero {at}");
    }
    assert_eq!(ask(&mut vm, IN, SECTORS - 1, &[], &[(BUFFER, 1024)]).0, IOERR, "over the end");
    assert_eq!(ask(&mut vm, IN, 0, &[], &[(BUFFER, 511)]).0, IOERR, "half a sector");
    assert_eq!(ask(&mut vm, OUT, 0, &[(BUFFER, 513)], &[]).0, IOERR);
    assert_eq!(ask(&mut vm, OUT, 0, &[], &[]).0, OK, "nothing is a whole number of sectors");
    assert_eq!(range(&mut vm, DISCARD, 0, u32::MAX, 0), IOERR, "beyond the advertised limit");
    assert_eq!(range(&mut vm, DISCARD, 0, 8, 1), UNSUPP, "unmap is no flag of discard");
    assert_eq!(range(&mut vm, WRITE_ZEROES, 0, 8, 2), UNSUPP, "a reserved flag");
    vm.store(BUFFER, &[0; 40]);
    assert_eq!(ask(&mut vm, DISCARD, 0, &[(BUFFER, 15)], &[]).0, IOERR, "a short segment");
    assert_eq!(ask(&mut vm, DISCARD, 0, &[(BUFFER, 32)], &[]).0, IOERR, "more segments than advertised");
    for kind in [2, 3, 5, 10, 14, 16, u32::MAX] {
        assert_eq!(ask(&mut vm, kind, 0, &[], &[sector]).0, UNSUPP, "kind {kind}");
    }
    vm.store(STATUS_BYTE, &[0xee]);
    assert_eq!(vm.request(0, &[(DATA, 15)], &[(STATUS_BYTE, 1)]), 1, "a short header");
    assert_eq!(vm.load(STATUS_BYTE, 1)[0], IOERR);
    vm.pause();
    assert!(read(&disk.path).unwrap() == before, "and nothing was written");
}

#[test]
fn the_configuration_says_what_holds() {
    let (_keep, mut disk) = image(SIZE);
    disk.block_size = Some("4096".parse().unwrap());
    disk.serial = Some("a serial of 20 bytes".to_owned());
    let device = vmm_monitor::virtio::Device::Block(0, &disk)
        .build(&mut Backends::new(EventLoop::new().unwrap()), &std::sync::Arc::default())
        .unwrap();
    let mut vm = Guest::new(device);
    vm.start(0);
    let config: [u8; 60] = vm.config(0);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!((word(12), word(20)), (254, 4096));
    assert_eq!((config[24], config[32]), (0, 1), "physical blocks of 4096; writeback");
    assert_eq!((word(40), word(44), word(52), config[56]), (1, 8, 1, 1));
    assert_eq!(ask(&mut vm, IN, 8, &[], &[(BUFFER, 4096)]).0, OK);
    assert_eq!(ask(&mut vm, GET_ID, 0, &[], &[(BUFFER, 20)]), (OK, 21));
    assert_eq!(vm.load(BUFFER, 20), b"a serial of 20 bytes");
    // Out of range, and half in range: all ones, as where nothing is.
    let beyond: [u8; 8] = vm.config(56);
    assert_eq!(beyond, [0xff; 8]);
}

#[test]
fn the_cache_mode_is_the_drivers_choice() {
    let (_keep, disk) = image(SIZE);
    // Features that are not accepted, what `writeback` is then (5.2.5.2), and whether the driver may change
    // it (5.2.5).
    for (without, writeback, writable) in
        [(0, 1, true), (WCE, 1, false), (F_FLUSH, 0, true), (WCE | F_FLUSH, 0, false)]
    {
        let mut vm = Guest::new(open(&disk));
        let toggle = |vm: &mut Guest, writable: bool, when: &str| {
            let (before, generation) = (vm.config::<1>(32), vm.read(0xfc));
            vm.write_bytes(0x120, &[2]);
            vm.write_bytes(0x100, &[9; 8]);
            assert_eq!((vm.config::<1>(32), vm.read(0xfc)), (before, generation), "nothing else is taken");
            vm.write_bytes(0x120, &[1 - before[0]]);
            let expected = if writable { [1 - before[0]] } else { before };
            assert_eq!(vm.config::<1>(32), expected, "{when}, without {without:#x}");
            assert_eq!(vm.read(0xfc) != generation, writable, "{when}, without {without:#x}");
            vm.write_bytes(0x120, &before);
        };
        toggle(&mut vm, false, "before features are agreed on");
        vm.negotiate(without);
        assert_eq!(vm.config::<1>(32), [writeback], "at FEATURES_OK, without {without:#x}");
        toggle(&mut vm, writable, "at FEATURES_OK");
        vm.set_up_and_run();
        assert_eq!(vm.config::<1>(32), [writeback], "at DRIVER_OK, without {without:#x}");
        assert_eq!(ask(&mut vm, OUT, 3, &[(BUFFER, 512)], &[]).0, OK);
        toggle(&mut vm, writable, "at DRIVER_OK");
        assert_eq!(ask(&mut vm, OUT, 3, &[(BUFFER, 512)], &[]).0, OK);
    }
}

#[test]
fn discard_gives_space_back_and_readonly_keeps_all() {
    let (_keep, mut disk) = image(SIZE);
    let blocks = |disk: &config::Disk| std::fs::metadata(&disk.path).unwrap().blocks();
    let mut vm = guest(&disk);
    assert_eq!(ask(&mut vm, FLUSH, 0, &[], &[]).0, OK);
    let before = blocks(&disk);
    assert_eq!(range(&mut vm, DISCARD, 1024, 1024, 0), OK);
    assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), SIZE, "the size stays");
    if blocks(&disk) == before {
        eprintln!(
            "SKIP: discards, their last part: the file system under {} gives no space back",
            disk.path.display()
        );
    }
    drop(vm);

    disk.readonly = true;
    let before = read(&disk.path).unwrap();
    let mut vm = guest(&disk);
    assert_eq!(
        vm.features & (1 << 5 | 1 << 13 | 1 << 14),
        1 << 5,
        "RO, and neither discard nor write-zeroes"
    );
    assert_eq!(ask(&mut vm, OUT, 0, &[(BUFFER, 512)], &[]).0, IOERR);
    assert_eq!(range(&mut vm, DISCARD, 0, 8, 0), UNSUPP);
    assert_eq!(range(&mut vm, WRITE_ZEROES, 0, 8, 0), UNSUPP);
    assert_eq!(ask(&mut vm, FLUSH, 0, &[], &[]).0, OK);
    assert!(read(&disk.path).unwrap() == before);
}

#[test]
fn images_that_cannot_be_are_refused_with_a_hint() {
    let (keep, disk) = image(4096);
    let at = |name: &str, len: Option<u64>| {
        let path = keep.path().join(name);
        if let Some(len) = len {
            File::create(&path).unwrap().set_len(len).unwrap();
        }
        config::Disk { path, ..disk.clone() }
    };
    let open = |disk: &config::Disk| Raw::open(disk).expect_err("refused");
    for (disk, word) in [
        (at("missing", None), "open disk image"),
        (at("empty", Some(0)), "0 bytes"),
        (at("odd", Some(1000)), "1000 bytes"),
        (config::Disk { path: keep.path().to_owned(), ..disk.clone() }, "is a directory"),
        (config::Disk { path: keep.path().to_owned(), readonly: true, ..disk.clone() }, "neither a file"),
        (config::Disk { path: "/dev/null".into(), ..disk.clone() }, "neither a file"),
        (config::Disk { block_size: Some("4096".parse().unwrap()), ..at("small", Some(512)) }, "4096-byte"),
    ] {
        let error = open(&disk);
        let text = vmm_monitor::error_chain(&error).to_lowercase();
        assert!(text.contains(word) && text.contains(&*disk.path.to_string_lossy().to_lowercase()), "{text}");
        assert!(error.hint().is_some() || word == "is a directory", "{text}: no hint");
    }
    let fifo = at("fifo", None);
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo.path, rustix::fs::Mode::RWXU).unwrap();
    assert!(matches!(open(&fifo), Error::NotAnImage { .. }), "and it does not wait for a writer");
}

#[test]
fn images_that_are_not_raw_are_refused_by_name_unless_they_are_said_to_be_raw() {
    let (keep, disk) = image(8192);
    let marks: [(&str, &str, usize, &[u8]); 11] = [
        ("qcow2", "qemu-img convert", 0, b"QFI\xfb\0\0\0\x03"),
        ("vmdk", "qemu-img convert", 0, b"KDMV"),
        ("vmdk", "qemu-img convert", 0, b"# Disk DescriptorFile"),
        ("vhdx", "qemu-img convert", 0, b"vhdxfile"),
        ("vdi", "qemu-img convert", 0x40, b"\x7f\x10\xda\xbe"),
        ("vhd", "qemu-img convert", 8192 - 512, b"conectix"),
        ("qed", "qemu-img convert", 0, b"QED\0"),
        ("bzip2", "bzip2 -dc <", 0, b"BZh91AY&SY"),
        ("a tar archive", "tar -xvf", 257, b"ustar  "),
        ("a zip archive", "unzip", 0, b"PK\x03\x04"),
        ("zstd", "zstd -dc <", 0, b"\x28\xb5\x2f\xfd"),
    ];
    let refused = |disk: &config::Disk, name: &str, command: &str| {
        let error = Raw::open(disk).expect_err(name);
        assert!(error.to_string().contains(&format!("is {name}, not")), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains(command) && hint.contains(",format=raw"), "{hint}");
    };
    for (name, command, at, mark) in marks {
        let mut bytes = vec![0; 8192];
        bytes[at..at + mark.len()].copy_from_slice(mark);
        std::fs::write(&disk.path, &bytes).unwrap();
        refused(&disk, name, command);
        let raw = config::Disk { format: Some(config::ImageFormat::Raw), ..disk.clone() };
        let mut vm = guest(&raw);
        assert_eq!(ask(&mut vm, IN, 0, &[], &[(BUFFER, 512)]).0, OK);
        assert_eq!(vm.load(BUFFER, 512), bytes[..512], "byte for byte what is there");
        drop(vm);
        assert!(read(&disk.path).unwrap() == bytes);
    }
    // As the tools write them, whatever their length and name; the commands can be pasted.
    for tool in ["gzip", "xz", "zstd"] {
        let path = keep.path().join("it's compressed");
        let input = || std::fs::File::open("/proc/self/exe").unwrap();
        let packed = std::process::Command::new(tool).args(["-1", "-c"]).stdin(input()).output().unwrap();
        std::fs::write(&path, packed.stdout).unwrap();
        let packed = config::Disk { path: path.clone(), ..disk.clone() };
        let command = format!("{tool} -dc <'{0}' >'{0}.raw'", path.to_str().unwrap().replace('\'', r"'\''"));
        refused(&packed, tool, &command);
        assert!(std::process::Command::new("sh").args(["-c", &command]).status().unwrap().success());
        let raw = keep.path().join("it's compressed.raw");
        assert!(std::fs::read(raw).unwrap() == std::fs::read("/proc/self/exe").unwrap(), "{tool}");
    }
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let (_keep, disk) = image(4096);
    let readonly = config::Disk { readonly: true, ..disk.clone() };
    let locked = |disk| matches!(Raw::open(disk), Err(Error::Locked { .. }));
    let writer = Raw::open(&disk).unwrap();
    assert!(locked(&disk) && locked(&readonly));
    drop(writer);
    let readers = [Raw::open(&readonly).unwrap(), Raw::open(&readonly).unwrap()];
    assert!(locked(&disk));
    drop(readers);
    assert!(!locked(&disk));
}

/// A loop device, for as long as it is held.
struct Loop(std::path::PathBuf);

impl Loop {
    fn new(image: &std::path::Path, sector: &str) -> Result<Self, String> {
        let mut losetup = std::process::Command::new("losetup");
        let out = losetup.args(["--find", "--show", "--sector-size", sector]).arg(image).output();
        let out = out.map_err(|error| format!("losetup: {error}"))?;
        match String::from_utf8_lossy(&out.stdout).trim() {
            "" => Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()),
            path => Ok(Self(path.into())),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_a_disk_like_any_other() {
    let (_keep, backing) = image(SIZE);
    let device = match Loop::new(&backing.path, "4096") {
        Ok(device) => device,
        Err(why) => return eprintln!("SKIP: a_block_device_is_a_disk_like_any_other: no loop device: {why}"),
    };
    let disk = config::Disk { path: device.0.clone(), ..backing.clone() };
    let small = config::Disk { block_size: Some("512".parse().unwrap()), ..disk.clone() };
    let error = Raw::open(&small).expect_err("blocks of 512 bytes cannot be written there");
    assert!(matches!(error, Error::BlockSize { native: 4096, .. }) && error.hint().is_some(), "{error}");

    let mut vm = guest(&disk);
    assert_eq!(vm.config::<8>(0), SECTORS.to_le_bytes());
    assert_eq!(vm.config::<4>(20), 4096u32.to_le_bytes());
    assert_eq!(ask(&mut vm, IN, 8, &[], &[(BUFFER, 4096)]), (OK, 4097));
    assert_eq!((vm.load(BUFFER, 512), vm.load(BUFFER + 3584, 512)), (vec![8; 512], vec![15; 512]));
    vm.store(BUFFER, &[0x77; 4096]);
    assert_eq!(ask(&mut vm, OUT, 8, &[(BUFFER, 4096)], &[]).0, OK);
    assert_eq!(range(&mut vm, WRITE_ZEROES, 16, 8, 1), OK);
    assert_eq!(range(&mut vm, DISCARD, 24, 8, 0), OK);
    assert_eq!(ask(&mut vm, FLUSH, 0, &[], &[]).0, OK);
    drop(vm);
    let bytes = read(&backing.path).unwrap();
    assert!(bytes[8 * 512..16 * 512].iter().all(|byte| *byte == 0x77), "written through to the image");
    assert!(bytes[16 * 512..24 * 512].iter().all(|byte| *byte == 0));
    assert!(bytes[..512].iter().all(|byte| *byte == 0) && bytes[7 * 512] == 7 && bytes[32 * 512] == 32);
}

#[test]
#[ignore = "run by the test below, in a process of its own"]
fn on_a_host_with_a_limit() {
    const LIMIT: u64 = 512 << 10;
    let _signals = vmm_monitor::api::signals::Signals::take().unwrap();
    let (_keep, disk) = image(SIZE);
    let mut guest = guest(&disk);
    let limit = libc::rlimit { rlim_cur: LIMIT, rlim_max: LIMIT };
    // SAFETY: the call reads the limit and changes nothing else.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    let beyond = LIMIT / 512;
    for (sector, status) in [(0, OK), (beyond - 8, OK), (beyond, IOERR), (beyond - 4, IOERR), (8, OK)] {
        assert_eq!(ask(&mut guest, OUT, sector, &[(BUFFER, 4096)], &[]).0, status, "sector {sector}");
    }
}

#[test]
fn a_limit_of_the_hosts_file_sizes_is_an_io_error_and_no_signal() {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "block::on_a_host_with_a_limit", "--ignored", "--nocapture"]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
}
