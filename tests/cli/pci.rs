//! A guest of a few instructions moves its disk's memory about, after it has kicked so often that the host's KVM turns kicks into signals.

use serde_json::Value;

use crate::images::*;
use crate::place::*;

/// Where the disk's memory is at first, and where it comes to.
const HERE: u32 = 0xe000_0000;
const THERE: u32 = 0xe800_0000;
/// virtio-pci's common configuration: the number of queues. And where the first queue's doorbell is.
const NUM_QUEUES: u32 = 0x12;
const DOORBELL: u32 = 0x3000;
/// Kicks that come as exits before KVM takes them.
const EXITS: usize = 64;

/// Writes `value` to `register` of device 1's configuration space, by the ports.
fn configure(register: u8, value: u32) -> Vec<u8> {
    let out = |port: u32, value: u32| {
        // mov edx, port; mov eax, value; out dx, eax
        [&[0xba][..], &port.to_le_bytes(), &[0xb8], &value.to_le_bytes(), &[0xef]].concat()
    };
    [out(0xcf8, 0x8000_0800 | u32::from(register)), out(0xcfc, value)].concat()
}

/// The disk's memory is at `base` from now on.
fn move_to(base: u32) -> Vec<u8> {
    [configure(0x10, base), configure(0x14, 0)].concat()
}

/// Kicks the first queue `times` times where its doorbell would be if the memory is at `base`.
fn kick(base: u32, times: u32) -> Vec<u8> {
    let doorbell = base + DOORBELL;
    // mov ecx, times; mov edi, doorbell
    let set_up = [&[0xb9][..], &times.to_le_bytes(), &[0xbf], &doorbell.to_le_bytes()].concat();
    // mov [rdi], ax; loop
    [&set_up[..], &[0x66, 0x89, 0x07, 0xe2, 0xfb]].concat()
}

/// Reads the number of queues where it would be if the memory is at `base`: ebx is 0 only while all of these are as expected.
fn expect(base: u32, queues: u16) -> Vec<u8> {
    let at = base + NUM_QUEUES;
    // mov edi, at; movzx eax, word [rdi]; xor eax, queues; or ebx, eax
    let read = [&[0xbf][..], &at.to_le_bytes(), &[0x0f, 0xb7, 0x07]].concat();
    [&read[..], &[0x35], &u32::from(queues).to_le_bytes(), &[0x09, 0xc3]].concat()
}

#[test]
fn a_busy_doorbell_moves_with_the_memory_while_its_guest_runs() {
    if !has_kvm("a_busy_doorbell_moves_with_the_memory_while_its_guest_runs") {
        return;
    }
    let nobody = 0xffff;
    let code = [
        // xor ebx, ebx
        vec![0x31, 0xdb],
        configure(4, 6),
        expect(HERE, 1),
        kick(HERE, 100),
        move_to(THERE),
        [expect(THERE, 1), expect(HERE, nobody)].concat(),
        kick(THERE, 1000),
        // The old place is nobody's.
        kick(HERE, 10),
        // Outside the windows, and on the configuration space: it stays.
        [move_to(0x1000), expect(THERE, 1), move_to(0xf800_0000), expect(THERE, 1)].concat(),
        kick(THERE, 1000),
        // Not decoded, and decoded again.
        [configure(4, 0), expect(THERE, nobody)].concat(),
        [configure(4, 6), move_to(HERE), expect(HERE, 1), kick(HERE, 1000)].concat(),
        // mov eax, ebx; or al, ah: what is wrong, as the status; out 0xf4, al; hlt
        vec![0x89, 0xd8, 0x08, 0xe0, 0xe6, 0xf4, 0xf4],
    ]
    .concat();
    let place = Place::new();
    place.file("code", kernel(&code));
    place.file("disk", vec![0; 1 << 20]);
    let run = place
        .vmm("--trace record --kernel code --mem 64M --console off --transport pci --disk disk --debug-exit");
    assert_eq!(run.status.code(), Some(1), "{}", text(&run.stderr));
    let told = place.done("trace report record --json");
    let exits = told.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let kicks: Vec<_> = exits.filter(|exit| exit["instruction"] == "mov [rdi],ax").collect();
    assert_eq!(kicks.len(), EXITS + 10, "{:?}", kicks.last());
}
