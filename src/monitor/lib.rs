//! `vmm`: a type-2 hypervisor. A Linux process that opens `/dev/kvm`, maps guest memory, loads a kernel, runs one thread
//! per vCPU, and answers VM exits (trap and emulate) with device models.
//!
//! # The map
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | [`VmConfig`](config::VmConfig): one tree for the command line and the configuration file |
//! | [`state`] | saved state: one plain value per part |
//! | [`sandbox`] | what the process may name and a thread may ask of the host's kernel once a guest runs: a root of its own, landlock, a list of system calls for each role; and what it may take of the host ([`sandbox::limits`]) |
//! | [`threads`], [`event_loop`] | the one place where threads are made, each with its role; loops that wait for descriptors and call handlers |
//! | [`poller`], [`timer`], [`listener`] | many descriptors behind one; a moment as a descriptor; a unix socket that only its owner can open |
//! | [`guest_log`] | rate-limited warnings about the guest |
//! | [`runtime_dir`] | where the sockets of this user's machines are |
//! | [`planted`] | how files are opened whose names other users may have planted |
//! | [`output`], [`printable`] | how files are made that a run writes; text of others that a terminal may show |
//! | [`recorder`] | what happens as fixed-size events, in a lock-free ring per thread; one branch per exit while it is off |
//! | [`memory`] | guest RAM; [`memory::layout`] is the table of every guest address |
//! | [`vm`], [`bus`], [`hyperv`] | what devices may ask of the hypervisor; address to device; Hyper-V's calls, which KVM passes on |
//! | [`disk`], [`net`], [`vsock`], [`chardev`], [`share`] | host ends: disk images; taps and sockets that carry frames, a segment that machines share ([`net::switch`]), and a network of ours ([`net::user`]); unix sockets or AF_VSOCK behind a guest's connections; terminals, pipes, sockets; folders, by a FUSE server. They know no virtio |
//! | [`vhost`] | rings that another process serves (vhost-user), or the host's kernel, whatever the device |
//! | [`backends`] | the host ends of one machine, which stay open over its reboots |
//! | [`kvm`] | the only module that issues KVM ioctls; `kvm/x86_64` has what that architecture has alone |
//! | [`legacy`], [`virtio`] | device models, one file or folder each; they know neither KVM nor the machine. `legacy` has those of a PC |
//! | [`pci`] | a PCI bus: configuration space, memory that moves, MSI-X, functions that come and go. One of the two transports of `virtio` is a function on it |
//! | [`boot`], [`vcpu`] | loaders and ACPI tables; the vCPU thread and its dispatch |
//! | [`machine`] | [`machine::inventory`] lists what a configuration amounts to, [`machine::load`] builds that around a [`Shell`](machine::Shell) and fills it from its [`Origin`](machine::Origin), [`Machine`](machine::Machine) runs it |
//! | [`snapshot`] | folders, or files without names: a machine's configuration, state and memory at one moment, and the [`Origin`](machine::Origin) of another |
//! | [`api`] | names, control sockets, signals |
//! | [`pool`] | machines that stand ready in processes of their own until somebody takes them |
//! | [`session`] | [`Session`](session::Session): a run from start to end, over the machines that reboots make |
//!
//! Above it are crates of their own, each in its folder of `src`: `trace` (vmm-trace: records in files, told as sentences; labs; a
//! stub for gdb and single steps), `bench` (vmm-bench: what is compared, and with whom), `command` (vmm-command: exit codes and the
//! log's queue, whose thread alone waits for standard error), `agent` (vmm-agent: what `vmm exec` and the agent in a guest say to
//! each other; it needs nothing of the monitor) and `cli` (the program `vmm`, one file per command).
//!
//! **Layers.** A module uses only those on its own line of this list and on the lines above it; `unsafe` stands in `recorder`
//! (its clock), `memory`, `kvm`, `disk`, `vhost` (ioctls of the host's kernel), `net` (ioctls of taps, pages of connections) and
//! `sandbox` (what a signal tells of a refused call, a child that outlives the process) alone.
//! `tests/architecture.rs` holds the code against it.
//!
//! ```text
//! threads sandbox event_loop poller timer listener state config guest_log output printable recorder runtime_dir planted
//! memory vm bus hyperv
//! vhost disk net vsock chardev share backends
//! kvm
//! legacy virtio pci    never kvm, machine, or another family of devices, but that virtio may be on PCI
//! boot vcpu
//! machine
//! snapshot
//! session api pool
//! ```
//!
//! **Architecture.** What is x86-64's alone lies in a folder of that name in its module: in `boot`, `config`, `kvm`, `recorder`
//! and `vcpu`, and `memory/layout/x86_64.rs`. Each module shows of it what the others may name. The devices of a PC (`legacy`)
//! are x86's by their nature, and so are the list and the assembly of a machine's parts. The few other files that know x86 stand
//! in `tests/architecture.rs`, each with its reason. `build.rs` refuses other targets.
//!
//! **Threads.** One per vCPU; one per virtio device ([`event_loop::Worker`]), a few for the blocking I/O of each disk; the
//! control thread, whose one [`EventLoop`](event_loop::EventLoop) is the session's: control socket, signals, terminal, the serial
//! port's input. The thread that called [`Session::run`](session::Session::run) builds the machine and then waits for its end; the
//! first vCPU's makes the VM meanwhile. A host end that may block has a thread that does the blocking.
//!
//! # Seven flows, each one way
//!
//! 1. **Boot**: `VmConfig` → [`Shell`](machine::Shell): `Memory`, and `kvm::Vm` on the first vCPU's thread; beside it the name,
//!    [`machine::inventory`], [`Origin`](machine::Origin) → `boot::load` (tables from the inventory, kernel, initrd →
//!    [`Entry`](boot::Entry), which is registers as plain data) → the inventory's devices on the buses → vCPUs → their registers
//!    from `Entry` → run.
//! 2. **Exit**: KVM_RUN → [`kvm::exit`] → [`recorder`], if it is on → [`vcpu::dispatch`] → [`bus::Bus`] → [`bus::Device`] → [`bus::Effect`] → next entry or the
//!    run's end. A busy virtqueue's kick does not come this way.
//! 3. **Block**: a kick (an exit first; an ioeventfd once the queue is busy) → the device's worker locks it → `on_queue` pops and parses → [`disk::Disk::submit`] → I/O thread →
//!    `on_event` → status byte → used ring → irqfd.
//! 4. **Net**: the guest's buffers ↔ [`net::Link`] (a tap, a socket, the user network) by one system call a frame, on the device's worker;
//!    or the host's kernel does it, or another process, with the rings ([`virtio::device::Offload`]).
//! 5. **Folder**: a kick → the device's worker locks it and pops one request → without the lock, the [`share::Server`] carries it out, data
//!    straight between file and guest → the worker locks the device, completes, and pops the next ([`virtio::device::Blocking`]).
//! 6. **Pause**: the [`gate`](vcpu::gate) closes and vCPUs park → each device stops its worker and comes to
//!    rest → nothing moves. Every part can then give its state ([`state::Saved`]). If a device is not at rest
//!    in time (its disk hangs), the pause fails and the machine runs on.
//!
//! 7. **Snapshot**: a pause → [`SavedMachine`](machine::SavedMachine), RAM's pages that are not zero, and disks that the guest writes to → files. **Restore** is the
//!    first flow with another [`Origin`](machine::Origin): memory mapped from the file (or [another way](memory::Way)), no kernel, and state in place of an
//!    [`Entry`](boot::Entry).
//!
//! Where no kernel is named and there is a disk, the kernel is a program of ours that finds one there ([`config::Kernel`],
//! `firmware/disk`). With firmware the first flow is shorter: the ROM is a memory slot, there is no `Entry` but the reset vector, and firmware asks
//! [`legacy::fw_cfg`] for what [`boot::firmware`] prepared.
//!
//! **Guest memory is shared with an adversary.** Descriptors and headers are read once into owned memory. Nothing that a guest
//! writes may panic, hang or grow the monitor: it gets what the spec says (0xff, a status byte, DEVICE_NEEDS_RESET).

pub mod api;
pub mod backends;
pub mod boot;
pub mod bus;
pub mod chardev;
pub mod config;
pub mod disk;
pub mod event_loop;
pub mod guest_log;
pub mod hyperv;
pub mod kvm;
pub mod legacy;
pub mod listener;
pub mod machine;
pub mod memory;
pub mod net;
pub mod output;
pub mod pci;
pub mod planted;
pub mod poller;
pub mod pool;
pub mod printable;
pub mod recorder;
pub mod runtime_dir;
pub mod sandbox;
pub mod session;
pub mod share;
pub mod snapshot;
pub mod state;
pub mod threads;
pub mod timer;
pub mod vcpu;
pub mod vhost;
pub mod virtio;
pub mod vm;
pub mod vsock;

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
