//! Filters against the lists that they are made from, as the kernel would run them.

use super::*;

/// What `program` answers to a call.
fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> sock_filter {
    let data = |offset: u32| match offset {
        NUMBER => number,
        ARCHITECTURE => architecture,
        _ => {
            let (place, upper) = ((offset - 16) / 8, offset % 8);
            assert_eq!(upper, 0, "the upper half of an argument");
            arguments[place as usize] as u32
        }
    };
    let (mut at, mut loaded) = (0, 0);
    loop {
        let here = &program[at];
        at += 1;
        match u32::from(here.code) {
            0x20 => loaded = data(here.k),
            0x54 => loaded &= here.k,
            0x05 => at += here.k as usize,
            0x15 => at += usize::from(if loaded == here.k { here.jt } else { here.jf }),
            0x35 => at += usize::from(if loaded >= here.k { here.jt } else { here.jf }),
            0x06 => return here.clone(),
            code => panic!("instruction {code:#x}"),
        }
    }
}

fn allows(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> bool {
    let answer = run(program, X86_64, number, arguments);
    assert!(answer.k == ALLOW.k || answer.k == TRAP.k || number == libc::SYS_clone3 as u32, "{answer:?}");
    answer.k == ALLOW.k
}

/// Whether the lists have a call of these arguments.
fn has(lists: &[&'static [Call]], number: u32, arguments: [u64; 6]) -> bool {
    let holds = |argument: &Argument| {
        let value = arguments[usize::from(argument.place)] as u32;
        match argument.test {
            Test::Is(wanted) => value == wanted,
            Test::IsNot(other) => value != other,
            Test::Of(mask, wanted) => value & mask == wanted,
            Test::IsOwnPid => value == std::process::id(),
        }
    };
    lists
        .iter()
        .copied()
        .flatten()
        .filter(|call| call.number == libc::c_long::from(number))
        .any(|call| call.rules.is_empty() || call.rules.iter().any(|rule| rule.iter().all(holds)))
}

/// Values that some rule of a list looks for in an argument, and others beside each.
fn values(lists: &[&'static [Call]]) -> Vec<u64> {
    let rules = lists.iter().copied().flatten().flat_map(|call| call.rules);
    let wanted = rules.flat_map(|rule| rule.iter()).map(|argument| match argument.test {
        Test::Is(value) | Test::IsNot(value) | Test::Of(_, value) => value,
        Test::IsOwnPid => std::process::id(),
    });
    let masks = [0, 1, 0x1000, 0x8000_0000];
    let mut values: Vec<u64> = wanted
        .flat_map(|value| masks.map(|mask| u64::from(value ^ mask)))
        .chain([0, u64::MAX, 1 << 32, u64::from(KVM_RUN)])
        .collect();
    values.sort_unstable();
    values.dedup();
    values
}

fn roles() -> Vec<Role> {
    let devices = [Needs::empty(), Needs::DISK, Needs::SHARE, Needs::UNIX, Needs::all()];
    let devices = devices.map(|needs| Role::Device("device".to_owned(), needs));
    let others =
        [Role::Main, Role::Vcpu(0), Role::Disk("disk".to_owned()), Role::Output, Role::Log, Role::Fetch];
    devices.into_iter().chain(others).collect()
}

#[test]
fn a_filter_allows_what_its_lists_have_and_nothing_else() {
    for needs in [Needs::empty(), Needs::SHARE, Needs::REBOOTS | Needs::UNIX, Needs::all()] {
        for role in roles() {
            let lists = calls::of_role(&role, needs);
            let program = program(&lists);
            let values = values(&lists);
            // More numbers than any kernel has, and those at which signs and halves of a word change.
            for number in (0..1100).chain([0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX]) {
                let looked_at = lists
                    .iter()
                    .copied()
                    .flatten()
                    .any(|call| call.number == libc::c_long::from(number) && !call.rules.is_empty());
                let (values, places) = if looked_at { (&values[..], 3) } else { (&[u64::MAX][..], 1) };
                for value in values {
                    // In one place at a time: no rule looks at two.
                    for place in 0..places {
                        let mut arguments = [0; 6];
                        arguments[place] = *value;
                        let is_run = number == libc::SYS_ioctl as u32 && arguments[1] as u32 == KVM_RUN;
                        assert_eq!(
                            allows(&program, number, arguments),
                            is_run || has(&lists, number, arguments),
                            "{role:?} of a machine with {needs:?}: {number} with {arguments:x?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn another_architectures_calls_end_the_process_and_what_cannot_be_seen_is_unknown() {
    let program = program(&calls::of_role(&Role::Main, Needs::all()));
    // AUDIT_ARCH_I386.
    assert_eq!(run(&program, 0x4000_0003, libc::SYS_read as u32, [0; 6]).k, KILL.k);
    assert_eq!(run(&program, X86_64, libc::SYS_clone3 as u32, [0; 6]).k, UNKNOWN.k);
}

/// Runs of some length between a jump and its end: conditions go over 255 instructions at most.
#[test]
fn a_far_end_is_reached() {
    let mut program = Program::new();
    let filler = |program: &mut Program, len| (0..len).for_each(|_| _ = program.push(TRAP));
    for len in [250, 251, 252, 253, 254, 255, 256, 257, 300] {
        filler(&mut program, len);
        let refused = program.push(TRAP);
        filler(&mut program, len);
        let choice = program.choose(libc::BPF_JEQ, 7, ALLOWED, refused);
        program.push(load(NUMBER));
        let written: Vec<_> = program.0.iter().rev().cloned().collect();
        assert_eq!(run(&written, X86_64, 7, [0; 6]).k, ALLOW.k, "over {len}, at {choice}");
        assert_eq!(run(&written, X86_64, 8, [0; 6]).k, TRAP.k, "over {len}, at {choice}");
    }
}
