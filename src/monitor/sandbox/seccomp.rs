//! A role's list of system calls as a filter of the kernel's (seccomp(2), Documentation/userspace-api/seccomp_filter.rst).
//!
//! What a filter costs is paid at every start: the kernel runs it for each number that it knows, to see which are allowed
//! whatever the arguments (`seccomp_cache_prepare`), and translates it. So numbers are looked for by halving, not one after another,
//! and what looks at arguments lies apart.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{apply_filter, sock_filter};

use super::Needs;
use super::calls::{self, Argument, Call, Test};
use crate::threads::Role;

/// The calling thread makes no other calls than `role`'s, in a machine with these `needs`.
pub fn apply(role: &Role, needs: Needs) -> io::Result<()> {
    let program = program(&calls::of_role(role, needs));
    apply_filter(&program).map_err(|error| match error {
        seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error) => error,
        other => io::Error::other(other),
    })
}

/// Offsets in `struct seccomp_data`; of an argument, its lower half.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(place: u8) -> u32 {
    16 + 8 * place as u32
}

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;
/// KVM_RUN (Documentation/virt/kvm/api.rst, 4.10).
const KVM_RUN: u32 = 0xae80;

const ALLOW: sock_filter = give(libc::SECCOMP_RET_ALLOW);
const TRAP: sock_filter = give(libc::SECCOMP_RET_TRAP);
const KILL: sock_filter = give(libc::SECCOMP_RET_KILL_PROCESS);
const UNKNOWN: sock_filter = give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

const fn give(k: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, k)
}

const fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

const fn jump(over: u32) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, over)
}

/// Goes over `yes` instructions if what was loaded is `k`, else over `no`.
const fn equal(k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, k)
}

/// Goes over `yes` instructions if what was loaded is `k` or more, else over `no`.
const fn at_least(k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, yes, no, k)
}

/// What becomes of a call.
enum Verdict {
    Trap,
    Allow,
    /// One of these rules has to hold.
    If(Vec<&'static [Argument]>),
}

fn program(lists: &[&'static [Call]]) -> Vec<sock_filter> {
    let mut calls = BTreeMap::<u32, Verdict>::new();
    for call in lists.iter().copied().flatten() {
        // Whoever may make it whatever the arguments may do so, whatever else allows it.
        match calls.entry(call.number as u32).or_insert(Verdict::If(Vec::new())) {
            Verdict::If(rules) if !call.rules.is_empty() => rules.extend(call.rules),
            known => *known = Verdict::Allow,
        }
    }
    // From which number on which verdict holds.
    let mut ranges = vec![(0, Verdict::Trap)];
    for (number, verdict) in calls {
        // Of numbers that follow each other, or at the very first.
        if ranges.last().is_some_and(|(start, _)| *start == number) {
            ranges.pop();
        }
        if !matches!((ranges.last(), &verdict), (Some((_, Verdict::Allow)), Verdict::Allow)) {
            ranges.push((number, verdict));
        }
        ranges.push((number + 1, Verdict::Trap));
    }
    [&FRONT[..], &tree(&ranges)].concat()
}

/// What comes before the list: `clone3` is unknown here, so that the C library takes `clone`, whose flags can be seen; and entering
/// the guest, which is what a machine does most, is allowed before anything else is looked at. The call's number is loaded at the end.
const FRONT: [sock_filter; 11] = [
    load(ARCHITECTURE),
    equal(X86_64, 1, 0),
    KILL,
    load(NUMBER),
    equal(libc::SYS_clone3 as u32, 0, 1),
    UNKNOWN,
    equal(libc::SYS_ioctl as u32, 0, 3),
    load(argument(1)),
    equal(KVM_RUN, 0, 1),
    ALLOW,
    load(NUMBER),
];

/// Finds the verdict on the number that is loaded.
fn tree(ranges: &[(u32, Verdict)]) -> Vec<sock_filter> {
    let (below, above) = match ranges {
        [(_, verdict)] => return judge(verdict),
        _ => ranges.split_at(ranges.len() / 2),
    };
    let start = above.first().map_or(0, |(start, _)| *start);
    let (below, above) = (tree(below), tree(above));
    // One that depends on something goes over 255 instructions at most.
    let choice = match u8::try_from(above.len()) {
        Ok(over) => vec![at_least(start, 0, over)],
        Err(_) => vec![at_least(start, 1, 0), jump(above.len() as u32)],
    };
    [choice, above, below].concat()
}

fn judge(verdict: &Verdict) -> Vec<sock_filter> {
    match verdict {
        Verdict::Trap => vec![TRAP],
        Verdict::Allow => vec![ALLOW],
        Verdict::If(rules) => rules.iter().flat_map(|rule| hold(rule)).chain([TRAP]).collect(),
    }
}

/// Allows what has all these `arguments`, and goes on behind itself with what has not.
fn hold(arguments: &[Argument]) -> Vec<sock_filter> {
    let mut code = vec![ALLOW];
    for argument in arguments.iter().rev() {
        let past = code.len() as u8;
        let (mask, test) = match argument.test {
            Test::Is(value) => (None, equal(value, 0, past)),
            Test::IsNot(value) => (None, equal(value, past, 0)),
            Test::Of(mask, value) => (Some(mask), equal(value, 0, past)),
            Test::IsOwnPid => (None, equal(std::process::id(), 0, past)),
        };
        let masked = mask.map(|mask| instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask));
        code = [load(self::argument(argument.place))]
            .into_iter()
            .chain(masked)
            .chain([test])
            .chain(code)
            .collect();
    }
    code
}
