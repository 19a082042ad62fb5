//! [`Shell`]: what all machines of a size have in common, guest memory and a VM around it, without contents and devices.
//!
//! KVM takes as long to make a VM as the monitor takes for all else, so the thread that will run the first vCPU makes it, while the
//! session finds its name and the machine's contents are read.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::{Error, Origin};
use crate::config::VmConfig;
use crate::kvm::{self, Controllers, Kvm, Processor};
use crate::memory::Memory;
use crate::memory::working_set::WorkingSet;
use crate::recorder::{Event, Recorder, Step, Steps};
use crate::threads::{Role, spawn};
use crate::vcpu::Seat;

/// A machine without contents and devices, in the making.
#[derive(Debug)]
pub struct Shell {
    /// Zeroes, and the ROM.
    pub(super) memory: Memory,
    seat: Seat,
    made: Receiver<Result<Made, Error>>,
}

/// What the other thread makes.
#[derive(Debug)]
pub(super) struct Made {
    pub vm: kvm::Vm,
    pub processor: Processor,
}

impl Shell {
    /// Begins to make one for the machine that `config` describes, whose contents come from `origin`; none if that is not known yet
    /// and has no memory of its own. The KVM device is opened, unless that is `kvm`. `recorder` is told of the steps.
    ///
    /// # Errors
    /// The host lacks memory or threads. What KVM refuses is told later.
    pub fn begin(
        config: &VmConfig,
        origin: Option<&Origin>,
        kvm: Option<Kvm>,
        recorder: &Arc<Recorder>,
    ) -> Result<Self, Error> {
        let mut steps = Steps::begin(recorder, "monitor");
        let memory = match origin {
            Some(origin) => origin.memory(config)?,
            None => Memory::new(&config.memory())?,
        };
        steps.done(Step::Memory);
        if let Some(Origin::Saved { working_set: Some(set), .. }) = origin
            && memory.lacks(set)
        {
            fetch(&memory, set, recorder);
        }
        let cpus = config.cpus.0;
        let controllers = if config.has_pics() { Controllers::All } else { Controllers::LocalApics };
        let has_processor = matches!(origin, Some(Origin::Saved { .. }));
        let (slots, recorder) = (memory.clone(), recorder.clone());
        let make = move || {
            let mut steps = Steps::begin(&recorder, "vcpu0");
            let kvm = kvm.map_or_else(|| Kvm::open(&kvm_path()), Ok)?;
            if cpus as usize > kvm.max_vcpus() {
                return Err(Error::TooManyCpus { wanted: cpus, possible: kvm.max_vcpus() });
            }
            steps.done(Step::Open);
            let vm = kvm.create_vm(&slots, controllers)?;
            steps.done(Step::Vm);
            let processor = if has_processor { kvm.processor_of_others() } else { kvm.processor()? };
            steps.done(Step::Processor);
            Ok(Made { vm, processor })
        };
        let (seat, made) = Seat::new(0, make).map_err(|source| super::thread_of(0, source))?;
        Ok(Self { memory, seat, made })
    }

    /// Begins one before anything else is known to be right, where that needs no file of the user's and takes no time.
    pub fn early(
        config: &VmConfig,
        origin: Option<&Origin>,
        recorder: &Arc<Recorder>,
    ) -> Option<Result<Self, Error>> {
        let is_slow = config.mem.prefault || origin.is_some_and(|origin| origin.reads_memory(config));
        let is_cheap = config.firmware.is_none() && !is_slow && config.validate().is_ok();
        is_cheap.then(|| Self::begin(config, origin, None, recorder))
    }

    /// Waits for the VM, and gives the thread for its first vCPU.
    ///
    /// # Errors
    /// What KVM refused.
    pub(super) fn finish(self) -> Result<(Made, Seat), Error> {
        // Nothing comes only after a panic over there, which is a defect of ours and was told as one.
        let lost = |_| Error::Host { what: "the VM".to_owned(), source: io::ErrorKind::Interrupted.into() };
        let made = self.made.recv().map_err(lost)??;
        Ok((made, self.seat))
    }
}

/// Begins to fetch the pages of `set`, on a thread beside the rest of the start. Its guest has them all the same where that fails:
/// one by one.
fn fetch(memory: &Memory, set: &WorkingSet, recorder: &Arc<Recorder>) {
    let (memory, set, recorder) = (memory.clone(), set.clone(), recorder.clone());
    let begun = spawn(Role::Fetch, move || {
        let mut steps = Steps::begin(&recorder, "fetch");
        let fetched = memory.fetch(&set);
        let [read, written] = [false, true].map(|written| set.count(written));
        // They are bounded.
        steps.done_with(Step::Fetch, [read as u32, written as u32]);
        drop(steps);
        if recorder.is_on() && fetched.is_ok() {
            let mut track = recorder.track("fetch");
            memory.written_in(&set).into_iter().for_each(|pages| track.write(Event::stretch(pages, true)));
        }
        match fetched {
            Ok(()) => log::debug!(
                "fetched what an earlier start touched: {written} pages that it wrote to, {read} that it read"
            ),
            Err(error) => log::debug!("what an earlier start touched is not fetched: {error}"),
        }
    });
    if let Err(error) = begun {
        log::debug!("what an earlier start touched is not fetched: {error}");
    }
}

/// The path of the KVM device: `/dev/kvm`, or what the environment variable `VMM_KVM` says.
pub fn kvm_path() -> PathBuf {
    std::env::var_os("VMM_KVM").map_or_else(|| "/dev/kvm".into(), PathBuf::from)
}
