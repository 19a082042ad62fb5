//! Linux guests, from the first instruction to power-off. Runs where KVM can run Linux: `cargo test --test boot` on such
//! a host, or with its runner set to the rig. Elsewhere each test is skipped, loudly, or fails if
//! `VMM_REQUIRE_LINUX_GUESTS=1`. What it boots is made by `cargo guest bundle --out target/guests`.

mod agent;
mod agent_whole;
#[path = "../back_end/mod.rs"]
mod back_end;
mod bootdisk;
mod console;
mod debug;
mod disk;
mod firmware;
mod fork;
mod guest;
mod identity;
mod kernels;
mod labs;
mod life;
mod limits;
mod net;
mod net_apt;
mod net_user;
mod net_whole;
mod others;
mod pci;
mod pci_whole;
mod plug;
mod plug_whole;
mod pool;
mod reboot;
mod share;
mod share_whole;
mod snapshot;
mod snapshot_whole;
mod template;
mod trace;
mod vhost;
mod vhost_user;
mod vsock;
mod without;
