//! [`Owners`]: whom the guest sees files belong to. On the host all that the guest makes is the server's.

use rustix::fs::Statx;
use rustix::io::Errno;

/// Who owns what the host gives to users that the guest does not know.
const NOBODY: u32 = 65534;

/// A user and a group here, and what they are in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owners {
    here: (u32, u32),
    there: (u32, u32),
}

impl Owners {
    /// What belongs to this user and group `here`, whom this process makes files as, belongs to those of the guest's.
    pub fn new(here: (u32, u32), there: (u32, u32)) -> Self {
        Self { here, there }
    }

    /// This process's own file.
    pub fn is_own(&self, stat: &Statx) -> bool {
        stat.stx_uid == self.here.0
    }

    /// The owner and the group of a file, as the guest sees them.
    pub fn shown(&self, stat: &Statx) -> (u32, u32) {
        let shown = |id, here, there| if id == here { there } else { NOBODY };
        (shown(stat.stx_uid, self.here.0, self.there.0), shown(stat.stx_gid, self.here.1, self.there.1))
    }

    /// Whether the guest may give a file, which is `stat`, to these: to whom it belongs.
    ///
    /// # Errors
    /// EPERM: the host's file has one owner, and stays its.
    pub fn give(&self, stat: &Statx, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let shown = self.shown(stat);
        match uid.is_none_or(|uid| uid == shown.0) && gid.is_none_or(|gid| gid == shown.1) {
            true => Ok(()),
            false => Err(Errno::PERM),
        }
    }
}
