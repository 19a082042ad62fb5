//! [`Origin`]: where the contents of a new machine come from.

use super::{Error, SavedMachine};
use crate::boot::tables::Platform;
use crate::boot::{self, Entry, Input, Payload, Role, firmware};
use crate::config::kernel::nothing_to_boot;
use crate::config::{Firmware, VmConfig};
use crate::legacy::fw_cfg::Items;
use crate::memory::working_set::WorkingSet;
use crate::memory::{Memory, SavedRam, Way};

/// Where the contents of a machine's memory and registers come from: files that are open, whatever happens to their names.
pub enum Origin {
    /// A kernel, entered by its boot protocol.
    Kernel(Payload),
    /// Firmware, entered at the reset vector.
    Firmware {
        /// The ROM.
        firmware: Firmware,
        /// Its file, if it is not the monitor's own.
        rom: Option<Input>,
        /// Programs for it to run.
        option_roms: Vec<Input>,
        /// What it is to boot, if anything.
        payload: Option<Payload>,
    },
    /// Another machine of the same configuration, as it was saved.
    Saved {
        /// All but its memory.
        machine: Box<SavedMachine>,
        /// Its memory, which is mapped and not to be changed.
        memory: SavedRam,
        /// How it gets there.
        way: Way,
        /// What of it the guest needs first, if that is known.
        working_set: Option<WorkingSet>,
    },
}

/// What the machine is given when its memory has been filled.
#[derive(Default)]
pub(super) struct Contents {
    /// How the vCPUs begin. None: as a processor does after a reset, at the reset vector (SDM vol. 3, 11.1).
    pub entry: Option<Entry>,
    /// What firmware finds in fw_cfg.
    pub items: Items,
}

impl Origin {
    /// What `config` asks for. Its files stay open for the guest's resets.
    ///
    /// # Errors
    /// It names nothing to start, or what cannot be opened.
    pub fn of(config: &VmConfig) -> Result<Self, Error> {
        let cmdline = || boot::cmdline::of(config);
        let open = |kernel| Payload::open(&kernel, config.initrd.as_deref(), cmdline(), config.boot);
        let payload = config.to_boot()?.map(open).transpose()?;
        Ok(match (&config.firmware, payload) {
            (Some(firmware), payload) => {
                let rom = match firmware {
                    Firmware::File(path) => Some(Input::open(path, Role::Firmware)?),
                    Firmware::BuiltIn => None,
                };
                let option_roms = config.option_rom.iter().map(|path| Input::open(path, Role::OptionRom));
                let option_roms = option_roms.collect::<Result<_, _>>()?;
                Self::Firmware { firmware: firmware.clone(), rom, option_roms, payload }
            }
            (None, Some(payload)) => Self::Kernel(payload),
            (None, None) => return Err(nothing_to_boot().into()),
        })
    }

    /// The kernel that is started, at once or by firmware.
    pub(super) fn payload(&self) -> Option<&Payload> {
        match self {
            Self::Kernel(payload) => Some(payload),
            Self::Firmware { payload, .. } => payload.as_ref(),
            Self::Saved { .. } => None,
        }
    }

    /// The ROM that has to be a memory slot before there is a VM.
    pub(super) fn rom(&self) -> Result<Option<Vec<u8>>, Error> {
        match self {
            Self::Kernel(_) | Self::Saved { .. } => Ok(None),
            Self::Firmware { rom, .. } => Ok(Some(firmware::rom(rom.as_ref())?)),
        }
    }

    /// Fills `memory`, which holds zeroes and the ROM. Needs no VM, so that KVM can set up meanwhile.
    pub(super) fn fill(&self, memory: &Memory, platform: &Platform) -> Result<Contents, Error> {
        Ok(match self {
            Self::Kernel(payload) => {
                let entry = Some(boot::load(memory, payload, platform)?);
                Contents { entry, ..Contents::default() }
            }
            Self::Firmware { firmware, option_roms, payload, .. } => {
                let start = firmware::Start { firmware, option_roms, payload: payload.as_ref() };
                Contents { items: firmware::load(memory, &start, platform)?, ..Contents::default() }
            }
            Self::Saved { .. } => Contents::default(),
        })
    }

    /// Whether all memory may be read before the machine that `config` describes begins, which takes its time.
    pub(crate) fn reads_memory(&self, config: &VmConfig) -> bool {
        match self {
            Self::Saved { memory, way, .. } => match way.of(config) {
                Way::Copy => true,
                Way::Auto => !memory.is_plain(),
                Way::Map | Way::Lazy => false,
            },
            Self::Kernel(_) | Self::Firmware { .. } => false,
        }
    }

    /// Memory as the machine that `config` describes begins with it: zeroes, and the ROM, or what was saved.
    pub(super) fn memory(&self, config: &VmConfig) -> Result<Memory, Error> {
        Ok(match self {
            Self::Saved { memory, way, machine, .. } => {
                let mut memory = Memory::restored(&config.memory(), memory.clone(), way.of(config))?;
                if let Some(rom) = machine.rom() {
                    memory.set_rom(rom)?;
                }
                memory
            }
            _ => {
                let mut memory = Memory::new(&config.memory())?;
                if let Some(rom) = self.rom()? {
                    memory.set_rom(&rom)?;
                }
                memory
            }
        })
    }
}
