//! `vmm`: a type-2 hypervisor. A Linux process that opens `/dev/kvm`, maps guest memory, loads a kernel, runs one thread
//! per vCPU, and answers VM exits (trap and emulate) with device models.
//!
//! # The map
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | [`VmConfig`](config::VmConfig): one tree for the command line and the configuration file |
//! | [`state`] | saved state: one plain value per part |
//! | [`threads`], [`event_loop`] | the one place that makes threads; loops that wait for descriptors |
//! | [`guest_log`] | rate-limited warnings about the guest |
//! | [`output`], [`printable`] | creates the files that a run writes; makes foreign text fit for a terminal |
//! | [`recorder`] | events of fixed size in a lock-free ring per thread; one branch per exit while it is off |
//! | [`memory`] | guest RAM; [`memory::layout`] is the table of every guest address |
//! | [`vm`], [`bus`] | what devices may ask of the hypervisor; address to device |
//! | [`disk`], [`chardev`] | host ends: disk images; terminals, pipes, sockets. They know no virtio |
//! | [`kvm`] | the only module that issues KVM ioctls |
//! | [`legacy`], [`virtio`] | device models, one file or folder each; they know neither KVM nor the machine |
//! | [`boot`], [`vcpu`] | loaders and ACPI tables; the vCPU thread and its dispatch |
//! | [`machine`] | what a machine has ([`machine::inventory()`]), its assembly ([`machine::load`]), its life |
//! | [`session`], [`api`] | a run from start to end, over its reboots; names and control sockets |
//!
//! Other crates stand on this one: `src/trace` tells recordings as sentences, adds up what a running machine does, steps
//! through it and has the labs; `src/bench` measures; `src/cli` is the command line. The monitor knows none of them.
//!
//! **Layers.** A module uses only those on its own line of this list and on the lines above it; `unsafe` stands only in
//! `recorder` (its clock), `memory`, `kvm` and `disk`. `tests/architecture.rs` holds the code against it.
//!
//! ```text
//! 0 threads event_loop state config guest_log output printable recorder
//! 1 memory vm bus
//! 2 disk chardev
//! 3 kvm
//! 4 legacy virtio        never kvm, machine, or another family of devices
//! 5 boot vcpu
//! 6 machine
//! 7 session api
//! ```
//!
//! # Four flows, each one way
//!
//! 1. **Boot**: `VmConfig` → `Inventory` → `Memory` → `kvm::Vm` while `boot::load` runs (tables, kernel, initrd → `Entry`) →
//!    devices on the buses → vCPUs → vCPU 0's registers from `Entry` → run.
//! 2. **Exit**: KVM_RUN → [`kvm::exit`] → [`recorder`], if it is on → [`vcpu::dispatch`] → [`bus::Bus`] → [`bus::Device`] →
//!    [`bus::Effect`] → next entry or the run's end. A virtqueue kick does not come this way.
//! 3. **Block**: ioeventfd → the device's worker locks it → `on_queue` pops and parses → [`disk::Disk::submit`] → I/O thread →
//!    `on_event` → status byte → used ring → irqfd.
//! 4. **Pause**: the [`gate`](vcpu::gate) closes and vCPUs park → each device stops its worker and comes to
//!    rest → nothing moves. Every part can then give its state ([`state::Saved`]). If a device is not at rest
//!    in time (its disk hangs), the pause fails and the machine runs on.
//!
//! With a disk and no kernel, the kernel is a program of ours that finds one on the disk ([`config::Kernel`],
//! `firmware/disk`). With firmware the first flow is shorter: the ROM is a memory slot, `Entry` is the reset vector, and the
//! firmware asks [`legacy::fw_cfg`] for what [`boot::firmware`] prepared.
//!
//! **Guest memory is shared with an adversary.** Descriptors and headers are read once into owned memory. Nothing that a guest
//! writes may panic, hang or grow the monitor: it gets what the spec says (0xff, a status byte, DEVICE_NEEDS_RESET).

pub mod api;
pub mod boot;
pub mod bus;
pub mod chardev;
pub mod config;
pub mod disk;
pub mod event_loop;
pub mod guest_log;
pub mod kvm;
pub mod legacy;
pub mod machine;
pub mod memory;
pub mod output;
pub mod printable;
pub mod recorder;
pub mod session;
pub mod state;
pub mod threads;
pub mod vcpu;
pub mod virtio;
pub mod vm;

/// An error and its sources on one line, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
