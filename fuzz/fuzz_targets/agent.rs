//! What the agent and its client say to each other, and the tar streams between them: any bytes, in any pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_agent::protocol::{Decoder, MAX_REQUEST};
use vmm_agent::tar::{Policy, unpack};

fuzz_target!(|data: &[u8]| {
    let Some((&[how, piece], rest)) = data.split_first_chunk::<2>() else { return };
    if how & 1 == 0 {
        let (mut decoder, mut again) = (Decoder::default(), Vec::new());
        'all: for bytes in rest.chunks(usize::from(piece) + 1) {
            decoder.feed(bytes);
            loop {
                match decoder.next() {
                    Ok(Some(message)) => message.put(&mut again),
                    Ok(None) => break,
                    Err(_) => break 'all,
                }
            }
        }
        // What was understood is what was there.
        assert!(again.len() <= rest.len().min(MAX_REQUEST));
    } else {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let policy = Policy { owners: false, devices: false, rename: how & 2 != 0 };
        let _ = unpack(rest, root.to_str().unwrap().as_bytes(), policy);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing beside it");
    }
});
