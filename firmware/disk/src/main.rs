//! The program that boots a disk: a PVH kernel, whose job is to find another kernel.
//!
//! [`entry`] switches to long mode; [`main`] goes from the devices to the disks, file systems, entries and menu; [`handover`]
//! enters Linux. The parts that read what the disk says are in the library beside it.
#![no_std]
#![no_main]

mod block;
mod clock;
mod console;
mod entry;
mod handover;
mod memory;
mod menu;
mod start_info;
mod virtio;

use block::{Block, Cache};
use bootdisk::entries::{self, Entries};
use bootdisk::partition;
use bootdisk::unknown::Inhabitant;
use bootdisk::volume::Volume;
use console::{Console, say};
use core::cell::UnsafeCell;
use start_info::StartInfo;

const MAX_DISKS: usize = 4;
const MAX_VOLUMES: usize = 16;

/// Too large for the stack.
struct Large {
    entries: Entries,
    scratch: [u8; 128 << 10],
    caches: [Cache; MAX_DISKS],
}

/// A static that only [`main`] takes, once.
struct Once<T>(UnsafeCell<T>);
// SAFETY: there is one processor and no interrupt.
unsafe impl<T> Sync for Once<T> {}
static LARGE: Once<Large> = Once(UnsafeCell::new(Large {
    entries: Entries::new(),
    scratch: [0; 128 << 10],
    caches: [Cache::EMPTY; MAX_DISKS],
}));

/// What [`entry`] calls, in 64-bit mode with a stack.
extern "C" fn main(start_info: u64) -> ! {
    let mut console = Console::open();
    // SAFETY: this is called once.
    let large = unsafe { &mut *LARGE.0.get() };
    // SAFETY: the monitor's promise (PVH), in identity-mapped memory.
    match unsafe { StartInfo::read(start_info) } {
        Some(info) => boot(&info, &mut console, large),
        None => say!(&mut console, "no PVH start_info"),
    }
    console.flush();
    virtio::reset_all();
    entry::give_up()
}

/// Boots what it finds. Returns if there is nothing that can be booted, having said so.
fn boot(info: &StartInfo, console: &mut Console, large: &mut Large) {
    let mut disks = [const { None::<Block> }; MAX_DISKS];
    for ((slot, cache), device) in disks.iter_mut().zip(&mut large.caches).zip(virtio::devices(block::KIND)) {
        *slot = Block::open(device, cache);
    }
    let mut volumes = [const { None::<Volume> }; MAX_VOLUMES];
    let mut free = volumes.iter_mut();
    for disk in disks.iter().flatten() {
        match partition::find(disk) {
            Ok(found) => {
                for partition in found.all() {
                    let Ok(volume) = Volume::open(disk, *partition) else { continue };
                    if volume.needs_recovery() {
                        say!(
                            console,
                            "{} {} was not unmounted: its last changes may not be seen",
                            volume.kind(),
                            volume.uuid()
                        );
                    }
                    if let Some(slot) = free.next() {
                        *slot = Some(volume);
                    }
                }
            }
            Err(error) => say!(console, "partition table: {error}"),
        }
    }
    let mut notes = 0;
    entries::find(&volumes, &mut large.scratch, &mut large.entries, &mut |text| {
        notes += 1;
        // A disk may hold any number of wrong things.
        if notes < 16 {
            say!(console, "{text}");
        }
    });
    let count = large.entries.all().len();
    if count == 0 {
        say!(console, "nothing to boot on these disks:");
        for (disk, letter) in disks.iter().zip('a'..) {
            let Some(disk) = disk else { continue };
            for partition in partition::find(disk).unwrap_or_default().all() {
                say!(console, "  vd{letter}{}", Inhabitant::of(disk, *partition));
            }
        }
        let hint = "--kernel FILE --initrd FILE --cmdline 'root=...'";
        say!(console, "if there is a Linux, give its kernel from outside: {hint}");
        return;
    }
    // What does not load is left out, and the next one tried, once each.
    let mut choice = menu::choose(&large.entries, console);
    for _ in 0..count {
        if let Some(entry) = large.entries.all().get(choice)
            && let Some(Some(volume)) = volumes.get(entry.volume)
        {
            match handover::load(entry, volume, info) {
                Ok(ready) => {
                    console.flush();
                    virtio::reset_all();
                    ready.enter();
                }
                Err(error) => say!(console, "{}: {error}", entry.linux),
            }
        }
        choice = (choice + 1) % count;
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    virtio::reset_all();
    let mut console = Console::open();
    say!(&mut console, "bug: the disk boot program panicked");
    console.flush();
    entry::give_up()
}
