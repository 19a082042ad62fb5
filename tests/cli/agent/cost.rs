//! What a command costs this processor: the agent, the command itself and `vmm exec`, without a guest between them.

use std::fs;
use std::time::Duration;

use super::Guest;
use crate::place::*;

const COMMANDS: u32 = 1000;

/// Processor time of the agent; of those whom it has waited for; of those whom this process has waited for.
fn times(guest: &mut Guest) -> [Duration; 3] {
    let agent = guest.agent().id();
    let stat = |who: &str| {
        let stat = fs::read_to_string(format!("/proc/{who}/stat")).unwrap();
        // After the name, which ends with the last bracket, utime is the 12th field.
        let ticks: Vec<u64> = stat
            .rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .skip(11)
            .take(4)
            .map(|n| n.parse().unwrap())
            .collect();
        let time = |ticks: u64| Duration::from_millis(ticks * 10);
        [time(ticks[0] + ticks[1]), time(ticks[2] + ticks[3])]
    };
    let [own, commands] = stat(&agent.to_string());
    let [_, clients] = stat("self");
    [own, commands, clients]
}

#[test]
#[ignore = "a measurement: cargo test --release --package vmm --test cli agent::cost -- --ignored --nocapture"]
fn a_command_costs() {
    let mut guest = Guest::new();
    assert_eq!(guest.vmm("exec web true").status.code(), Some(0));
    let before = times(&mut guest);
    for _ in 0..COMMANDS {
        assert_eq!(finish(guest.command("exec web true").spawn().unwrap()).status.code(), Some(0));
    }
    let after = times(&mut guest);
    for (what, (after, before)) in
        ["the agent", "the command", "vmm exec"].iter().zip(after.iter().zip(before))
    {
        println!("{what}: {:.2} ms", (*after - before).as_secs_f64() * 1e3 / f64::from(COMMANDS));
    }
}
