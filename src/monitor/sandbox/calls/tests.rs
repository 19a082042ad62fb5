//! The lists against what runs were seen to make: `make calls`.

use std::collections::BTreeSet;
use std::env;
use std::fs;

use syscalls::Sysno;

use super::*;

/// A call that was made.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Made {
    number: c_long,
    /// Its argument that the lists look at, if they do.
    argument: Option<u32>,
}

impl Call {
    fn name(&self) -> &'static str {
        Sysno::new(self.number as usize).map_or("unknown", |call| call.name())
    }

    /// What of this none of `made` needed, in words.
    fn unmade(&self, made: &BTreeSet<Made>) -> Vec<String> {
        let mut same = made.iter().filter(|made| made.number == self.number).peekable();
        if self.rules.is_empty() || same.peek().is_none() {
            return if same.peek().is_some() { Vec::new() } else { vec![self.name().to_owned()] };
        }
        let arguments: Vec<_> = same.filter_map(|made| made.argument).collect();
        let unmade = self.rules.iter().filter(|rule| !arguments.iter().any(|value| holds(rule, *value)));
        unmade.map(|rule| format!("{} with {rule:x?}", self.name())).collect()
    }
}

/// Whether `value` is as `rule` has it. All that a rule looks at is one argument.
fn holds(rule: &[Argument], value: u32) -> bool {
    rule.iter().all(|argument| match argument.test {
        Test::Is(wanted) => value == wanted,
        Test::IsNot(other) => value != other,
        Test::Of(mask, wanted) => value & mask == wanted,
        Test::IsOwnPid => true,
    })
}

/// Lines of `tests/calls/made`: role, number, argument.
fn made(text: &str, roles: &[&str]) -> BTreeSet<Made> {
    let mut made = BTreeSet::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        if !roles.contains(&words.next().unwrap()) {
            continue;
        }
        let number = words.next().unwrap().parse().unwrap();
        let argument = words.next().map(|word| {
            let digits = word.strip_prefix("0x").unwrap_or(word);
            u64::from_str_radix(digits, 16).unwrap() as u32
        });
        made.insert(Made { number, argument });
    }
    made
}

#[test]
#[ignore = "wants what runs were seen to make: make calls"]
fn nothing_is_allowed_that_is_never_made_unless_it_says_why() {
    const HOUSE: &[&str] = &["main", "control", "errand", "owner"];
    let text = fs::read_to_string(env::var("VMM_CALLS_MADE").unwrap()).unwrap();
    let kinds: [(Role, &[&str]); 7] = [
        (Role::Vcpu(0), &["vcpu"]),
        (Role::Device(String::new(), Needs::all()), &["device"]),
        (Role::Disk(String::new()), &["disk"]),
        (Role::Output, &["output"]),
        (Role::Log, &["log"]),
        (Role::Fetch, &["fetch"]),
        (Role::Main, HOUSE),
    ];
    let everyone: Vec<_> = kinds.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    let by_anyone = made(&text, &everyone);
    let unknown: BTreeSet<_> = text.lines().filter(|line| line.starts_with("unknown")).collect();
    assert!(unknown.is_empty(), "threads of no role: {unknown:?}");
    let mut unexplained = BTreeSet::new();
    for (role, names) in kinds {
        let by_role = made(&text, names);
        println!("{}: {} kinds of calls made; allowed and not made:", names.join(", "), by_role.len());
        for call in of_role(&role, Needs::all()).into_iter().flatten() {
            for unmade in call.unmade(&by_role) {
                let by_none = call.unmade(&by_anyone).contains(&unmade);
                match call.why {
                    Some(why) => println!("    {unmade}: {why}"),
                    None if !by_none => println!("    {unmade}: others with this list make it"),
                    None => _ = unexplained.insert(unmade),
                }
            }
        }
    }
    assert!(unexplained.is_empty(), "made by none, and nothing says why: {unexplained:#x?}");
}
