//! Makes an archive of what is at a path.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom as Seeking, lgetxattr, llistxattr, seek};
use rustix::io::Errno;

use super::header::{Entry, Kind};
use super::{BLOCK, Error, padding, path_of};

/// How much is read at once.
const PIECE: usize = 64 << 10;

/// Files up to this size are read before their size is written down.
const DOUBTFUL: u64 = 4096;

/// The most that is read of a file that tells no size.
const MOST_UNSIZED: u64 = 16 << 20;

/// The longest list of names, and the longest value, that an attribute may have in Linux (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_XATTR: usize = 64 << 10;

/// Writes what is at `path` to `out`, under the name `name`. A symbolic link is a file like any other, and not followed.
///
/// # Errors
/// Something cannot be read, or `out` takes no more. Sockets, which no archive has, are reported when all else is done.
pub fn pack(path: &[u8], name: &[u8], out: impl Write) -> Result<(), Error> {
    let mut packer = Packer { out: BufWriter::with_capacity(PIECE, out), links: HashMap::new(), left: None };
    // Folders are done before what is in them; of what is in them, names in order.
    let mut rest = vec![(path_of(path), name.to_vec())];
    while let Some((path, name)) = rest.pop() {
        let metadata = fs::symlink_metadata(&path).map_err(|error| failed("read", &path, error))?;
        packer.add(&path, &name, &metadata)?;
        if metadata.is_dir() {
            let listed = |error| failed("list", &path, error);
            let names: io::Result<Vec<_>> =
                fs::read_dir(&path).map_err(listed)?.map(|e| Ok(e?.file_name())).collect();
            let mut names = names.map_err(listed)?;
            names.sort_unstable_by(|one, other| other.cmp(one));
            rest.extend(
                names
                    .into_iter()
                    .map(|file| (path.join(&file), [&name, &b"/"[..], file.as_bytes()].concat())),
            );
        }
    }
    packer.write(&[0; 2 * BLOCK])?;
    packer.out.flush().map_err(|error| Error::Stream("write", error))?;
    packer.left.map_or(Ok(()), Err)
}

struct Packer<W: Write> {
    out: BufWriter<W>,
    /// The names of files that have more than one, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// The first that is not as it should be.
    left: Option<Error>,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &[u8], metadata: &Metadata) -> Result<(), Error> {
        let file_type = metadata.file_type();
        let kind = match () {
            () if file_type.is_dir() => Kind::Folder,
            () if file_type.is_file() => Kind::File,
            () if file_type.is_symlink() => Kind::Symlink,
            () if file_type.is_char_device() => Kind::Char,
            () if file_type.is_block_device() => Kind::Block,
            () if file_type.is_fifo() => Kind::Fifo,
            () => {
                self.left.get_or_insert(Error::Left {
                    path: path.to_owned(),
                    what: "is a socket, and was left out",
                });
                return Ok(());
            }
        };
        let mut entry = Entry {
            path: name.to_vec(),
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: (metadata.mtime(), metadata.mtime_nsec() as u32),
            size: 0,
            target: Vec::new(),
            device: (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
            xattrs: xattrs(path),
            sparse: None,
        };
        if kind == Kind::Folder {
            entry.path.push(b'/');
        }
        if kind == Kind::Symlink {
            entry.target =
                fs::read_link(path).map_err(|error| failed("read", path, error))?.into_os_string().into_vec();
        }
        if kind != Kind::Folder && metadata.nlink() > 1 {
            let first = self.links.entry((metadata.dev(), metadata.ino())).or_insert_with(|| name.to_vec());
            if first != name {
                (entry.kind, entry.target, entry.xattrs) = (Kind::HardLink, first.clone(), Vec::new());
            }
        }
        match entry.kind {
            Kind::File => self.add_file(path, entry),
            _ => self.write(&entry.blocks()),
        }
    }

    fn add_file(&mut self, path: &Path, mut entry: Entry) -> Result<(), Error> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let mut file = opened.map_err(|error| failed("read", path, error))?;
        let metadata = file.metadata().map_err(|error| failed("read", path, error))?;
        let size = metadata.len();
        if size <= DOUBTFUL {
            return self.add_doubtful(path, &mut file, entry, size);
        }
        let parts = if metadata.blocks() * 512 < size { data(&file, size) } else { None };
        let Some(parts) = parts else {
            entry.size = size;
            self.write(&entry.blocks())?;
            self.copy(path, &mut file, size)?;
            return self.write(&[0; BLOCK][..padding(size)]);
        };
        // GNU's format 1.0: the map first, as decimal numbers, one a line.
        let mut map = format!("{}\n", parts.len());
        parts.iter().for_each(|(at, len)| map.push_str(&format!("{at}\n{len}\n")));
        let mut map = map.into_bytes();
        map.resize(map.len() + padding(map.len() as u64), 0);
        let bytes: u64 = parts.iter().map(|(_, len)| len).sum();
        entry.sparse = Some(size);
        entry.size = map.len() as u64 + bytes;
        self.write(&entry.blocks())?;
        self.write(&map)?;
        for (at, len) in parts {
            file.seek(SeekFrom::Start(at)).map_err(|error| failed("read", path, error))?;
            self.copy(path, &mut file, len)?;
        }
        self.write(&[0; BLOCK][..padding(bytes)])
    }

    /// Adds a file whose size may not be what it says: those of /proc say 0, those of /sys a page.
    fn add_doubtful(
        &mut self,
        path: &Path,
        file: &mut File,
        mut entry: Entry,
        size: u64,
    ) -> Result<(), Error> {
        let most = if size == 0 { MOST_UNSIZED } else { size };
        let mut content = Vec::new();
        let read = file.take(most).read_to_end(&mut content);
        // Some cannot be read, and some only when there is news.
        if read.is_err() || content.len() as u64 == MOST_UNSIZED {
            let what = "was not read to its end";
            self.left.get_or_insert(Error::Left { path: path.to_owned(), what });
        }
        entry.size = content.len() as u64;
        self.write(&entry.blocks())?;
        self.write(&content)?;
        self.write(&[0; BLOCK][..padding(entry.size)])
    }

    /// Copies `size` bytes: what a file that has shrunk meanwhile lacks is zeros, and is reported.
    fn copy(&mut self, path: &Path, file: &mut File, mut size: u64) -> Result<(), Error> {
        let mut piece = vec![0; PIECE];
        while size > 0 {
            let want = size.min(PIECE as u64) as usize;
            let count = match file.read(&mut piece[..want]) {
                Ok(0) => {
                    piece[..want].fill(0);
                    let what = "shrank while it was read";
                    self.left.get_or_insert(Error::Left { path: path.to_owned(), what });
                    want
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed("read", path, error)),
            };
            self.write(&piece[..count])?;
            size -= count as u64;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(|error| Error::Stream("write", error))
    }
}

/// Where a file has data, and how much; none where its file system does not tell. The last part ends with the file.
fn data(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, Seeking::Data(at)) {
            Ok(start) => start.min(size),
            // No more data.
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        let end = seek(file, Seeking::Hole(start)).ok()?.min(size);
        parts.push((start, end - start));
        // A file that changes under us may answer anything.
        at = end.max(at + 1);
    }
    if parts.last().is_none_or(|(at, len)| at + len < size) {
        parts.push((size, 0));
    }
    Some(parts)
}

/// Those that can be read. A file system without them has none.
fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; MAX_XATTR];
    let Ok(count) = llistxattr(path, &mut names[..]) else { return Vec::new() };
    let names = names[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let read = |name: &[u8]| {
        let mut value = vec![0; MAX_XATTR];
        let count = lgetxattr(path, name, &mut value[..]).ok()?;
        value.truncate(count);
        Some((name.to_vec(), value))
    };
    names.filter(|name| !name.contains(&b'=')).filter_map(read).collect()
}

fn failed(what: &'static str, path: &Path, error: io::Error) -> Error {
    Error::File { what, path: PathBuf::from(path), error }
}
