//! What a thread gives up for good, whatever it may call: privileges by exec, and capabilities; what a forked child gives up: descriptors.

use std::io;
use std::os::fd::RawFd;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// No exec gives more than there was before, set-user-ID or not, nor a capability that the process gives up.
pub fn no_new_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    if capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            match remove_capability_from_bounding_set(capability) {
                // One that this kernel does not know.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

/// The calling thread has no capability any more, and gets none.
pub fn drop_capabilities() -> io::Result<()> {
    // Who is not root has none as a rule, and one that such a thread has started is as that is.
    if capabilities(None)?.permitted.is_empty() {
        return Ok(());
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

/// Closes all other descriptors. Call it in a child that was forked and goes on with `keep` alone: its copies keep open what its parent
/// closes, a connection above all.
pub fn close_all_but(keep: &mut [RawFd]) {
    keep.sort_unstable();
    let mut first = 0;
    for kept in keep.iter().map(|kept| kept.unsigned_abs()).chain([u32::MAX]) {
        if first < kept {
            // SAFETY: nobody uses them: the child has one thread, and that goes on without them.
            unsafe { libc::syscall(libc::SYS_close_range, first, kept - 1, 0) };
        }
        first = kept.saturating_add(1);
    }
}
