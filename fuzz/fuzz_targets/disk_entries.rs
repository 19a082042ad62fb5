//! Boot Loader Specification entries, grub.cfg with grubenv, extlinux.conf, unified images, versions, command
//! lines and setup headers of any content.
#![no_main]

use bootdisk::entries::{Entries, order};
use bootdisk::unified::Unified;
use bootdisk::variables::Variables;
use bootdisk::{bls, cmdline, grub, linux, syslinux, version};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |byte| *byte == 0xff);
    let (first, second) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    assert_eq!(version::compare(first, second), version::compare(second, first).reverse());
    let mut found = Entries::new();
    let mut variables = Variables::NONE;
    variables.load(second);
    for (text, variables) in [(first, None), (second, None), (data, None), (data, Some(&variables))] {
        if let Ok(entry) = bls::parse(first, text, variables) {
            (0..20).for_each(|_| found.insert(entry, order));
        }
    }
    found.all().iter().for_each(|entry| entry.show(&mut String::new()).unwrap());
    let mut found = Entries::new();
    let _ = grub::parse(first, second, &mut found);
    assert!(found.default == 0 || found.default < found.all().len());
    syslinux::parse(data, first, &mut found);
    assert!(found.default == 0 || found.default < found.all().len());
    if let Ok(line) = cmdline::join(first, second, 2047) {
        assert!(line.bytes().len() <= 2047);
    }
    if let Ok(image) = Unified::parse(data, 1 << 20) {
        assert!(image.linux.size > 0 && image.linux.offset + image.linux.size <= 1 << 20);
    }
    if let Ok(setup) = linux::Setup::parse(data, 1 << 20) {
        let ram = [0..1 << 20, 1 << 20..64 << 20];
        if let Some(at) = setup.place(&ram, &[0..2 << 20]) {
            assert!(at >= 2 << 20 && at + setup.init_size <= 64 << 20);
        }
    }
});
