//! What a thread gives up for good, whatever it may call: privileges by exec, and capabilities.

use std::io;

use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// No exec gives more than there was before, set-user-ID or not.
pub fn no_new_privileges() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}

/// The calling thread has no capability any more, and gets none.
pub fn drop_capabilities() -> io::Result<()> {
    // Who is not root has none as a rule, and one that such a thread has started is as that is.
    if capabilities(None)?.permitted.is_empty() {
        return Ok(());
    }
    if geteuid().is_root() {
        for capability in CapabilitySet::all().iter() {
            match remove_capability_from_bounding_set(capability) {
                // One that this kernel does not know, or that was not there to be given up.
                Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}
