//! What the agent and its client say to each other, over a console port, too, and the tar streams between them: any bytes, in any
//! pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_agent::port::{Reader, put, put_mark};
use vmm_agent::protocol::{Decoder, MAX_REQUEST};
use vmm_agent::tar::{Policy, unpack};

fuzz_target!(|data: &[u8]| {
    let Some((&[how, piece], rest)) = data.split_first_chunk::<2>() else { return };
    if how & 4 != 0 {
        let (mut reader, mut data) = (Reader::default(), Vec::new());
        for mut bytes in rest.chunks(usize::from(piece) + 1) {
            while !bytes.is_empty() {
                let (count, _) = reader.read(bytes, &mut data);
                assert!((1..=bytes.len()).contains(&count));
                bytes = &bytes[count..];
            }
        }
        assert!(data.len() <= rest.len());
        // Whatever came before, a client finds its own.
        let mut own = Vec::new();
        put_mark([7; 8], &mut own);
        put(rest, &mut own);
        data.clear();
        let (count, token) = reader.read(&own, &mut data);
        data.clear();
        reader.read(&own[count..], &mut data);
        assert!(token == Some([7; 8]) && data == rest);
    } else if how & 1 == 0 {
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
