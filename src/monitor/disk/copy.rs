//! Files copied as they are at a moment: by sharing their blocks where the file system can do that, else without their holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Bytes that are copied at once where the kernel does not do it.
const PIECE: usize = 256 << 10;

/// Copies all of `from` to `to`, which is empty.
pub fn whole(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = seek(from, SeekFrom::End(0))?;
    to.set_len(size)?;
    range(from, to, 0, size)
}

/// Copies what is not a hole in the `len` bytes at `offset` of `from` to the same place in `to`.
pub fn range(from: &File, to: &File, offset: u64, len: u64) -> io::Result<()> {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => return Ok(()),
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let hole = seek(from, SeekFrom::Hole(data)).map_or(end, |hole| hole.min(end));
        copied(from, to, data, hole)?;
        at = hole.max(data);
    }
    Ok(())
}

fn copied(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut at, mut bytes) = (start, Vec::new());
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let (mut input, mut output) = (at, at);
        let by_kernel = match bytes.is_empty() {
            true => copy_file_range(from, Some(&mut input), to, Some(&mut output), left).unwrap_or(0),
            false => 0,
        };
        if by_kernel > 0 {
            at += by_kernel as u64;
            continue;
        }
        // Other file systems, or it was cut behind our back: then reading says so.
        bytes.resize(PIECE, 0);
        let piece = &mut bytes[..left.min(PIECE)];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_what_the_file_has_and_its_holes() {
        use std::os::unix::fs::MetadataExt;
        let [from, to] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        from.set_len(8 << 20).unwrap();
        for at in [0u64, 4096 * 7, 3 << 20, (8 << 20) - 100] {
            from.write_all_at(&[at as u8 | 1; 100], at).unwrap();
        }
        whole(&from, &to).unwrap();
        let contents = |file: &File| {
            let mut bytes = vec![0; 8 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(contents(&from) == contents(&to));
        let [from, to] = [from, to].map(|file| file.metadata().unwrap());
        assert_eq!((from.len(), from.blocks()), (to.len(), to.blocks()));
    }

    #[test]
    fn a_part_is_copied_to_its_place() {
        let [from, to] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        from.write_all_at(&[1; 10_000], 0).unwrap();
        to.write_all_at(&[2; 10_000], 0).unwrap();
        range(&from, &to, 5000, 100).unwrap();
        let mut bytes = vec![0; 10_000];
        to.read_exact_at(&mut bytes, 0).unwrap();
        let ones: Vec<_> = (0..10_000).filter(|at| bytes[*at] == 1).collect();
        assert_eq!(ones, (5000..5100).collect::<Vec<_>>());
    }
}
