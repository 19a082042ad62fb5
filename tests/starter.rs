//! Who starts a process of the tests: others than root, with and without what a host or a container gives them.

use std::fs;
use std::io;

/// Who starts a run, and where.
#[derive(Debug, Clone, Copy)]
pub enum Starter {
    User,
    /// Whom the host gives no namespaces.
    UserWithoutNamespaces,
    /// Root with what a container engine leaves it.
    RootOfContainer,
    /// Root with nothing.
    RootWithoutCapabilities,
}

const NOBODY_ELSE: u32 = 65534;

impl Starter {
    /// The calling process, which is root and execs next, is started so.
    pub fn enter(self) -> io::Result<()> {
        use rustix::thread::{CapabilitySet, Gid, Uid, UnshareFlags};
        match self {
            Self::User | Self::UserWithoutNamespaces => {
                rustix::thread::set_thread_groups(&[])?;
                let (gid, uid) = (Gid::from_raw(NOBODY_ELSE), Uid::from_raw(NOBODY_ELSE));
                rustix::thread::set_thread_res_gid(gid, gid, gid)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            }
            Self::RootOfContainer | Self::RootWithoutCapabilities => {
                let containers = CapabilitySet::CHOWN
                    | CapabilitySet::DAC_OVERRIDE
                    | CapabilitySet::FOWNER
                    | CapabilitySet::KILL
                    | CapabilitySet::SETGID
                    | CapabilitySet::SETUID
                    | CapabilitySet::SETPCAP
                    | CapabilitySet::NET_BIND_SERVICE
                    | CapabilitySet::SYS_CHROOT
                    | CapabilitySet::MKNOD;
                let left = match self {
                    Self::RootOfContainer => containers,
                    _ => CapabilitySet::empty(),
                };
                for capability in (CapabilitySet::all() - left).iter() {
                    let _ = rustix::thread::remove_capability_from_bounding_set(capability);
                }
            }
        }
        if let Self::UserWithoutNamespaces = self {
            // Becoming another user has closed them to this process.
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
            // SAFETY: the process has one thread.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER)? };
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", format!("{NOBODY_ELSE} {NOBODY_ELSE} 1"))?;
            fs::write("/proc/self/gid_map", format!("{NOBODY_ELSE} {NOBODY_ELSE} 1"))?;
            for kind in ["user", "mnt"] {
                fs::write(format!("/proc/sys/user/max_{kind}_namespaces"), "0")?;
            }
        }
        Ok(())
    }
}
