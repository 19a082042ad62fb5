//! What KVM has of a machine, as plain values: each vCPU's state, the clock, the interrupt controllers and the timer.
//!
//! By rule: whatever KVM_GET_* offers is in [`SavedVcpu`] or [`SavedVm`], or stands in the table of this module's tests with the
//! reason why not. The order of the calls matters (Documentation/virt/kvm/api.rst; devices/vcpu.rst, 4.1), and each line below
//! that looks arbitrary says what depends on it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, Xsave,
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, KvmNestedStateBuffer};
use serde::{Deserialize, Serialize};

use crate::kvm::{Error, Kvm, Vcpu, Vm, ioctl};

/// The time-stamp counter (SDM vol. 4, table 2-2).
const IA32_TSC: u32 = 0x10;
/// The counter's value at which the local APIC's timer fires; 0 if it is not armed, or has fired.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// KVM takes fewer than 256 at a time (Linux's MAX_IO_MSRS).
const MSRS_PER_CALL: usize = 128;

/// Registers of the local APIC, by their place in its page (SDM vol. 3, table 12-1).
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;

/// What this host's KVM may have of a vCPU beside what all have: the MSRs, in the order in which they are to be set.
#[derive(Debug, Clone)]
pub struct StateList(Arc<[u32]>);

/// A vCPU between two instructions.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedVcpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// As long as the processor's features make it (KVM_CAP_XSAVE2), in words.
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value, in the order of KVM's list; the deadline last.
    msrs: Vec<(u32, u64)>,
    /// kHz, where the host knows.
    tsc_khz: Option<u32>,
    /// What KVM adds to the host's counter, where it tells.
    tsc_offset: Option<u64>,
    /// Of a guest that is a hypervisor itself.
    nested: Option<Box<KvmNestedStateBuffer>>,
    events: kvm_vcpu_events,
}

/// What is the VM's and no vCPU's.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedVm {
    clock: kvm_clock_data,
    /// The two 8259s and the I/O APIC, where they are KVM's.
    chips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
}

/// What the clocks and timers of a restored VM go on from, once its vCPUs run.
#[derive(Debug)]
pub struct SavedClocks {
    clock: kvm_clock_data,
    pit: Option<kvm_pit_state2>,
    vcpus: Vec<VcpuClock>,
}

/// The same of one vCPU.
#[derive(Debug)]
struct VcpuClock {
    tsc_khz: Option<u32>,
    tsc_offset: Option<u64>,
    /// The counter's value at which the timer fires, if there is that register.
    deadline: Option<u64>,
    /// Whether the timer is in the mode of deadlines and may interrupt.
    awaits_deadline: bool,
    /// Initial and current count of a timer that counts down.
    count: Option<(u32, u32)>,
}

impl Vcpu {
    /// The vCPU's state. By the thread that runs it, which has finished the instruction that exited last, while all other vCPUs
    /// stand still. To ask twice gives the same.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn save(&self, vm: &Vm, list: &StateList) -> Result<SavedVcpu, Error> {
        // First: it takes an INIT or SIPI that is pending, and so may change the rest.
        let mp_state = self.mp_state()?;
        let cpuid = ioctl("KVM_GET_CPUID2", self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        Ok(SavedVcpu {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: self.xsave(vm)?,
            xcrs: ioctl("KVM_GET_XCRS", self.fd.get_xcrs())?,
            debug: ioctl("KVM_GET_DEBUGREGS", self.fd.get_debug_regs())?,
            lapic: ioctl("KVM_GET_LAPIC", self.fd.get_lapic())?,
            msrs: self.get_msrs(&list.0)?,
            tsc_khz: self.tsc_khz(),
            tsc_offset: self.tsc_offset(),
            nested: self.nested(vm)?,
            // Last: what was pending before is so now.
            events: ioctl("KVM_GET_VCPU_EVENTS", self.fd.get_vcpu_events())?,
        })
    }

    /// Gives a vCPU that was just created, and of which nothing but its number counts, the state of another. The counter of time
    /// is not set, and no timer runs: [`Vm::start_clocks`] sees to both.
    ///
    /// # Errors
    /// The ioctl that failed: this host has not what the other had.
    pub fn restore(&self, vm: &Vm, state: &SavedVcpu) -> Result<(), Error> {
        let cpuid = kvm_bindings::CpuId::from_entries(&state.cpuid)
            .map_err(|_| Error::Missing("room for the CPUID that was saved"))?;
        // Before all else: what may be in the others depends on it.
        ioctl("KVM_SET_CPUID2", self.fd.set_cpuid2(&cpuid))?;
        if let Some(khz) = state.tsc_khz.filter(|khz| self.tsc_khz() != Some(*khz)) {
            ioctl("KVM_SET_TSC_KHZ", self.fd.set_tsc_khz(khz))?;
        }
        ioctl("KVM_SET_MP_STATE", self.fd.set_mp_state(state.mp_state))?;
        // It drops pending exceptions, so it comes before the events.
        ioctl("KVM_SET_REGS", self.fd.set_regs(&state.regs))?;
        // With the local APIC's base, so before the local APIC.
        ioctl("KVM_SET_SREGS", self.fd.set_sregs(&state.sregs))?;
        if let Some(nested) = &state.nested {
            ioctl("KVM_SET_NESTED_STATE", self.fd.set_nested_state(nested))?;
        }
        ioctl("KVM_SET_XCRS", self.fd.set_xcrs(&state.xcrs))?;
        self.set_xsave(vm, &state.xsave)?;
        ioctl("KVM_SET_DEBUGREGS", self.fd.set_debug_regs(&state.debug))?;
        // Before the deadline: KVM drops one that comes while the timer is not in that mode. A timer that counts would begin here.
        let mut lapic = state.lapic;
        set_register(&mut lapic, INITIAL_COUNT, 0);
        ioctl("KVM_SET_LAPIC", self.fd.set_lapic(&lapic))?;
        // Not the deadline yet, which is compared with a counter that does not count right yet.
        let msrs = state.msrs.iter().copied().filter(|(index, _)| *index != IA32_TSC_DEADLINE);
        let msrs: Vec<_> = msrs.collect();
        msrs.chunks(MSRS_PER_CALL).try_for_each(|batch| self.set_msrs(batch))?;
        ioctl("KVM_SET_VCPU_EVENTS", self.fd.set_vcpu_events(&state.events))
    }

    /// Arms the timer that was armed. The counter counts right.
    fn start_timer(&self, saved: &VcpuClock) -> Result<(), Error> {
        if let Some((initial, current)) = saved.count {
            // As it is now: interrupts may have come since it was restored.
            let mut lapic = ioctl("KVM_GET_LAPIC", self.fd.get_lapic())?;
            set_register(&mut lapic, INITIAL_COUNT, initial);
            set_register(&mut lapic, CURRENT_COUNT, current);
            ioctl("KVM_SET_LAPIC", self.fd.set_lapic(&lapic))?;
        }
        let deadline = match saved.deadline {
            None => return Ok(()),
            // One that has fired reads as 0, and its interrupt may not have been there yet: it fires again, at once.
            Some(0) if saved.awaits_deadline => self.get_msrs(&[IA32_TSC])?.first().map_or(0, |now| now.1),
            Some(deadline) => deadline,
        };
        self.set_msrs(&[(IA32_TSC_DEADLINE, deadline)])
    }

    fn xsave(&self, vm: &Vm) -> Result<Vec<u32>, Error> {
        let Some(words) = vm.xsave_words() else {
            let state = ioctl("KVM_GET_XSAVE", self.fd.get_xsave())?;
            return Ok(state.region.to_vec());
        };
        let more = words - XSAVE_WORDS;
        let mut state = Xsave::new(more).map_err(|_| Error::Missing("room for XSAVE"))?;
        // SAFETY: it has room for as much as KVM_CAP_XSAVE2 tells, and nothing enables more of the processor meanwhile.
        ioctl("KVM_GET_XSAVE2", unsafe { self.fd.get_xsave2(&mut state) })?;
        let region = state.as_fam_struct_ref().xsave.region;
        Ok(region.iter().chain(state.as_slice()).copied().collect())
    }

    fn set_xsave(&self, vm: &Vm, words: &[u32]) -> Result<(), Error> {
        let room = vm.xsave_words().unwrap_or(XSAVE_WORDS);
        if words.len() < XSAVE_WORDS || words.len() > room {
            return Err(Error::Missing("as much XSAVE state as was saved"));
        }
        // As long as KVM takes it for, whatever was saved.
        let mut state = Xsave::new(room - XSAVE_WORDS).map_err(|_| Error::Missing("room for XSAVE"))?;
        let (first, more) = words.split_at(XSAVE_WORDS);
        state.as_mut_slice()[..more.len()].copy_from_slice(more);
        // SAFETY: the length stays; these are plain words.
        unsafe { state.as_mut_fam_struct() }.xsave.region.copy_from_slice(first);
        // SAFETY: as long as KVM_CAP_XSAVE2 tells, which is as much as it reads.
        ioctl("KVM_SET_XSAVE", unsafe { self.fd.set_xsave2(&state) })
    }

    /// Those of `indices` that this vCPU has.
    fn get_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
        let mut values = Vec::with_capacity(indices.len());
        let mut left = indices;
        while !left.is_empty() {
            let (batch, _) = left.split_at(left.len().min(MSRS_PER_CALL));
            let entries: Vec<_> =
                batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::Missing("room for MSRs"))?;
            let got = ioctl("KVM_GET_MSRS", self.fd.get_msrs(&mut msrs))?;
            values.extend(msrs.as_slice().iter().take(got).map(|msr| (msr.index, msr.data)));
            // KVM stops at one that this CPUID does not have.
            let skip = usize::from(got < batch.len());
            left = &left[got + skip..];
        }
        Ok(values)
    }

    fn nested(&self, vm: &Vm) -> Result<Option<Box<KvmNestedStateBuffer>>, Error> {
        if !vm.fd.check_extension(Cap::NestedState) {
            return Ok(None);
        }
        let mut state = Box::new(KvmNestedStateBuffer::empty());
        let used = ioctl("KVM_GET_NESTED_STATE", self.fd.nested_state(&mut state))?;
        Ok(used.map(|_| state))
    }

    /// What KVM adds to the host's counter to make the guest's (devices/vcpu.rst, 4.1); none before Linux 5.16.
    pub fn tsc_offset(&self) -> Option<u64> {
        let mut offset = 0;
        self.device_attr(KVM_GET_DEVICE_ATTR, &mut offset).ok().map(|()| offset)
    }

    /// Sets it.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn set_tsc_offset(&self, mut offset: u64) -> Result<(), Error> {
        let set = self.device_attr(KVM_SET_DEVICE_ATTR, &mut offset);
        set.map_err(|source| Error::Ioctl { ioctl: "KVM_SET_DEVICE_ATTR (KVM_VCPU_TSC_OFFSET)", source })
    }

    fn device_attr(&self, request: libc::Ioctl, value: &mut u64) -> io::Result<()> {
        let (group, attr) = (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into());
        let attr = kvm_device_attr { flags: 0, group, attr, addr: &raw mut *value as u64 };
        // SAFETY: the attribute is 8 bytes long, which `value` is, and it lives longer than the call.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw const attr) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl SavedVcpu {
    /// What it says of its processor.
    pub(super) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    fn clock(&self) -> VcpuClock {
        const MASKED: u32 = 1 << 16;
        // The mode is in bits 17 and 18 of the LVT timer register (SDM vol. 3, 12.5.4): 2 is that of deadlines.
        let timer = register(&self.lapic, LVT_TIMER);
        let has_deadlines = timer >> 17 & 3 == 2;
        let counts = (register(&self.lapic, INITIAL_COUNT), register(&self.lapic, CURRENT_COUNT));
        let msr = |wanted| self.msrs.iter().find(|(index, _)| *index == wanted).map(|(_, value)| *value);
        VcpuClock {
            tsc_khz: self.tsc_khz,
            tsc_offset: self.tsc_offset,
            deadline: msr(IA32_TSC_DEADLINE),
            awaits_deadline: has_deadlines && timer & MASKED == 0,
            count: Some(counts).filter(|(initial, _)| !has_deadlines && *initial != 0),
        }
    }
}

impl SavedClocks {
    /// Those of a machine that was saved.
    pub fn of(vm: &SavedVm, vcpus: &[SavedVcpu]) -> Self {
        Self { clock: vm.clock, pit: vm.pit, vcpus: vcpus.iter().map(SavedVcpu::clock).collect() }
    }
}

/// A register of a local APIC.
fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    lapic.regs[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte as u8))
}

fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    let bytes = value.to_le_bytes().map(|byte| byte as _);
    lapic.regs[at..at + 4].copy_from_slice(&bytes);
}

/// Words of an XSAVE area as it was before KVM_CAP_XSAVE2.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();
// _IOW(KVMIO, 0xe1 and 0xe2, struct kvm_device_attr).
const KVM_SET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::Ioctl = 0x4018_aee2;

impl Kvm {
    /// What [`Vcpu::save`] is to look for.
    ///
    /// # Errors
    /// The ioctl failed.
    pub fn state_list(&self) -> Result<StateList, Error> {
        let list = ioctl("KVM_GET_MSR_INDEX_LIST", self.fd.get_msr_index_list())?;
        let mut indices = list.as_slice().to_vec();
        indices.sort_by_key(|index| *index == IA32_TSC_DEADLINE);
        Ok(StateList(indices.into()))
    }
}

impl Vm {
    /// Words of the XSAVE area of this VM's vCPUs; `None` where KVM does not tell (before Linux 5.17) and it is as it always was.
    fn xsave_words(&self) -> Option<usize> {
        let bytes = usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).ok()?;
        (bytes != 0).then(|| bytes.div_ceil(size_of::<u32>()).max(XSAVE_WORDS))
    }

    /// What is no vCPU's. With the vCPUs and devices at rest.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn save(&self) -> Result<SavedVm, Error> {
        let mut chips = Vec::new();
        if self.arch.has_pics() {
            for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                ioctl("KVM_GET_IRQCHIP", self.fd.get_irqchip(&mut chip))?;
                chips.push(chip);
            }
        }
        Ok(SavedVm {
            clock: ioctl("KVM_GET_CLOCK", self.fd.get_clock())?,
            chips,
            // Refused where there is none.
            pit: self.fd.get_pit2().ok(),
        })
    }

    /// Gives a VM that was just created what another had, but for its clock and timer: [`Vm::start_clocks`] sets them.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn restore(&self, state: &SavedVm) -> Result<(), Error> {
        for chip in &state.chips {
            ioctl("KVM_SET_IRQCHIP", self.fd.set_irqchip(chip))?;
        }
        Ok(())
    }

    /// Has the clocks and timers of a restored VM go on, a moment before its vCPUs do, however long ago it was restored: the guest's clock (kvmclock) is ahead by the time that
    /// went by on this host's wall clock since it was saved, and the counters of its vCPUs by as much, all alike
    /// (devices/vcpu.rst, 4.1). Where KVM tells too little for that (before Linux 5.16, or a counter that is not stable), both go
    /// on from where they stood.
    ///
    /// # Errors
    /// The ioctl that failed.
    pub fn start_clocks(&self, saved: &SavedClocks, vcpus: &[Vcpu]) -> Result<(), Error> {
        let then = &saved.clock;
        // What else KVM tells of a clock is not for it to be told.
        let flags = then.flags & KVM_CLOCK_REALTIME;
        let clock =
            kvm_clock_data { clock: then.clock, realtime: then.realtime, flags, ..Default::default() };
        ioctl("KVM_SET_CLOCK", self.fd.set_clock(&clock))?;
        let now = ioctl("KVM_GET_CLOCK", self.fd.get_clock())?;
        let both_tell = then.flags & now.flags & KVM_CLOCK_HOST_TSC != 0;
        for (vcpu, saved) in vcpus.iter().zip(&saved.vcpus) {
            if let (true, Some(offset), Some(khz)) = (both_tell, saved.tsc_offset, saved.tsc_khz) {
                let ahead = i128::from(now.clock) - i128::from(then.clock);
                let ticks = ahead * i128::from(khz) / 1_000_000;
                let offset =
                    offset.wrapping_add(ticks as u64).wrapping_add(then.host_tsc).wrapping_sub(now.host_tsc);
                vcpu.set_tsc_offset(offset)?;
            }
            vcpu.start_timer(saved)?;
            vcpu.announce_pause();
        }
        if let Some(pit) = &saved.pit {
            ioctl("KVM_SET_PIT2", self.fd.set_pit2(pit))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Numbers in a state of which each list has one entry. A zero is a byte, whatever its size.
    #[test]
    fn a_state_with_more_or_less_in_it_wants_a_new_version() {
        let vcpu = SavedVcpu {
            cpuid: vec![kvm_cpuid_entry2::default()],
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: vec![0],
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![(0, 0)],
            tsc_khz: Some(0),
            tsc_offset: Some(0),
            nested: None,
            events: kvm_vcpu_events::default(),
        };
        let vm = SavedVm {
            clock: kvm_clock_data::default(),
            chips: vec![kvm_irqchip::default()],
            pit: Some(kvm_pit_state2::default()),
        };
        let sizes = [postcard::to_stdvec(&vcpu).unwrap().len(), postcard::to_stdvec(&vm).unwrap().len()];
        assert_eq!(sizes, [2132, 686], "of version 1 each (machine::saved)");
    }

    /// What KVM gives that is in [`super::SavedVcpu`] or [`super::SavedVm`], in an older form or a newer one.
    const SAVED: [&str; 16] = [
        "CLOCK",
        "CPUID2",
        "DEBUGREGS",
        "DEVICE_ATTR",
        "IRQCHIP",
        "LAPIC",
        "MP_STATE",
        "MSRS",
        "NESTED_STATE",
        "PIT2",
        "REGS",
        "SREGS",
        "TSC_KHZ",
        "VCPU_EVENTS",
        "XCRS",
        "XSAVE2",
    ];
    /// The rest, and why it is not.
    const NOT_SAVED: [(&str, &str); 16] = [
        ("API_VERSION", "the host's"),
        ("DIRTY_LOG", "of the monitor's own making"),
        ("EMULATED_CPUID", "the host's"),
        ("FPU", "in XSAVE"),
        ("MSR_FEATURE_INDEX_LIST", "the host's"),
        ("MSR_INDEX_LIST", "the host's: it says which MSRs are saved"),
        ("NR_MMU_PAGES", "the host's"),
        ("ONE_REG", "other architectures' registers"),
        ("PIT", "in PIT2"),
        ("REG_LIST", "other architectures' registers"),
        ("SREGS2", "SREGS, and page-directory pointers that KVM reads again from the guest's memory"),
        ("STATS_FD", "counters of the host's"),
        ("SUPPORTED_CPUID", "the host's: a vCPU's own is saved"),
        ("SUPPORTED_HV_CPUID", "the host's: a vCPU's own is saved"),
        ("VCPU_MMAP_SIZE", "the host's"),
        ("XSAVE", "in XSAVE2"),
    ];

    #[test]
    fn whatever_kvm_tells_is_saved_or_there_is_a_reason() {
        // Of the C library's build, so it is wherever this is built.
        let header = std::fs::read_to_string("/usr/include/linux/kvm.h").unwrap();
        let defined = header.lines().filter_map(|line| line.strip_prefix("#define KVM_GET_"));
        let defined: BTreeSet<_> = defined.filter_map(|rest| rest.split_whitespace().next()).collect();
        let known: BTreeSet<_> = SAVED.into_iter().chain(NOT_SAVED.map(|(name, _)| name)).collect();
        let unknown: Vec<_> = defined.difference(&known).collect();
        assert!(unknown.is_empty() && defined.len() > 20, "{unknown:?} of {defined:?}");
    }
}
