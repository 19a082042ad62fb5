//! The system calls that each role makes, and why: one list for what all threads do, one for what each does beside.
//!
//! What is not here is refused. A call of the C library's own stands under what leads to it. Numbers and arguments are x86-64's.
//! `make calls` has strace watch many runs, and names what none of them makes: each such call says here what it is for.

#[cfg(test)]
mod tests;

use libc::c_long;

use super::Needs;
use crate::threads::Role;

/// A call that is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub number: c_long,
    /// If any are named, one of them has to hold.
    pub rules: &'static [&'static [Argument]],
    /// What it is for, if the runs that `make calls` watches do not make it.
    #[cfg(test)]
    why: Option<&'static str>,
}

/// What an argument has to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Argument {
    /// Its place among the call's.
    pub place: u8,
    pub test: Test,
}

/// How 32 bits of an argument are looked at: what the kernel takes of all that are tested here.
#[derive(Debug, Clone, Copy)]
pub(super) enum Test {
    /// It is this.
    Is(u32),
    /// It is not this.
    IsNot(u32),
    /// Of these bits it has those.
    Of(u32, u32),
    /// It is this process's number.
    IsOwnPid,
}

const fn any(number: c_long) -> Call {
    when(number, &[])
}

const fn when(number: c_long, rules: &'static [&'static [Argument]]) -> Call {
    Call {
        number,
        rules,
        #[cfg(test)]
        why: None,
    }
}

/// One that is hardly ever made, and `why` it is allowed.
#[cfg_attr(not(test), expect(unused_variables, reason = "for readers, and for `make calls`"))]
const fn rare(call: Call, why: &'static str) -> Call {
    Call {
        #[cfg(test)]
        why: Some(why),
        ..call
    }
}

const fn is(place: u8, value: u32) -> Argument {
    Argument { place, test: Test::Is(value) }
}

const fn of(place: u8, mask: u32, value: u32) -> Argument {
    Argument { place, test: Test::Of(mask, value) }
}

const NO_EXEC: &[&[Argument]] = &[&[of(2, libc::PROT_EXEC as u32, 0)]];

/// What any thread does: memory, time, waiting, its own beginning and end, and what is open already.
const ALL: &[Call] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    rare(any(libc::SYS_readv), "a guest's frames and bytes, straight into its memory (net, vsock)"),
    rare(any(libc::SYS_writev), "the same out of it"),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_close),
    any(libc::SYS_lseek),
    any(libc::SYS_fstat),
    when(libc::SYS_newfstatat, &[&[of(3, libc::AT_EMPTY_PATH as u32, libc::AT_EMPTY_PATH as u32)]]),
    when(libc::SYS_statx, &[&[of(2, libc::AT_EMPTY_PATH as u32, libc::AT_EMPTY_PATH as u32)]]),
    any(libc::SYS_ppoll),
    any(libc::SYS_epoll_wait),
    rare(any(libc::SYS_epoll_pwait), "the same, by who makes it without the C library: networks and vsock"),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_eventfd2),
    any(libc::SYS_timerfd_settime),
    // Status flags, and duplicates; no signals to others (F_SETOWN), no leases.
    when(
        libc::SYS_fcntl,
        &[
            &[is(1, libc::F_DUPFD_CLOEXEC as u32)],
            &[is(1, libc::F_GETFL as u32)],
            &[is(1, libc::F_SETFL as u32)],
            &[is(1, libc::F_GETFD as u32)],
        ],
    ),
    // No new code.
    when(libc::SYS_mmap, NO_EXEC),
    when(libc::SYS_mprotect, NO_EXEC),
    any(libc::SYS_munmap),
    rare(any(libc::SYS_mremap), "a large block of memory that grows"),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_futex),
    rare(any(libc::SYS_clock_gettime), "where the host has no clock that the vDSO can read"),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_restart_syscall),
    rare(any(libc::SYS_sched_yield), "a lock of the standard library's channels that is held for a moment"),
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    any(libc::SYS_getrandom),
    // A thread's beginning and end.
    any(libc::SYS_set_robust_list),
    any(libc::SYS_rseq),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_sched_getaffinity),
    when(libc::SYS_prctl, &[&[is(0, libc::PR_SET_NAME as u32)]]),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    // Who tells of refused calls stays.
    rare(
        when(libc::SYS_rt_sigaction, &[&[Argument { place: 0, test: Test::IsNot(libc::SIGSYS as u32) }]]),
        "abort, at the end of a panic",
    ),
    // Kicks of vCPUs, and the abort that ends a panic.
    when(libc::SYS_tgkill, &[&[Argument { place: 0, test: Test::IsOwnPid }]]),
    // Nothing that puts words in a terminal's mouth (TIOCSTI, TIOCLINUX).
    TERMINAL[0],
    TERMINAL[1],
    // A role within a role: its own, narrower list.
    rare(any(libc::SYS_capset), "a thread that starts with capabilities, where there are no namespaces"),
    any(libc::SYS_capget),
    any(libc::SYS_seccomp),
    any(libc::SYS_landlock_restrict_self),
    when(libc::SYS_prctl, &[&[is(0, libc::PR_SET_NO_NEW_PRIVS as u32)]]),
];

/// `KVMIO` and its like: the second byte of an ioctl's number (Documentation/userspace-api/ioctl/ioctl-number.rst).
const fn kind(kind: u32) -> Argument {
    of(1, 0xff00, kind << 8)
}

const KVM: Argument = kind(0xae);
const VHOST_VIRTIO: Argument = kind(0xaf);
/// The request that makes another VM (Documentation/virt/kvm/api.rst, 4.2).
const KVM_CREATE_VM: u32 = 0xae01;

/// The VM's and the vCPU's.
const KVM_IOCTLS: &[Call] =
    &[when(libc::SYS_ioctl, &[&[KVM, Argument { place: 1, test: Test::IsNot(KVM_CREATE_VM) }]])];
/// After a reset of the guest's there is another.
const KVM_AGAIN: &[Call] = &[when(libc::SYS_ioctl, &[&[KVM]])];
/// Rings of a vhost device; its IOTLB and its memory table are among them.
const VHOST: &[Call] =
    &[rare(when(libc::SYS_ioctl, &[&[VHOST_VIRTIO]]), "where the host has vhost_net or vhost_vsock")];
/// TUNSETOFFLOAD, TUNSETVNETHDRSZ and what else a tap knows.
const TAP: &[Call] =
    &[rare(when(libc::SYS_ioctl, &[&[kind(b'T' as u32), of(1, 0x80, 0x80)]]), "where the host has a tap")];

/// A terminal's: what it is like, and whether reading from what is open waits.
const TERMINAL: [Call; 2] = [
    when(libc::SYS_ioctl, &[&[is(1, libc::TCGETS as u32)], &[is(1, libc::FIONBIO as u32)]]),
    rare(
        when(
            libc::SYS_ioctl,
            &[
                &[is(1, libc::TCGETS2 as u32)],
                &[is(1, libc::TCSETS as u32)],
                &[is(1, libc::TCSETS2 as u32)],
                &[is(1, libc::TIOCGPGRP as u32)],
                &[is(1, libc::TIOCGWINSZ as u32)],
            ],
        ),
        "the terminal that the guest has: given back by whoever ends the process, its size told",
    ),
];

/// What a stream of bytes or frames over a socket takes, that is connected already.
const STREAMS: &[Call] = &[
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),
    any(libc::SYS_accept4),
    any(libc::SYS_getsockopt),
    any(libc::SYS_setsockopt),
    rare(any(libc::SYS_getsockname), "which port the host has chosen for a published one"),
    rare(any(libc::SYS_getpeername), "what is behind a descriptor that was passed (net fd=)"),
    when(libc::SYS_fcntl, &[&[is(1, libc::F_SETFD as u32)]]),
];

/// What a disk's image takes.
const IMAGE: &[Call] = &[
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    rare(
        any(libc::SYS_preadv2),
        "whether a page of a saved machine's memory is in the host's, without waiting",
    ),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fsync),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    // BLKDISCARD, BLKZEROOUT, and what the device is; a copy that shares its blocks (FICLONE).
    rare(when(libc::SYS_ioctl, &[&[kind(0x12)]]), "an image that is a block device"),
    when(libc::SYS_ioctl, &[&[is(1, libc::FICLONE as u32)]]),
];

/// A thread, with what the C library asks for it; nothing that would be a process (clone3 is answered as if it were unknown, because
/// its flags cannot be seen, and glibc goes on to clone).
const THREADS: &[Call] = &[when(
    libc::SYS_clone,
    &[&[of(
        0,
        libc::CLONE_THREAD as u32 | libc::CLONE_VM as u32,
        libc::CLONE_THREAD as u32 | libc::CLONE_VM as u32,
    )]],
)];

/// `CLONE_NEWNS`, and the other kinds of namespaces (clone(2)).
const NEW_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Connections to unix sockets.
const UNIX: &[Call] = &[
    when(libc::SYS_socket, &[&[is(0, libc::AF_UNIX as u32)]]),
    rare(
        when(libc::SYS_socketpair, &[&[is(0, libc::AF_UNIX as u32)]]),
        "a caller of this process's for the guest's agent",
    ),
    any(libc::SYS_connect),
];

/// A port in a segment that is entered later.
const SEGMENT: &[Call] = &[rare(any(libc::SYS_symlinkat), "a network that is added while the guest runs")];

/// Connections to the network, and what listens for published ports.
const INTERNET: &[Call] = &[
    rare(
        when(libc::SYS_socket, &[&[is(0, libc::AF_INET as u32)], &[is(0, libc::AF_INET6 as u32)]]),
        "a guest that talks to the network",
    ),
    any(libc::SYS_connect),
    rare(any(libc::SYS_bind), "a guest's UDP, and published ports"),
];

/// Connections to the guest by the host's own sockets.
const HOST_VSOCK: &[Call] = &[
    rare(when(libc::SYS_socket, &[&[is(0, libc::AF_VSOCK as u32)]]), "where the host has vhost_vsock"),
    any(libc::SYS_connect),
];

/// Where the calling thread runs: a vCPU's, which is started by one that is inside already, and so is as that is at first.
const PINS: &[Call] = &[when(libc::SYS_sched_setaffinity, &[&[is(0, 0)]])];

/// What is opened anew.
const OPENING: &[Call] = &[any(libc::SYS_openat)];

/// What is done by name. Where, the kernel is told by other means.
const FILES: &[Call] = &[
    any(libc::SYS_open),
    any(libc::SYS_openat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    any(libc::SYS_readlink),
    rare(any(libc::SYS_readlinkat), "a link on the way to a file (`planted`)"),
    any(libc::SYS_getcwd),
    any(libc::SYS_getdents64),
    rare(any(libc::SYS_mkdir), "the folder of a segment that somebody has just left (net switch=)"),
    any(libc::SYS_mkdirat),
    rare(any(libc::SYS_rmdir), "KVM's events of a traced guest: its instance in tracefs"),
    any(libc::SYS_unlink),
    any(libc::SYS_unlinkat),
    any(libc::SYS_rename),
    rare(any(libc::SYS_renameat), "an output that is full becomes FILE.1"),
    any(libc::SYS_renameat2),
    rare(any(libc::SYS_fchmod), "the mode of a socket before it has a name"),
    rare(any(libc::SYS_utimensat), "a template that is used: when it was last"),
    any(libc::SYS_flock),
];

/// What a guest does in a folder of the host's.
const SHARE: &[Call] = &[
    any(libc::SYS_openat),
    any(libc::SYS_openat2),
    any(libc::SYS_readlinkat),
    any(libc::SYS_getdents64),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_linkat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    // Nothing that runs as its owner.
    when(libc::SYS_fchmodat, &[&[of(2, libc::S_ISUID, 0)]]),
    any(libc::SYS_utimensat),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_ftruncate),
    any(libc::SYS_fallocate),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_fsync),
    any(libc::SYS_fdatasync),
    any(libc::SYS_syncfs),
    any(libc::SYS_fstatfs),
    any(libc::SYS_getxattr),
    rare(any(libc::SYS_listxattr), "a guest's program that asks for all attributes, as cp -a"),
    any(libc::SYS_setxattr),
    rare(any(libc::SYS_removexattr), "an access control list that is taken away"),
    // Locks that the guest shares with others.
    rare(
        when(libc::SYS_fcntl, &[&[is(1, libc::F_OFD_SETLK as u32)], &[is(1, libc::F_OFD_GETLK as u32)]]),
        "locks on parts of a file (`locks=shared`): the guests that are watched lock whole ones",
    ),
    any(libc::SYS_flock),
    // What others change there.
    any(libc::SYS_fanotify_init),
    any(libc::SYS_fanotify_mark),
    any(libc::SYS_name_to_handle_at),
];

/// What begins anew under its name; where that cannot be, it is emptied.
const ROTATION: &[Call] = &[
    any(libc::SYS_ftruncate),
    any(libc::SYS_openat),
    any(libc::SYS_newfstatat),
    any(libc::SYS_statx),
    rare(any(libc::SYS_renameat), "an output that is full becomes FILE.1"),
    any(libc::SYS_flock),
];

/// Pages of memory that come when they are touched.
const USERFAULTFD: &[Call] = &[when(libc::SYS_ioctl, &[&[kind(0xaa)]])];

/// What a machine is built of, orders are answered with, and a snapshot is made by.
const HOUSE: &[Call] = &[
    any(libc::SYS_epoll_create1),
    any(libc::SYS_timerfd_create),
    any(libc::SYS_memfd_create),
    // Opens what has no link on the way; asks whether one on it is the kernel's own (`planted`).
    any(libc::SYS_openat2),
    rare(any(libc::SYS_fstatfs), "such a link in /proc"),
    any(libc::SYS_pipe2),
    rare(any(libc::SYS_sendfile), "a kernel or initrd that is loaded again at a reset"),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_uname),
    rare(any(libc::SYS_geteuid), "whether a folder or a socket is this user's"),
    any(libc::SYS_getppid),
    // Not those of another process of this user's.
    rare(when(libc::SYS_prlimit64, &[&[is(0, 0)]]), "as many descriptors as a socket device may have"),
    // What of memory is there.
    rare(
        any(libc::SYS_mincore),
        "what of a guest's memory is there, where the kernel does not tell by other means",
    ),
    // Seals of memory that others get.
    when(libc::SYS_fcntl, &[&[is(1, libc::F_ADD_SEALS as u32)]]),
    // The child that writes a snapshot's memory as it was, and its end.
    when(libc::SYS_clone, &[&[of(0, NEW_NAMESPACES | libc::CLONE_VM as u32 | 0xff, libc::SIGCHLD as u32)]]),
    when(libc::SYS_prctl, &[&[is(0, libc::PR_SET_PDEATHSIG as u32)]]),
    any(libc::SYS_kill),
    any(libc::SYS_wait4),
    any(libc::SYS_close_range),
    rare(
        any(libc::SYS_bind),
        "where a machine listens that is restored or moved, and ports that are published later",
    ),
    rare(any(libc::SYS_listen), "the same"),
    rare(
        when(libc::SYS_socketpair, &[&[is(0, libc::AF_UNIX as u32)]]),
        "a caller of this process's for the guest's agent",
    ),
    // What becomes of a tap's interface.
    rare(when(libc::SYS_socket, &[&[is(0, libc::AF_NETLINK as u32)]]), "whether a tap's interface is up"),
];

/// The lists of `role`, for a `machine` with these needs.
pub(super) fn of_role(role: &Role, machine: Needs) -> Vec<&'static [Call]> {
    let mut lists = vec![ALL];
    let mut add = |condition: bool, list: &'static [Call]| {
        if condition {
            lists.push(list);
        }
    };
    let has = |need| machine.contains(need);
    let rotates = has(Needs::ROTATES);
    match role {
        Role::Vcpu(_) => {
            // A device's registers are written from here: what the device is made of begins, changes and ends.
            add(true, KVM_IOCTLS);
            add(true, STREAMS);
            add(has(Needs::VHOST), VHOST);
            add(has(Needs::TAP), TAP);
            add(has(Needs::ROTATES), ROTATION);
            // The device is another after a reset of its driver's.
            add(has(Needs::HOST_VSOCK), OPENING);
        }
        Role::Device(_, needs) => {
            let has = |need| needs.intersects(need);
            add(true, KVM_IOCTLS);
            add(true, STREAMS);
            // A disk's threads start with its first request, and are no freer than who starts them.
            add(has(Needs::DISK), THREADS);
            add(has(Needs::DISK), IMAGE);
            add(has(Needs::SHARE), SHARE);
            add(has(Needs::INTERNET), INTERNET);
            add(has(Needs::INTERNET | Needs::UNIX), FILES);
            // A user network knows the machines of its segments by name, and asks whether they are there.
            add(has(Needs::UNIX) || has(Needs::INTERNET) && machine.contains(Needs::UNIX), UNIX);
            add(has(Needs::VHOST), VHOST);
            add(has(Needs::TAP), TAP);
            add(rotates, ROTATION);
        }
        Role::Disk(_) => add(true, IMAGE),
        Role::Output => {
            add(true, STREAMS);
            add(has(Needs::ROTATES), ROTATION);
        }
        Role::Log => {}
        Role::Fetch => {
            add(true, IMAGE);
            add(true, THREADS);
            add(true, USERFAULTFD);
        }
        Role::Main | Role::Control | Role::Errand | Role::Owner(_) => {
            add(has(Needs::REBOOTS), KVM_AGAIN);
            add(true, KVM_IOCTLS);
            add(true, STREAMS);
            add(true, IMAGE);
            add(true, THREADS);
            add(true, FILES);
            // Whoever starts a thread allows what it does.
            add(has(Needs::SHARE), SHARE);
            add(has(Needs::UNIX), UNIX);
            add(has(Needs::SWITCH), SEGMENT);
            add(has(Needs::HOST_VSOCK), HOST_VSOCK);
            add(has(Needs::PINS), PINS);
            add(true, HOUSE);
            add(true, USERFAULTFD);
            add(has(Needs::INTERNET), INTERNET);
            add(has(Needs::VHOST), VHOST);
            add(has(Needs::TAP), TAP);
        }
    }
    lists
}
