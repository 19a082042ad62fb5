//! What a thread gives up for good, whatever it may call: privileges by exec, capabilities, and root's name; what a forked child gives up:
//! descriptors.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, Signal, dumpable_behavior, getrlimit, set_dumpable_behavior,
    setrlimit,
};
use rustix::process::{
    Pid, getegid, geteuid, getgid, getpid, parent_process_death_signal, set_parent_process_death_signal,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, capabilities, capabilities_secure_bits,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::Grant;
use crate::config::ParseError;

/// Users that neither the host's accounts nor its containers have (systemd's UIDS-GIDS: "unused", up to 0x7fff_ffff). Process numbers
/// are at most 22 bits.
const FIRST_USER: u32 = 0x7000_0000;

/// Who has started this process.
static STARTED_BY: OnceLock<Uid> = OnceLock::new();
/// Who its threads are once they are inside, if they were root.
static USER: OnceLock<Becomes> = OnceLock::new();

/// A user and a group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    uid: u32,
    gid: u32,
}

impl User {
    /// It may make files where `grant` has some begin anew, which root's own threads may.
    pub(super) fn may_use(self, grant: &Grant) -> bool {
        let Grant::Rotation(folder) = grant else { return true };
        folder.metadata().is_ok_and(|found| {
            let write = match () {
                () if found.uid() == self.uid => 0o300,
                () if found.gid() == self.gid => 0o030,
                () => 0o003,
            };
            found.mode() & write == write
        })
    }
}

impl FromStr for User {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        // The last one stands for "as it was" in setresuid(2).
        let number = |text: &str| text.parse().ok().filter(|number| (1..u32::MAX).contains(number));
        match (number(uid), number(gid)) {
            (Some(uid), Some(gid)) => Ok(Self { uid, gid }),
            _ => Err(ParseError::hinted(
                format!("{text:?} is not a user other than root"),
                "use UID or UID:GID, in numbers",
            )),
        }
    }
}

#[derive(Debug)]
struct Becomes {
    user: User,
    /// Of files it is root: the run's own are root's.
    has_roots_files: bool,
    /// The parent's death is this signal's to tell, and becoming another user resets that.
    dies: Option<Signal>,
}

/// Whether the process is open to debuggers: the kernel resets that when a thread becomes another user, which others may be about to do.
fn dumpable() -> io::Result<DumpableBehavior> {
    static DUMPABLE: OnceLock<DumpableBehavior> = OnceLock::new();
    match DUMPABLE.get() {
        Some(known) => Ok(*known),
        None => {
            let now = dumpable_behavior()?;
            Ok(*DUMPABLE.get_or_init(|| now))
        }
    }
}

/// No exec gives more than there was before, set-user-ID or not.
pub(super) fn no_new_privileges(user: Option<User>) -> io::Result<()> {
    started_by();
    set_no_new_privs(true)?;
    let changes_user = CapabilitySet::SETPCAP | CapabilitySet::SETUID | CapabilitySet::SETGID;
    if started_by().is_root() && capabilities(None)?.effective.contains(changes_user) {
        choose_user(user)?;
    }
    Ok(())
}

thread_local! {
    /// Whether the thread, and whoever it starts, has nothing in its bounding set, or may not change that.
    static IS_BOUND: Cell<bool> = const { Cell::new(false) };
}

/// No exec gives the calling thread a capability, nor those that it starts from now on. A call for each of some forty: whoever has
/// others to wait for does it then.
pub(super) fn empty_bounding_set() -> io::Result<()> {
    if IS_BOUND.get() {
        return Ok(());
    }
    if capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all().iter() {
            match remove_capability_from_bounding_set(capability) {
                // One that this kernel does not know.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    IS_BOUND.set(true);
    Ok(())
}

/// The user who has started this process, whoever its threads are by now.
pub fn started_by() -> Uid {
    *STARTED_BY.get_or_init(geteuid)
}

/// The user and the group that files belong to which this process makes when its guest runs.
pub fn owner_of_files() -> (u32, u32) {
    match USER.get() {
        Some(Becomes { has_roots_files: false, user, .. }) => (user.uid, user.gid),
        Some(_) => (0, 0),
        None => (geteuid().as_raw(), getegid().as_raw()),
    }
}

/// Has threads be `chosen` once they are inside, or somebody whom nobody else is, if there are others than root here.
fn choose_user(chosen: Option<User>) -> io::Result<()> {
    let own = FIRST_USER | Pid::as_raw(Some(getpid())).cast_unsigned();
    let user = chosen.unwrap_or(User { uid: own, gid: own });
    let group = getgid();
    let tried = set_thread_res_gid(Gid::from_raw(user.gid), None, None)
        .and_then(|()| set_thread_res_uid(Uid::from_raw(user.uid), None, None));
    set_thread_res_gid(group, None, None)?;
    set_thread_res_uid(Uid::ROOT, None, None)?;
    // A container's user namespace may lack the number.
    match tried {
        Err(Errno::INVAL) => return Ok(()),
        tried => tried?,
    }
    // Capabilities last until they are dropped: somebody else has to set up the rest.
    set_capabilities_secure_bits(capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    // Root needs none to open the rest.
    set_thread_groups(&[])?;
    let dies = parent_process_death_signal()?;
    let _ = USER.set(Becomes { user, has_roots_files: chosen.is_none(), dies });
    Ok(())
}

/// Whether threads that are inside are somebody else than who has started this process.
pub(super) fn has_user() -> bool {
    USER.get().is_some()
}

/// The calling thread, which has the capabilities for that, is another user from now on, in one group.
fn become_user(Becomes { user, has_roots_files, dies }: &Becomes) -> io::Result<()> {
    let before = dumpable()?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    if *has_roots_files {
        let become_root = |call| {
            // They tell who it was before, and nothing of a failure.
            // SAFETY: they take numbers.
            let [_, now] = [0; 2].map(|root| unsafe { libc::syscall(call, root) });
            if now == 0 { Ok(()) } else { Err(Errno::PERM) }
        };
        become_root(libc::SYS_setfsgid)?;
        become_root(libc::SYS_setfsuid)?;
    }
    if dies.is_some() {
        set_parent_process_death_signal(*dies)?;
    }
    if before != DumpableBehavior::DumpableReadableOnlyByRoot {
        set_dumpable_behavior(before)?;
    }
    Ok(())
}

/// The process can have no more descriptors than now, and leaves no core unless it was left open to debuggers.
pub(super) fn limit() -> io::Result<()> {
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { maximum: files.current, ..files })?;
    if dumpable()? == DumpableBehavior::NotDumpable {
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    }
    Ok(())
}

/// The calling thread is not root any more, has no capability, and gets none.
pub(super) fn drop_privileges() -> io::Result<()> {
    // Who is not root has none as a rule, and one that such a thread has started is as that is.
    if capabilities(None)?.permitted.is_empty() {
        return Ok(());
    }
    empty_bounding_set()?;
    if let Some(user) = USER.get() {
        become_user(user)?;
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
