//! A role's list of system calls as a filter of the kernel's (seccomp(2), Documentation/userspace-api/seccomp_filter.rst).
//!
//! What a filter costs is paid at every start: the kernel runs it for each number that it knows, to see which are allowed
//! whatever the arguments (`seccomp_cache_prepare`), and translates it. So numbers are looked for by halving, not one after another,
//! what looks at arguments lies apart, and all ends are shared.

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

/// Goes over `yes` instructions if what was loaded is `k`, else over `no`.
const fn equal(k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, k)
}

/// From a number on: the calls of that number, as several lists may have them. What has none is refused.
type From<'a> = (u32, &'a [&'static Call]);

fn program(lists: &[&'static [Call]]) -> Vec<sock_filter> {
    let mut calls: Vec<_> = lists.iter().copied().flatten().collect();
    calls.sort_unstable_by_key(|call| call.number);
    let mut ranges: Vec<From<'_>> = vec![(0, &[])];
    for same in calls.chunk_by(|one, other| one.number == other.number) {
        let number = same.first().map_or(0, |call| call.number as u32);
        // Of numbers that follow each other, or at the very first.
        if ranges.last().is_some_and(|(start, _)| *start == number) {
            ranges.pop();
        }
        if !(is_free(same) && ranges.last().is_some_and(|(_, last)| is_free(last))) {
            ranges.push((number, same));
        }
        ranges.push((number + 1, &[]));
    }
    let mut program = Program::new();
    let rest = program.tree(&ranges);
    program.at(rest)
}

/// Whether it may be made whatever its arguments: whoever may do so, may, whatever else allows it.
fn is_free(same: &[&Call]) -> bool {
    same.iter().any(|call| call.rules.is_empty())
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

/// A place in a program, by how many instructions follow: a program's jumps all go forward, so it is written from its end.
type Place = usize;

/// A program, its last instruction first.
struct Program(Vec<sock_filter>);

/// Where every program allows a call.
const ALLOWED: Place = 0;
/// Where every program refuses one.
const REFUSED: Place = 1;

impl Program {
    fn new() -> Self {
        Self(vec![ALLOW, TRAP])
    }

    /// The program that goes on at `rest` behind its front.
    fn at(mut self, rest: Place) -> Vec<sock_filter> {
        self.follow(rest);
        self.0.extend(FRONT.into_iter().rev());
        self.0.reverse();
        self.0
    }

    fn push(&mut self, instruction: sock_filter) -> Place {
        self.0.push(instruction);
        self.0.len() - 1
    }

    /// How many instructions the next one would go over to come to `place`.
    fn over(&self, place: Place) -> usize {
        self.0.len() - 1 - place
    }

    /// What is next comes to `place`.
    fn follow(&mut self, place: Place) -> Place {
        match self.over(place) {
            0 => place,
            over => self.push(instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, over as u32)),
        }
    }

    /// Goes on at `yes` or `no`, by how `condition` has what was loaded stand to `k`.
    fn choose(&mut self, condition: u32, k: u32, yes: Place, no: Place) -> Place {
        // One that depends on something goes over 255 instructions at most, and the other place may come between.
        let mut near = |place| if self.over(place) < 255 { place } else { self.follow(place) };
        let (yes, no) = (near(yes), near(no));
        let over = |place| self.over(place) as u8;
        self.push(instruction(libc::BPF_JMP | condition | libc::BPF_K, over(yes), over(no), k))
    }

    /// Finds what becomes of the number that is loaded.
    fn tree(&mut self, ranges: &[From<'_>]) -> Place {
        let (below, above) = match ranges {
            [(_, same)] => return self.judge(same),
            _ => ranges.split_at(ranges.len() / 2),
        };
        let start = above.first().map_or(0, |(start, _)| *start);
        let (above, below) = (self.tree(above), self.tree(below));
        self.choose(libc::BPF_JGE, start, above, below)
    }

    /// Allows what one of `same` does, or refuses it.
    fn judge(&mut self, same: &[&Call]) -> Place {
        if is_free(same) {
            return ALLOWED;
        }
        let rules = same.iter().flat_map(|call| call.rules).rev();
        rules.fold(REFUSED, |next, rule| self.hold(rule, next))
    }

    /// Allows what has all these `arguments`, and goes on at `next` with what has not.
    fn hold(&mut self, arguments: &[Argument], next: Place) -> Place {
        arguments.iter().rev().fold(ALLOWED, |held, argument| {
            let (value, held, next) = match argument.test {
                Test::Is(value) | Test::Of(_, value) => (value, held, next),
                Test::IsNot(value) => (value, next, held),
                Test::IsOwnPid => (std::process::id(), held, next),
            };
            self.choose(libc::BPF_JEQ, value, held, next);
            if let Test::Of(mask, _) = argument.test {
                self.push(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, mask));
            }
            self.push(load(self::argument(argument.place)))
        })
    }
}

#[cfg(test)]
mod tests;
