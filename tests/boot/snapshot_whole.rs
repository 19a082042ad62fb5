//! Linux saved and restored at a hundred moments under load, and on its way up: `make snapshot-whole`.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Kernel, available, vmm};
use crate::snapshot::{await_running, exec, number, well};

/// On each processor: random bytes whose sum is taken, copied, and taken again; what went wrong is in /tmp/bad. And one that counts
/// aloud on the console, and one that sleeps by the clock.
const LOAD: &str = "cd /tmp; for cpu in $(seq $(nproc)); do ( while :; do head -c 262144 /dev/urandom >a$cpu; \
    s=$(sha256sum <a$cpu); cp a$cpu b$cpu; [ \"$(sha256sum <b$cpu)\" = \"$s\" ] || echo sum $cpu >>bad; \
    echo x >>turns$cpu; done ) & done; \
    ( n=0; while :; do n=$((n + 1)); echo count $n count; sleep 0.02; done ) >/dev/hvc0 & \
    ( while :; do a=$(cut -d. -f1 /proc/uptime); sleep 1; b=$(cut -d. -f1 /proc/uptime); \
    [ $((b - a)) -ge 1 ] || echo slept $a $b >>bad; echo x >>slept; done ) &";

/// The next of a row of numbers that look random and are the same in each run.
fn random(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

/// The numbers that a guest has counted on its console: without a gap, whatever line it begins and ends in.
fn counted(text: &str) -> Option<(u64, u64)> {
    let numbers: Vec<u64> = text
        .split("count ")
        .filter_map(|part| part.strip_suffix(" count\r\n").or(part.strip_suffix(" count\n"))?.parse().ok())
        .collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    Some((*numbers.first()?, *numbers.last()?))
}

fn restore(first: &Guest, folder: &str, name: &str) -> Guest {
    let mut command = first.command(&["restore", folder, "--name", name]);
    command.stdin(Stdio::null());
    let restored = Guest::start_in(command, first.runtime());
    await_running(first, &restored, name);
    restored
}

/// `rounds` times: it is saved at some moment and restored; then both are looked at, and every other time the one that was saved
/// ends and the restored one is the next to be saved.
fn under_load(kernel: Kernel, options: &[&str], rounds: u64) {
    let mut command = vmm(kernel, "echo up; while :; do sleep 1000; done");
    command.args(["--name", "g0", "--vsock", "--rng", "--net", "user"]).args(options);
    let first = Guest::start(command);
    first.wait_for("up", 1);
    let nonce = exec(&first, "g0", "cat /proc/sys/kernel/random/uuid | tee /tmp/nonce");
    exec(&first, "g0", "ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; ping -c 1 -W 10 10.0.2.2");
    exec(&first, "g0", &format!("({LOAD}) </dev/null >/dev/null 2>&1"));
    let folder = tempfile::tempdir().unwrap();
    let (mut seed, mut current, mut generation) = (rounds, None::<Guest>, 0);
    let mut name = "g0".to_owned();
    for round in 1..=rounds {
        thread::sleep(Duration::from_millis(random(&mut seed, 1000)));
        let saved = folder.path().join(format!("{round}"));
        let saved = saved.to_str().unwrap();
        let began = Instant::now();
        assert_eq!(first.control(&["snapshot", "create", &name, saved]).0, Some(0), "round {round}");
        let took = began.elapsed();
        let turns = number(&exec(&first, &name, "cat /tmp/turns* | wc -l"));
        let next = format!("g{round}");
        let restored = restore(&first, saved, &next);
        for name in [&name, &next] {
            assert_eq!(
                exec(&first, name, "cat /tmp/nonce /tmp/bad 2>/dev/null; true"),
                nonce,
                "round {round}: {name}"
            );
            let script = "a=$(cat /tmp/turns* | wc -l); sleep 2; cat /tmp/turns* | wc -l | xargs echo $a";
            let told = exec(&first, name, script);
            let (then, later) = told.split_once(' ').unwrap();
            assert!(number(later) > number(then), "round {round}: {name}: {told}");
            exec(&first, name, "ping -c 1 -W 10 10.0.2.2 && head -c 16 /dev/hwrng >/tmp/hwrng");
            well(&first, name);
        }
        let (begin, end) = counted(&restored.text()).expect("it counts");
        assert!(end > begin, "round {round}: {begin} to {end}");
        println!("ok {round}: generation {generation}, {took:.1?}, {turns} turns, counted from {begin}");
        std::fs::remove_dir_all(saved).unwrap();
        let ends = if round % 2 == 0 { std::mem::replace(&mut name, next) } else { next };
        assert_eq!(first.control(&["kill", &ends]).0, Some(0));
        if round % 2 == 0 {
            (current, generation) = (Some(restored), generation + 1);
        }
    }
    drop(current);
}

#[test]
#[ignore = "an hour: make snapshot-whole"]
fn whole_one() {
    if available("snapshots under load, one processor") {
        under_load(Kernel::Stock, &["--mem", "384M"], 100);
    }
}

#[test]
#[ignore = "an hour: make snapshot-whole"]
fn whole_two() {
    if available("snapshots under load, two processors") {
        under_load(Kernel::Stock, &["--mem", "384M", "--cpus", "2", "--transport", "pci"], 100);
    }
}

#[test]
#[ignore = "an hour: make snapshot-whole"]
fn whole_four() {
    if available("snapshots under load, four processors") {
        under_load(Kernel::TunedPvh, &["--cpus", "4"], 100);
    }
}

/// Debian's kernel and ours saved at some moment on their way up: what is restored comes up.
#[test]
#[ignore = "an hour: make snapshot-whole"]
fn whole_boot() {
    if !available("snapshots of a boot") {
        return;
    }
    for (kernel, cpus, most) in [(Kernel::TunedPvh, "2", 800), (Kernel::Stock, "1", 4000)] {
        let mut seed = most;
        for round in 1..=50 {
            let mut command = vmm(kernel, "echo up; while :; do sleep 1000; done");
            command.args(["--name", "first", "--vsock", "--rng", "--mem", "384M", "--cpus", cpus]);
            let first = Guest::start(command);
            await_running(&first, &first, "first");
            let moment = random(&mut seed, most);
            thread::sleep(Duration::from_millis(moment));
            let folder = first.runtime().join("saved");
            let folder = folder.to_str().unwrap();
            assert_eq!(first.control(&["snapshot", "create", "first", folder]).0, Some(0));
            let was_up = first.text().contains("up");
            let second = restore(&first, folder, "second");
            if !was_up {
                // It may have come up between being saved and being looked at.
                let deadline = Instant::now() + second.patience;
                while !second.text().contains("up") && !exec_works(&first, "second") {
                    assert!(Instant::now() < deadline, "{moment} ms: {}", second.text());
                }
            }
            for name in ["first", "second"] {
                exec(&first, name, "true");
                well(&first, name);
            }
            println!("ok {kernel:?} {round}: {moment} ms");
        }
    }
}

fn exec_works(guest: &Guest, name: &str) -> bool {
    guest.command(&["exec", name, "true"]).stderr(Stdio::null()).status().unwrap().success()
}
