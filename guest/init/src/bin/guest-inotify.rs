//! Says what happens in folders and to files (inotify(7)), a line each: `guest-inotify PATH ...`. `create new`, say, is of what is in one;
//! `attrib` alone is of the file itself. Neither what is read nor who opens what. It ends when it is killed, or with the error's number.
#![no_std]
#![no_main]

#[path = "freestanding/mod.rs"]
mod freestanding;

use core::ffi::CStr;
use core::mem::MaybeUninit;

use guest_init::console::{complain, stdio};
use guest_init::kernel::exit;
use guest_init::mounts::Text;
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::{Errno, write};

/// What is said, and the words for it.
const SAID: [(ReadFlags, &[u8]); 8] = [
    (ReadFlags::MODIFY, b"modify"),
    (ReadFlags::ATTRIB, b"attrib"),
    (ReadFlags::CLOSE_WRITE, b"close"),
    (ReadFlags::CREATE, b"create"),
    (ReadFlags::DELETE, b"delete"),
    (ReadFlags::DELETE_SELF, b"delete-self"),
    (ReadFlags::MOVED_FROM, b"from"),
    (ReadFlags::MOVED_TO, b"to"),
];

/// Called by `_start` with the stack as the kernel left it: argc, argv, NULL.
///
/// # Safety
/// `stack` must be that stack.
#[unsafe(no_mangle)]
unsafe extern "C" fn entry(stack: *const usize) -> ! {
    // SAFETY: the kernel's layout (System V ABI for x86-64, 3.4.1): argc, and so many C strings.
    let (argc, argv) = unsafe { (stack.read(), stack.add(1).cast::<*const core::ffi::c_char>()) };
    // SAFETY: below argc.
    let paths = (1..argc).map(|at| unsafe { CStr::from_ptr(argv.add(at).read()) });
    let error = match watch(paths) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    complain(b"watch", b"what it was told", error);
    exit(error.raw_os_error() as u8)
}

fn watch<'a>(paths: impl Iterator<Item = &'a CStr>) -> Result<core::convert::Infallible, Errno> {
    let events = init(CreateFlags::CLOEXEC)?;
    let wanted = SAID
        .iter()
        .fold(WatchFlags::empty(), |all, (what, _)| all | WatchFlags::from_bits_retain(what.bits()));
    for path in paths {
        add_watch(&events, path, wanted)?;
    }
    let mut room = [MaybeUninit::uninit(); 4096];
    let mut events = Reader::new(&events, &mut room);
    loop {
        let event = events.next()?;
        for (_, word) in SAID.iter().filter(|(what, _)| event.events().contains(*what)) {
            let mut line = Text::<300>::new();
            line.push(word);
            if let Some(name) = event.file_name() {
                line.push(b" ");
                line.push(name.to_bytes());
            }
            line.push(b"\n");
            write(stdio(1), line.bytes())?;
        }
    }
}
