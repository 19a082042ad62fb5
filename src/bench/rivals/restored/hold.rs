//! What holds a guest until it goes on from its snapshot: a word in its memory, which it looks at all the time, and which is changed
//! in the snapshot's file. So what is measured needs no device, clock or input of any monitor.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The word of a guest that waits. No other text is like it.
pub const HELD: [u8; 16] = *b"held: vmm-bench1";
/// The byte that lets it go, by being another one.
pub const LAST: usize = HELD.len() - 1;
const FREE: u8 = b'0';

/// Compared at a time: most of a guest's memory is empty.
const BLOCK: usize = 4096;

/// Lets the guest go whose memory is in the file `path`, wherever there. (Linux has its first program more than once.)
///
/// # Errors
/// The file cannot be read or changed, or there is no such guest in it.
pub fn release_in(path: &Path) -> Result<(), String> {
    let failed = |what: &str, error: std::io::Error| format!("{what} {}: {error}", path.display());
    let bytes = std::fs::read(path).map_err(|error| failed("read", error))?;
    let file = File::options().write(true).open(path).map_err(|error| failed("open", error))?;
    let found = places(&bytes);
    if found.is_empty() {
        return Err(format!("{} has no guest that waits", path.display()));
    }
    for place in found {
        file.write_all_at(&[FREE], place as u64).map_err(|error| failed("change", error))?;
    }
    Ok(())
}

/// Where the last byte of each such word is.
pub fn places(bytes: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    for start in (0..bytes.len()).step_by(BLOCK) {
        let end = bytes.len().min(start + BLOCK);
        // A word may begin in one block and end in the next.
        let until = bytes.len().min(end + LAST);
        if bytes[start..end] == [0; BLOCK][..end - start] {
            continue;
        }
        let words = bytes[start..until].windows(HELD.len()).enumerate();
        found.extend(words.filter(|(_, word)| **word == HELD).map(|(at, _)| start + at + LAST));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_found_wherever_it_lies() {
        for at in [0, 1, BLOCK - 15, BLOCK - 1, BLOCK, 3 * BLOCK - 16] {
            let mut bytes = vec![0; 3 * BLOCK];
            bytes[at..at + 16].copy_from_slice(&HELD);
            assert_eq!(places(&bytes), [at + LAST]);
        }
        assert_eq!(places(&[&HELD[..], &HELD[..], b"x"].concat()), [15, 31]);
        assert!(places(&[]).is_empty());
    }

    #[test]
    fn a_file_without_such_a_guest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        std::fs::write(&path, [&[7; 5000][..], &HELD].concat()).unwrap();
        release_in(&path).unwrap();
        assert!(std::fs::read(&path).unwrap().ends_with(b"bench0"));
        assert!(release_in(&path).unwrap_err().contains("no guest"));
    }
}
