//! The real gdb and the first steps of Linux. They need no more of KVM than tiny guests do.

use std::path::Path;

use crate::gdb::in_order;
use crate::guests::*;
use crate::place::*;

#[test]
fn breakpoints_find_linux_at_its_first_function() {
    const TEST: &str = "breakpoints_find_linux_at_its_first_function";
    if !has_kvm(TEST) {
        return;
    }
    let vmlinux =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("target/guests/tuned-vmlinux");
    if !vmlinux.exists() {
        assert!(std::env::var_os("CI").is_none(), "{TEST}: no {}", vmlinux.display());
        eprintln!("SKIP: {TEST}: this machine lacks the guests: cargo guest bundle --out target/guests");
        return;
    }
    let place = Place::new();
    let guest = start(&place, &format!("--kernel {} --mem 128M", vmlinux.display()));
    let file = format!("symbol-file {}", vmlinux.display());
    let said = ask(
        &place,
        &[
            &file,
            "hbreak start_kernel",
            "continue",
            "bt 2",
            "p $efer",
            "stepi",
            "break setup_arch",
            "continue",
            "bt 2",
            "kill",
        ],
    );
    in_order(
        &said,
        &[
            "Breakpoint 1, ",
            "in start_kernel ()",
            "in secondary_startup_64 ()",
            "LME LMA",
            "in start_kernel ()",
            "Breakpoint 2, ",
            "in setup_arch ()",
            "in start_kernel ()",
        ],
    );
    assert_eq!(guest.finish().status.code(), Some(KILLED));
}
