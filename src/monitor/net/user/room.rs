//! Memory for what waits in a connection: pages of its own, which cost nothing before they are used, and are the host's again when
//! the connection ends. The allocator's would be there from the beginning once others have been freed: it clears them.

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Zeroed memory.
pub struct Room {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: the pages are this value's alone, wherever it goes.
unsafe impl Send for Room {}

impl Room {
    /// `len` bytes, more than none.
    ///
    /// # Errors
    /// The host is out of memory or of mappings.
    pub fn new(len: usize) -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, at a place that the kernel chooses, touches nothing that is there.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, access, flags) }?;
        let room = Self { start: NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?, len };
        // The host would give the first byte 2 MiB, and clear them: most of what a short connection costs.
        // SAFETY: the range is the mapping just made; the advice changes no contents. A kernel without huge pages refuses it.
        let _ = unsafe { madvise(start, len, Advice::LinuxNoHugepage) };
        Ok(room)
    }

    /// The memory, for those to whom it cannot be lent.
    ///
    /// # Safety
    /// To be called once. What it returns is not used after this value is dropped.
    pub unsafe fn bytes(&mut self) -> &'static mut [u8] {
        // SAFETY: mapped readable and writable, zeroed, and nobody else's; for how long is the caller's to see to.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: `new` has mapped it, and by the contract of `bytes` nobody uses it any more.
        let _ = unsafe { munmap(self.start.as_ptr(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_byte_takes_a_page_and_no_more() {
        const PAGE: usize = 4096;
        // There is a whole huge page in it, wherever it begins.
        let mut room = Room::new(4 << 20).unwrap();
        // SAFETY: once, and not used after the room.
        let bytes = unsafe { room.bytes() };
        bytes[3 << 19] = 1;
        let map = File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; bytes.len() / PAGE * 8];
        map.read_exact_at(&mut entries, bytes.as_ptr().addr() as u64 / PAGE as u64 * 8).unwrap();
        let present = entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count();
        assert_eq!(present, 1);
    }
}
