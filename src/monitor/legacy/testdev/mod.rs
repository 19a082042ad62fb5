//! Devices that only test suites drive, with QEMU's interfaces: kvm-unit-tests', and their one for Hyper-V's interrupt
//! controller. A machine has them when `test_device` is set.
//!
//! What they alone ask of the hypervisor is [`TestVm`](crate::vm::testdev::TestVm).

pub mod hyperv;
pub mod pc;
