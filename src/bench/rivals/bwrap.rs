//! bubblewrap, the sandbox of Flatpak: no bundle, no state, no daemon.

use super::command::{found, words};
use super::fixed::Fixed;
use super::program::{INIT, Root, WAIT};
use super::{Found, Life, Setting};

/// With the namespaces that the others have.
pub fn bwrap(setting: &Setting, root: &Root) -> Found {
    let (program, there) = found(setting, "bwrap");
    let folder = root.folder.to_string_lossy().into_owned();
    let rival = Fixed::new("bwrap", program, move |life| {
        let mut arguments = words(["--ro-bind", &folder, "/", "--proc", "/proc", "--die-with-parent"]);
        arguments.extend(words(["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]));
        arguments.extend(words(["--unshare-cgroup", INIT]));
        if life == Life::Idle {
            arguments.push(WAIT.to_owned());
        }
        arguments
    });
    rival.if_possible(there)
}
