//! Device tests without KVM: real rings in guest memory, a driver at the registers, a hypervisor that takes notes.
//!
//! `subjects` lists every virtio device once; `conformance`, `faults` and `hostile` run over that list, so a
//! new device is tested by adding it there. What is not virtio has a file of its own.

#[path = "../back_end/mod.rs"]
mod back_end;
mod block;
mod busy;
mod conformance;
mod faults;
mod fs;
mod fw_cfg;
mod guest;
mod hostile;
mod net;
mod net_dump;
mod net_headers;
mod net_switch;
mod net_traffic;
mod net_vhost_user;
mod net_vhost_user_pci;
mod on_pci;
mod overlay;
mod subjects;
mod turns;
mod vsock;
mod vsock_crowd;
mod vsock_driver;
mod vsock_last;
