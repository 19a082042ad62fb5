//! The file of an overlay that is kept: a header, the map, then the disk's clusters, each in its place; holes where nothing was written.
//!
//! | offset | |
//! |---|---|
//! | 0 | [`Header`], in a block of 4096 bytes |
//! | 4096 | the map: a bit for each 4096 bytes of the disk, the lowest of a byte first, in whole blocks |
//! | after it | the disk |
//!
//! A file has its name only once its header is on the disk. It is as untrusted as any other input.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, SeekFrom, renameat_with, seek};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

use super::map::{BLOCK, Map};
use super::{CLUSTER, Unfit};
use crate::disk::Error;
use crate::disk::files::lock;
use crate::{output, planted};

/// The first bytes.
pub const MAGIC: [u8; 8] = *b"VMMOVRLY";
const VERSION: u32 = 1;
/// Where the map begins: after one block.
const MAP: u64 = BLOCK as u64;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: le::U32,
    /// Bytes of a cluster.
    cluster: le::U32,
    /// Bytes of the base, and so of the disk.
    size: le::U64,
    /// When the base was last changed: seconds since 1970, and nanoseconds. Zeroes for a block device, which does not tell.
    seconds: le::I64,
    nanoseconds: le::I64,
    /// CRC-32 of what is before it.
    checksum: le::U32,
    _reserved: le::U32,
}

/// What an overlay is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    /// Bytes.
    pub size: u64,
    /// When it was last changed, as in the header.
    pub modified: (i64, i64),
}

impl Base {
    /// That of `size` bytes, open as `file`.
    pub fn of(file: &File, size: u64) -> io::Result<Self> {
        let facts = file.metadata()?;
        let modified = if facts.is_file() { (facts.mtime(), facts.mtime_nsec()) } else { (0, 0) };
        Ok(Self { size, modified })
    }

    /// How many clusters a disk on it has.
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(CLUSTER)
    }

    /// Where the disk begins in an overlay's file.
    fn data(&self) -> u64 {
        MAP + Map::blocks(self.clusters()) * BLOCK as u64
    }
}

impl Header {
    fn of(base: &Base) -> Self {
        let header = Self {
            magic: MAGIC,
            version: VERSION.into(),
            cluster: (CLUSTER as u32).into(),
            size: base.size.into(),
            seconds: base.modified.0.into(),
            nanoseconds: base.modified.1.into(),
            checksum: 0.into(),
            _reserved: 0.into(),
        };
        Self { checksum: header.sum().into(), ..header }
    }

    fn sum(&self) -> u32 {
        let end = std::mem::offset_of!(Self, checksum);
        crc32fast::hash(&self.as_bytes()[..end])
    }

    /// Whether this is the header of an overlay of `base`, whose file has `len` bytes.
    fn check(&self, base: &Base, len: u64) -> Result<(), Unfit> {
        let was = Base { size: self.size.get(), modified: (self.seconds.get(), self.nanoseconds.get()) };
        let wanted = base.data() + base.size;
        match self {
            _ if self.magic != MAGIC => Err(Unfit::Foreign),
            _ if self.version.get() != VERSION => {
                Err(Unfit::Version { found: self.version.get(), known: VERSION })
            }
            _ if self.checksum.get() != self.sum() => Err(Unfit::Damaged("its header has a wrong checksum")),
            _ if u64::from(self.cluster.get()) != CLUSTER => {
                Err(Unfit::Damaged("its clusters are not of 4096 bytes"))
            }
            _ if was != *base => Err(Unfit::OtherBase { was, is: *base }),
            _ if len != wanted => Err(Unfit::Length { len, wanted }),
            _ => Ok(()),
        }
    }
}

/// An overlay's file.
pub struct Opened {
    pub file: File,
    /// Where the disk begins in it.
    pub data: u64,
    pub map: Map,
}

impl Opened {
    /// A file with nothing in it yet, neither header nor map, that is as long as the overlay of `base`.
    pub fn empty(file: File, base: &Base) -> Self {
        Self { file, data: base.data(), map: Map::new(base.clusters()) }
    }
}

/// Opens the overlay at `path` of `base`, or makes a new one, and locks it.
pub fn open_kept(path: &Path, base: &Base) -> Result<File, Error> {
    let failed = |source| Error::Overlay { path: path.to_owned(), source };
    loop {
        match existing(path, false) {
            Ok(file) => {
                lock(&file, path, false)?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        match create(path, base) {
            Ok(file) => return Ok(file),
            // Another was quicker: it is in use. Or it is a symbolic link to nothing.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.exists() => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Opens the overlay at `path`, which is there and is only read.
pub fn open_lower(path: &Path) -> Result<File, Error> {
    existing(path, true).map_err(|source| Error::Overlay { path: path.to_owned(), source })
}

fn existing(path: &Path, readonly: bool) -> io::Result<File> {
    // Without O_NONBLOCK a FIFO would be waited for.
    match readonly {
        true => planted::open(path, OFlags::RDONLY | OFlags::NONBLOCK),
        false => planted::open_to_write(path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()),
    }
}

/// Reads the open overlay `file` of `base`, which is called `path`, and locks it.
pub fn load(file: File, path: &Path, base: &Base, readonly: bool) -> Result<Opened, Error> {
    let failed = |source| Error::Overlay { path: path.to_owned(), source };
    let unfit = |unfit| Error::Unfit { path: path.to_owned(), unfit };
    let facts = file.metadata().map_err(failed)?;
    if !facts.is_file() {
        return Err(unfit(Unfit::Foreign));
    }
    lock(&file, path, readonly)?;
    let mut header = [0; size_of::<Header>()];
    let read = file.read_exact_at(&mut header, 0).ok().and_then(|()| Header::read_from_bytes(&header).ok());
    let header = read.ok_or_else(|| unfit(Unfit::Foreign))?;
    header.check(base, facts.len()).map_err(unfit)?;

    let map = Map::new(base.clusters());
    let mut bytes = [0; BLOCK];
    let mut at = MAP;
    while at < base.data() {
        at = match seek(&file, SeekFrom::Data(at)) {
            // It begins in the middle of a block only where the file system's are smaller.
            Ok(data) => at.max(data - data % BLOCK as u64),
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        if at < base.data() {
            file.read_exact_at(&mut bytes, at).map_err(failed)?;
            map.load(((at - MAP) / BLOCK as u64) as usize, &bytes);
            at += BLOCK as u64;
        }
    }
    if map.goes_beyond(base.clusters()) {
        return Err(unfit(Unfit::Damaged("its map has clusters beyond the end of the disk")));
    }
    Ok(Opened { file, data: base.data(), map })
}

/// A new one, under a hidden name until all is on the disk.
fn create(path: &Path, base: &Base) -> io::Result<File> {
    let (folder, hidden) = output::hidden(path).ok_or(io::ErrorKind::IsADirectory)?;
    let hidden = Hidden(hidden);
    let file = create_new(&hidden.0)?;
    // Nobody else has it yet.
    let _ = lock(&file, path, false);
    write_header(&file, base)?;
    file.sync_all()?;
    renameat_with(CWD, &hidden.0, CWD, path, RenameFlags::NOREPLACE)?;
    File::open(folder)?.sync_all()?;
    Ok(file)
}

fn create_new(path: &Path) -> io::Result<File> {
    planted::open_to_write(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR)
}

/// Makes `file` as long as the overlay of `base` is, and begins it.
pub fn write_header(file: &File, base: &Base) -> io::Result<()> {
    file.set_len(base.data() + base.size)?;
    file.write_all_at(Header::of(base).as_bytes(), 0)
}

/// Where a block of the map is in a file.
pub fn place(block: usize) -> u64 {
    MAP + (block * BLOCK) as u64
}

/// Goes, unless it has been renamed.
struct Hidden(PathBuf);

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The overlay of `base` in a file that nobody else can open, and that is gone with this process, however that ends. It has neither
/// header nor map.
pub fn temporary(base: &Base) -> Result<File, Error> {
    let sized = |file: File| file.set_len(base.data() + base.size).map(|()| file);
    unnamed().and_then(sized).map_err(|source| Error::Temporary { folder: folder(), source })
}

/// Where temporary overlays are. What a guest writes can be much, and /tmp is often in memory.
fn folder() -> PathBuf {
    std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty()).unwrap_or("/var/tmp".into()).into()
}

/// A file without a name where temporary overlays are: it is gone when nobody has it open.
///
/// # Errors
/// There is no place for it.
pub fn unnamed() -> io::Result<File> {
    let folder = folder();
    let flags = libc::O_TMPFILE;
    match OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(&folder) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            removed(&folder)
        }
        file => file,
    }
}

/// The same where the file system knows no files without names.
fn removed(folder: &Path) -> io::Result<File> {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let hidden = Hidden(folder.join(format!(".vmm-overlay.{}.{count}", std::process::id())));
    create_new(&hidden.0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::open_again;
    use super::*;

    const SIZE: u64 = 40_960 + 512;

    fn place() -> (tempfile::TempDir, PathBuf, Base) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("overlay");
        (dir, path, Base { size: SIZE, modified: (7, 8) })
    }

    fn open(path: &Path, base: &Base) -> Result<Opened, Error> {
        load(open_kept(path, base)?, path, base, false)
    }

    fn unfit(path: &Path, base: &Base) -> Unfit {
        open_again(|| match open(path, base) {
            Err(Error::Unfit { unfit, .. }) => Ok(unfit),
            Err(error) => Err(error),
            Ok(_) => panic!("it is taken"),
        })
    }

    #[test]
    fn a_file_is_made_once_and_read_back_and_has_one_writer() {
        let (dir, path, base) = place();
        let made = open(&path, &base).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(made.file.metadata().unwrap().len(), made.data + SIZE);
        made.file.write_all_at(&[0b101], MAP).unwrap();
        assert!(matches!(open(&path, &base), Err(Error::Locked { .. })));
        drop(made);
        let map = open_again(|| open(&path, &base)).map;
        assert_eq!([map.run(0, 11), map.run(1, 11), map.run(2, 11)], [(true, 1), (false, 2), (true, 3)]);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_file_of_another_base_or_of_none_is_refused_with_what_differs() {
        let (_keep, path, base) = place();
        drop(open(&path, &base).unwrap());
        let before = fs::read(&path).unwrap();
        let larger = Base { size: SIZE + 512, ..base };
        assert_eq!(unfit(&path, &larger), Unfit::OtherBase { was: base, is: larger });
        let changed = Base { modified: (7, 9), ..base };
        assert_eq!(unfit(&path, &changed), Unfit::OtherBase { was: base, is: changed });
        let text = unfit(&path, &changed).to_string();
        assert!(text.contains("@7.000000008") && text.contains("@7.000000009"), "{text}");

        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = before.clone();
            change(&mut bytes);
            fs::write(&path, &bytes).unwrap();
            unfit(&path, &base)
        };
        let header = |change: &dyn Fn(&mut Header)| {
            with(&|bytes| {
                let mut header = Header::of(&base);
                change(&mut header);
                header.checksum = header.sum().into();
                bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
            })
        };
        let len = before.len() as u64;
        assert_eq!(with(&Vec::clear), Unfit::Foreign);
        assert_eq!(with(&|bytes| bytes.truncate(20)), Unfit::Foreign);
        assert_eq!(with(&|bytes| bytes.fill(0)), Unfit::Foreign);
        assert_eq!(with(&|bytes| bytes[20] ^= 1), Unfit::Damaged("its header has a wrong checksum"));
        let cut = Unfit::Length { len: len - 1, wanted: len };
        assert_eq!(with(&|bytes| bytes.truncate(bytes.len() - 1)), cut);
        assert_eq!(with(&|bytes| bytes.push(0)), Unfit::Length { len: len + 1, wanted: len });
        // 11 clusters: bits 0 to 10.
        for byte in [1, 100, BLOCK - 1] {
            let beyond = with(&|bytes| bytes[BLOCK + byte] = 0x80);
            assert_eq!(beyond, Unfit::Damaged("its map has clusters beyond the end of the disk"));
        }
        assert_eq!(header(&|header| header.version = 2.into()), Unfit::Version { found: 2, known: 1 });
        let clusters = Unfit::Damaged("its clusters are not of 4096 bytes");
        assert_eq!(header(&|header| header.cluster = 512.into()), clusters);
        let huge = Base { size: u64::MAX, ..base };
        assert_eq!(header(&|header| header.size = u64::MAX.into()), Unfit::OtherBase { was: huge, is: base });
        for unfit in [cut, clusters, Unfit::Foreign, Unfit::OtherBase { was: huge, is: base }] {
            assert!(!unfit.hint().is_empty());
        }
    }

    #[test]
    fn what_is_no_file_is_neither_taken_nor_waited_for() {
        let (dir, path, base) = place();
        rustix::fs::mkfifoat(CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        assert_eq!(unfit(&path, &base), Unfit::Foreign);
        let failed = |path: &Path| matches!(open(path, &base), Err(Error::Overlay { .. }));
        std::os::unix::fs::symlink("nothing", dir.path().join("link")).unwrap();
        assert!(
            failed(dir.path()) && failed(&dir.path().join("no/folder")) && failed(&dir.path().join("link"))
        );
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "nothing is left beside them");
    }
}
