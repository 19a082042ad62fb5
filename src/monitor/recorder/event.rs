//! [`Event`]: one thing that happened, in 48 bytes.

use std::ops::Range;

use super::clock;
use super::frame::Frame;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One thing that happened. What the fields mean depends on the [`Kind`]; those that it does not name are 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Event {
    /// When, in ticks of [`clock`]: for an exit, when the monitor had the vCPU back.
    pub time: u64,
    /// Ticks that the vCPU was away in KVM_RUN before: in the guest, or halted, or in KVM.
    pub guest: u64,
    /// Guest instruction pointer.
    pub rip: u64,
    /// Port, guest physical address, queue.
    pub address: u64,
    /// What was read or written: the first element.
    pub value: u64,
    /// Ticks from `time` until the answer was there; at its maximum: that or longer.
    pub handled: u32,
    /// A [`Kind`], as a number.
    pub kind: u8,
    /// Bytes of an element.
    pub size: u8,
    /// Elements; at 255: that or more.
    pub count: u8,
    /// 0 in records. In a trace that was read and has the exits inside KVM: one more than the number, in the trace, of the
    /// reason that hardware gave for an exit to the monitor.
    pub reason: u8,
}

impl Event {
    /// Words of 64 bits that hold an event.
    pub const WORDS: usize = size_of::<Self>() / 8;

    /// What it is; `None` for a number that this version does not know.
    pub fn kind(&self) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == self.kind)
    }
}

/// What happened. The numbers stand in files, so they do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// IN or INS: `address` is the port, `value` the first element read.
    PioIn = 1,
    /// OUT or OUTS.
    PioOut = 2,
    /// A read of an address without memory.
    MmioRead = 3,
    /// A write to one.
    MmioWrite = 4,
    /// HLT.
    Halt = 5,
    /// Triple fault.
    Shutdown = 6,
    /// A paravirtual request: `address` is its number.
    SystemEvent = 7,
    /// The processor refused the guest's state: `value` is its reason.
    FailEntry = 8,
    /// KVM gave up: `address` is the suberror.
    InternalError = 9,
    /// A breakpoint or step.
    Debug = 10,
    /// End of interrupt: `address` is the vector.
    IoApicEoi = 11,
    /// A signal to the vCPU's thread: pause, stop.
    Kicked = 12,
    /// Another reason: `address` is KVM's number.
    Other = 13,
    /// The bytes of code at `rip`, first seen: 8 in `address`, the rest in `value`, `count` in all; `size` is the mode: 16, 32,
    /// 64 bits.
    Code = 14,
    /// A device's worker takes queue `address` up. `value`: requests that it completed then; `handled`: how long it took.
    Queue = 15,
    /// A device's worker looks at its host end `address`; the rest as for `Queue`.
    Source = 16,
    /// A device interrupts the guest: `address` is the queue, or all ones for a change of its configuration.
    Interrupt = 17,
    /// An exit that KVM answered by itself: `address` and `value` are what hardware says of it, `count` the number of its
    /// reason in the trace. Not recorded by threads, but read from the kernel.
    InKernel = 18,
    /// Four words of the vCPU's registers at the exit of the same `time` on the same track: in `guest`, `rip`, `address` and
    /// `value`; `count` says which four: see [`Registers`](super::Registers).
    Registers = 19,
    /// The monitor's own work before the guest runs: `address` is the [`Step`](super::Step), `time` when it began, `value` the
    /// ticks that it took; `guest` has the step's counts, if it has some, the
    /// second above 32 bits.
    Step = 20,
    /// RDMSR of a model-specific register that `--cpu` denies: `address` is its number. `count` is 0: nothing was read.
    MsrRead = 21,
    /// WRMSR: `address` is the register's number, `count` 0 where it was denied.
    MsrWrite = 22,
    /// A hypercall of Hyper-V's: `address` is its input, `value` its status.
    Hypercall = 23,
    /// A frame of a network device: see [`Event::frame`].
    Frame = 24,
    /// Of the memory of a machine that goes on from a saved one, at its end: pages that were read in `address`, those that were
    /// written to in `value`; page faults of the monitor's process while the guest ran in `guest`, those that waited for a disk
    /// in `rip`.
    Pages = 25,
    /// A stretch of the pages of that memory which were written to by its end, or copied ahead of the guest: see
    /// [`Event::stretch`].
    Stretch = 26,
    /// A page fault of a thread of the monitor in guest memory: `address` is the guest's, `value` the processor's error code. Not
    /// recorded by threads, but read from the kernel.
    HostFault = 27,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 27] = [
        Self::PioIn,
        Self::PioOut,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Halt,
        Self::Shutdown,
        Self::SystemEvent,
        Self::FailEntry,
        Self::InternalError,
        Self::Debug,
        Self::IoApicEoi,
        Self::Kicked,
        Self::Other,
        Self::Code,
        Self::Queue,
        Self::Source,
        Self::Interrupt,
        Self::InKernel,
        Self::Registers,
        Self::Step,
        Self::MsrRead,
        Self::MsrWrite,
        Self::Hypercall,
        Self::Frame,
        Self::Pages,
        Self::Stretch,
        Self::HostFault,
    ];

    /// Whether it is an exit of a vCPU that reached the monitor.
    pub fn is_exit(self) -> bool {
        self <= Self::Other || matches!(self, Self::MsrRead | Self::MsrWrite | Self::Hypercall)
    }

    /// Whether it is an exit that an instruction asked for, so that the code there tells more.
    pub fn has_instruction(self) -> bool {
        self.is_exit() && !(Self::Shutdown..=Self::Other).contains(&self)
    }

    /// Whether it belongs to another event, or to none of a guest's, and is not told by itself.
    pub fn is_detail(self) -> bool {
        matches!(
            self,
            Self::Code | Self::Registers | Self::Step | Self::Pages | Self::Stretch | Self::HostFault
        )
    }
}

/// In `address` of a [`Kind::Frame`], above its length: the guest's.
const FROM_GUEST: u64 = 1 << 32;

impl Event {
    /// A frame that passed at `time`: the length and the direction in `address`, the ends in `rip` and `value`, the protocol in `count`
    /// and its detail in `size`, the EtherType and the ports in `guest`.
    pub fn frame(time: u64, frame: Frame) -> Self {
        let ports = u64::from(frame.source_port) << 16 | u64::from(frame.destination_port);
        Self {
            time,
            kind: Kind::Frame as u8,
            address: u64::from(frame.len) | if frame.from_guest { FROM_GUEST } else { 0 },
            rip: frame.source,
            value: frame.destination,
            count: frame.protocol,
            size: frame.detail,
            guest: u64::from(frame.kind) << 32 | ports,
            ..Self::default()
        }
    }

    /// Pages that lie side by side in guest memory, at these addresses: the first in `address`, the one behind the last in `value`.
    /// `count` is 1 if they were copied `ahead`.
    pub fn stretch(addresses: Range<u64>, ahead: bool) -> Self {
        let (time, kind) = (clock::ticks(), Kind::Stretch as u8);
        let Range { start: address, end: value } = addresses;
        Self { time, kind, address, value, count: ahead.into(), ..Self::default() }
    }

    /// Undoes [`Event::frame`].
    pub fn as_frame(&self) -> Frame {
        Frame {
            from_guest: self.address & FROM_GUEST != 0,
            len: self.address as u32,
            kind: (self.guest >> 32) as u16,
            source: self.rip,
            destination: self.value,
            protocol: self.count,
            source_port: (self.guest >> 16) as u16,
            destination_port: self.guest as u16,
            detail: self.size,
        }
    }
}
