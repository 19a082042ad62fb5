//! Builds what runs inside a VM: kernels, initramfs images, root file systems. `cargo guest -- ...` is its command line
//! (`main.rs`); tests may use it as a library. It runs on Debian and takes everything from Debian's packages.
//!
//! ```text
//! kernel      which kernels there are        stock    Debian's, fetched      tuned    ours, built (kconfig checks it)
//! initramfs   PID 1, busybox, modules        cpio     the format             modules  what to load, in which order
//! rootfs      ext4 images                    programs what goes into both    bzimage  the vmlinux inside
//! cache       finished items, or none        debian   packages               run      tools
//! ```

pub mod bundle;
pub mod bzimage;
pub mod cache;
pub mod debian;
pub mod disk;
pub mod initramfs;
pub mod kconfig;
pub mod kernel;
pub mod modules;
pub mod programs;
pub mod rootfs;
pub mod run;
pub mod stock;
pub mod tuned;
