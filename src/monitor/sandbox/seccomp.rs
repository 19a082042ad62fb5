//! A role's list of system calls as a filter of the kernel's (seccomp(2), Documentation/userspace-api/seccomp_filter.rst).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter, sock_filter,
};

use super::Needs;
use super::calls::{self, Argument, Call, Test};
use crate::threads::Role;

/// The calling thread makes no other calls than `role`'s, in a machine with these `needs`.
pub fn apply(role: &Role, needs: Needs) -> io::Result<()> {
    let program = program(calls::of_role(role, needs)).map_err(io::Error::other)?;
    apply_filter(&program).map_err(|error| match error {
        seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error) => error,
        other => io::Error::other(other),
    })
}

fn program(lists: Vec<&'static [Call]>) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::<i64, Option<Vec<SeccompRule>>>::new();
    for call in lists.into_iter().flatten() {
        let of_call = call
            .rules
            .iter()
            .map(|rule| SeccompRule::new(rule.iter().map(condition).collect::<Result<_, _>>()?));
        let of_call = of_call.collect::<Result<Vec<_>, _>>()?;
        // Whoever may make it whatever the arguments may do so, whatever else allows it.
        let known = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
        match known {
            Some(known) if !of_call.is_empty() => known.extend(of_call),
            known => *known = None,
        }
    }
    let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    let rest: BpfProgram = filter.try_into()?;
    Ok(front().into_iter().chain(rest).collect())
}

fn condition(argument: &Argument) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (op, value) = match argument.test {
        Test::Is(value) => (SeccompCmpOp::Eq, value),
        Test::IsNot(value) => (SeccompCmpOp::Ne, value),
        Test::Of(mask, value) => (SeccompCmpOp::MaskedEq(mask.into()), value),
        Test::IsOwnPid => (SeccompCmpOp::Eq, std::process::id()),
    };
    SeccompCondition::new(argument.place, SeccompCmpArgLen::Dword, op, value.into())
}

/// What comes before the list: `clone3` is unknown here, so that the C library takes `clone`, whose flags can be seen; and entering
/// the guest, which is what a machine does most, is allowed before anything else is looked at.
fn front() -> [sock_filter; 9] {
    /// Offsets in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const SECOND: u32 = 24;
    const X86_64: u32 = 0xc000_003e;
    /// KVM_RUN (Documentation/virt/kvm/api.rst, 4.10).
    const KVM_RUN: u32 = 0xae80;
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let load = |k| sock_filter { code: LOAD, jt: 0, jf: 0, k };
    let equal = |k, jt, jf| sock_filter { code: IF, jt, jf, k };
    let give = |k| sock_filter { code: RETURN, jt: 0, jf: 0, k };
    [
        load(NUMBER),
        equal(libc::SYS_clone3 as u32, 5, 0),
        equal(libc::SYS_ioctl as u32, 0, 6),
        load(SECOND),
        equal(KVM_RUN, 0, 4),
        load(ARCHITECTURE),
        // Past the end of this: the list kills what is another architecture's.
        equal(X86_64, 1, 2),
        give(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
        give(libc::SECCOMP_RET_ALLOW),
    ]
}
