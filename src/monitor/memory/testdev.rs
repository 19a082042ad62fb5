//! What only the devices of test suites do to guest memory.

use std::io;

use rustix::mm::{MprotectFlags, mprotect};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::GuestRam;

/// Makes the page at `address` read-only for this process for a moment, for which KVM takes it away from the guest: at the
/// guest's next access KVM has to map it again. Its content stays. For machines without devices that write to memory.
///
/// # Errors
/// There is no RAM at `address`; or the host refused.
pub fn unmap_briefly(ram: &GuestRam, address: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    let page = GuestAddress(address & !(PAGE as u64 - 1));
    let Ok(host) = ram.get_host_address(page) else {
        return Err(io::Error::other("there is no RAM"));
    };
    // SAFETY: the page lies in the mapping that `ram` keeps, and no reference into it exists: all access is volatile. A
    // write by another thread of this process in between would be a fault; none writes, because a configuration with the
    // test device and virtio devices is refused. vCPUs that meet it fault inside KVM, which tells the guest's access again.
    unsafe {
        mprotect(host.cast(), PAGE, MprotectFlags::READ)?;
        mprotect(host.cast(), PAGE, MprotectFlags::READ | MprotectFlags::WRITE)?;
    }
    Ok(())
}
