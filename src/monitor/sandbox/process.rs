//! What a thread gives up for good, whatever it may call: privileges by exec, and capabilities.

use std::io;

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
