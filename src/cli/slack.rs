//! What a VM need not have of this process's own memory.
//!
//! What its start leaves behind one that lasts gives back, once; a short one never pays. Arguments take a stack some 60 KiB deep to
//! parse, and leave holes in the heap; nothing of either is used again.

use rustix::mm::{Advice, madvise};
use rustix::process::getpid;
use rustix::thread::gettid;

const PAGE: usize = 4 << 10;
/// So many bytes below the frames of now the stack may have been in use.
const DEEPEST: usize = 128 << 10;

/// Has all threads allocate from one heap, before there are others. The C library would give each a heap of its own, some pages and four
/// system calls, so that none waits for another; those of a machine allocate little, and of what is small each keeps some for itself
/// (tcache).
pub fn share_heap() {
    // SAFETY: it may be called at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what calls that are over have touched of the main thread's stack, if this is it, and free pages of the heap.
pub fn give_back() {
    // Where another thread's stack ends is not known here.
    if gettid() == getpid() {
        give_back_stack();
    }
    // SAFETY: it may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

#[inline(never)]
fn give_back_stack() {
    let here = 0u8;
    // A page is left for this frame and those of the calls from here.
    let end = (&raw const here).addr() / PAGE * PAGE - PAGE;
    // SAFETY: nothing that lives is below the frames of calls in progress. What is mapped there is this stack: the kernel keeps other
    // mappings further away from it (stack_guard_gap). What is not mapped yet is passed over, and the result says so.
    let _ =
        unsafe { madvise(std::ptr::without_provenance_mut(end - DEEPEST), DEEPEST, Advice::LinuxDontNeed) };
}
