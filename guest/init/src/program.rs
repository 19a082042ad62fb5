//! Starts the ordered command, or a shell, in a session of its own with the console as its controlling terminal.

use crate::console::{complain, drain, stdio};
use crate::kernel;
use crate::mounts::Text;
use crate::watch::exit_code;
use core::ffi::CStr;
use rustix::process::{Pid, WaitOptions, wait};

/// What a shell returns when it cannot find the program.
const NOT_FOUND: u8 = 127;

/// Set unless the kernel command line did; HOME is always ours, as the kernel gives every init `HOME=/`.
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME: &CStr = c"HOME=/root";

/// The kernel passes at most 32 variables (CONFIG_INIT_ENV_ARG_LIMIT), of which two may be replaced.
const VARIABLES: usize = 40;

/// Runs `command` by `/bin/sh -c`, or an interactive shell; `None` if no process could be made.
///
/// When the leader of a session ends, the kernel drops what its terminal has not sent yet, and a serial port
/// takes its time. So the leader, whose process is told, is one that waits for the command, and for the last of
/// its output. It is deaf to signals that are for the command, but for the one that ends the session.
///
/// # Safety
/// As for [`crate::run`].
pub unsafe fn start(command: Option<&[u8]>, environment: *const *const u8) -> Option<Pid> {
    let child = || {
        let _ = rustix::process::setsid();
        let _ = rustix::process::ioctl_tiocsctty(stdio(0));
        let _ = kernel::block_all_but_hangup();
        let command = || {
            // SAFETY: the caller's contract.
            unsafe { execute(command, environment) };
            NOT_FOUND
        };
        // SAFETY: one thread, by contract.
        let Ok(pid) = (unsafe { kernel::fork(command) }) else { return NOT_FOUND };
        loop {
            match wait(WaitOptions::empty()) {
                Ok(Some((ended, status))) if ended == pid => {
                    drain();
                    return exit_code(status) as u8;
                }
                Ok(_) => {}
                Err(_) => return NOT_FOUND,
            }
        }
    };
    // SAFETY: one thread, by contract.
    unsafe { kernel::fork(child) }.inspect_err(|&error| complain(b"make", b"a process", error)).ok()
}

/// Returns only if nothing could be executed.
///
/// # Safety
/// As for [`crate::run`].
unsafe fn execute(command: Option<&[u8]>, environment: *const *const u8) {
    let mut variables = [core::ptr::null(); VARIABLES];
    // SAFETY: the caller's contract.
    unsafe { collect_environment(environment, &mut variables) };
    let mut text = Text::<4096>::new();
    let shells: &[&CStr] = match command {
        Some(command) => {
            text.push(command);
            text.push(b"\0");
            &[c"/bin/sh"]
        }
        None => &[c"/bin/bash", c"/bin/sh"],
    };
    let mut error = rustix::io::Errno::NOENT;
    for shell in shells {
        let name = shell.as_ptr().cast();
        let arguments: [*const u8; 4] = match command {
            Some(_) => [name, c"-c".as_ptr().cast(), text.bytes().as_ptr(), core::ptr::null()],
            None => [name, core::ptr::null(), core::ptr::null(), core::ptr::null()],
        };
        // SAFETY: both arrays end with NULL and hold C strings that outlive the call.
        error = unsafe { kernel::execute(shell, arguments.as_ptr(), variables.as_ptr()) };
    }
    complain(b"run", b"/bin/sh", error);
}

/// Copies `environment` into `variables`, with [`HOME`] and, unless it was given, [`PATH`]. A NULL stays at the end.
///
/// # Safety
/// As for [`crate::run`].
unsafe fn collect_environment(mut environment: *const *const u8, variables: &mut [*const u8; VARIABLES]) {
    let mut count = 0;
    let mut put = |variable: *const u8| {
        if count < VARIABLES - 1 {
            variables[count] = variable;
            count += 1;
        }
    };
    put(HOME.as_ptr().cast());
    let mut has_path = false;
    // SAFETY: NULL ends the array, by contract.
    while let Some(variable) = unsafe { environment.read().as_ref() } {
        // SAFETY: a C string, by contract.
        let bytes = unsafe { CStr::from_ptr(core::ptr::from_ref(variable).cast()) }.to_bytes();
        has_path |= bytes.starts_with(b"PATH=");
        if !bytes.starts_with(b"HOME=") {
            put(variable);
        }
        // SAFETY: not yet at the NULL.
        environment = unsafe { environment.add(1) };
    }
    if !has_path {
        put(PATH.as_ptr().cast());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn collected(given: &[&CStr]) -> Vec<&'static [u8]> {
        let mut pointers: Vec<*const u8> = given.iter().map(|v| v.as_ptr().cast()).collect();
        pointers.push(core::ptr::null());
        let mut variables = [core::ptr::null(); VARIABLES];
        // SAFETY: a NULL-terminated array of C strings.
        unsafe { collect_environment(pointers.as_ptr(), &mut variables) };
        let strings = variables.iter().take_while(|v| !v.is_null());
        // SAFETY: C strings that were given, all of them literals here.
        strings.map(|&v| unsafe { CStr::from_ptr(v.cast()) }.to_bytes()).collect()
    }

    #[test]
    fn home_is_ours_and_a_path_is_added_only_if_missing() {
        assert_eq!(collected(&[c"HOME=/", c"TERM=linux"]), [HOME.to_bytes(), b"TERM=linux", PATH.to_bytes()]);
        assert_eq!(collected(&[c"PATH=/x"]), [HOME.to_bytes(), b"PATH=/x"]);
    }

    #[test]
    fn too_many_variables_are_cut_before_the_end_mark() {
        assert_eq!(collected(&[c"A=b"; 100]).len(), VARIABLES - 1);
    }
}
