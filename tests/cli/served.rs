//! Machines whose queues others serve, saved and restored, or why not. What is in the queues, the tests of devices and in the rig see to.

use vmm_monitor::config::VmConfig;

use crate::back_end::{BackEnd, Conduct, Wire};
use crate::counting::*;
use crate::place::*;

#[test]
fn a_machine_with_a_back_end_goes_on_in_memory_that_a_back_end_can_map() {
    if !has_kvm("a_machine_with_a_back_end_goes_on_in_memory_that_a_back_end_can_map") {
        return;
    }
    let ends = tempfile::tempdir().unwrap();
    let listen = |name: &str| BackEnd::listen(&ends.path().join(name), Conduct::default(), Wire::Echo);
    let (_first, _second) = (listen("first"), listen("second"));
    let net = |name: &str| format!("--net vhost-user={}", ends.path().join(name).display());
    let (place, guest) = counting(&net("first"));
    place.done("snapshot create --stop v s");
    guest.finish();
    let config = std::fs::read(place.path("s/config.json")).unwrap();
    let config: VmConfig = serde_json::from_slice(&config).unwrap();
    assert!(config.is_shared());
    let restored = format!("restore s --serial file=more --console off --name w {}", net("second"));
    let restored = Running::new(place.command(&restored));
    assert!(is_counted(&await_words(&place, "more", 100)));
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", restored.pid())).unwrap();
    let ram: Vec<_> = maps.lines().filter(|line| line.contains("/memfd:guest-ram")).collect();
    assert!(!ram.is_empty() && ram.iter().all(|line| line.contains("rw-s")), "{maps}");
    // And once more: what it has is what a snapshot has.
    place.done("snapshot create --stop w t");
    restored.finish();
    place.done("snapshot verify t");
    let last = Running::new(place.command(&format!("restore t --serial file=last {}", net("second"))));
    assert!(is_counted(&await_words(&place, "last", 100)));
    drop(last);
    // One that is not there is told at once.
    let absent = place.fails(&format!("restore s --serial file=none {}", net("third")), BAD_ARGUMENT);
    assert!(absent.contains("third"), "{absent}");
    // A copy beside it would need a back end of its own.
    let _again = Running::new(place.command(&format!("restore s --serial file=x --name y {}", net("first"))));
    place.await_running("y");
    let alone = place.fails("fork y", BAD_ARGUMENT);
    assert!(alone.contains("vhost-user=") && alone.contains("--net user"), "{alone}");
}

#[test]
fn a_machine_whose_folder_another_process_serves_is_not_saved() {
    if !has_kvm("a_machine_whose_folder_another_process_serves_is_not_saved") {
        return;
    }
    let ends = tempfile::tempdir().unwrap();
    let path = ends.path().join("end");
    let _served = BackEnd::listen(&path, Conduct::default(), Wire::Echo);
    let (place, guest) = counting(&format!("--share vhost-user={}", path.display()));
    for command in ["snapshot create v s", "snapshot create --stop v s", "fork v"] {
        let said = place.fails(command, HOST);
        assert!(said.contains("a shared folder that another process serves"), "{command}: {said}");
    }
    assert!(!place.path("s").exists());
    // It goes on.
    place.done("pause v");
    place.done("resume v");
    drop(guest);
}
