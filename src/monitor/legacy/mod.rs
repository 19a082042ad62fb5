//! Devices of a PC that are neither virtio nor PCI, one per file: fixed ports, no discovery. All of them are x86's by their
//! nature, so they have no folder of that name.
//!
//! `machine::load` puts them on the port bus. They know nothing of KVM, of the machine or of each other; what they ask
//! of the machine is an [`Effect`](crate::bus::Effect) or an [`Interrupt`](crate::vm::Interrupt).

pub mod acpi_pm;
pub mod boot_marks;
pub mod crtc;
pub mod debug_exit;
pub mod debug_port;
pub mod fw_cfg;
pub mod i8042;
pub mod io_apic;
pub mod pvpanic;
pub mod reset_control;
pub mod rom;
pub mod rtc_cmos;
pub mod serial;
pub mod testdev;
