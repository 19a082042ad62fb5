//! What FUSE's requests and replies look like in memory (include/uapi/linux/fuse.h, version 7.39). Knows no file system.

use std::ffi::CStr;
use std::mem::size_of;

use rustix::fs::{FileType, StatVfs, Statx};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian as le};

/// The version that is spoken.
pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 39;
/// The oldest that is: of Linux 4.20, whose INIT has [`InitIn::max_readahead`] and [`InitOut::max_pages`].
pub const OLDEST_MINOR: u32 = 28;

/// Flags of INIT.
pub mod init {
    pub const ASYNC_READ: u32 = 1;
    pub const POSIX_LOCKS: u32 = 1 << 1;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const DONT_MASK: u32 = 1 << 6;
    pub const FLOCK_LOCKS: u32 = 1 << 10;
    pub const HAS_IOCTL_DIR: u32 = 1 << 11;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const POSIX_ACL: u32 = 1 << 20;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub const INIT_EXT: u32 = 1 << 30;
    /// In the second word, which INIT_EXT says is there.
    pub const DIRECT_IO_ALLOW_MMAP: u32 = 1 << 4;
}

/// Flags of an open file.
pub mod open {
    pub const DIRECT_IO: u32 = 1;
    pub const KEEP_CACHE: u32 = 1 << 1;
}

/// Which attributes SETATTR sets.
pub mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    /// With [`SIZE`]: by somebody who may not set the bits that go with it.
    pub const KILL_SUIDGID: u32 = 1 << 11;
    /// All that has a value.
    pub const VALUES: u32 = MODE | UID | GID | SIZE | ATIME | MTIME | ATIME_NOW | MTIME_NOW;
}

/// In [`LkIn::flags`]: of what is open, and not of a part of the file.
pub const LK_FLOCK: u32 = 1;
/// In [`GetattrIn::flags`] and [`StatxIn::flags`]: the file handle is there.
pub const GETATTR_FH: u32 = 1;
/// In [`WriteIn::write_flags`]: by somebody who may not set a file's set-user-ID bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `_IOR('v', 1, [u8; 8192])`, of any folder: the next change that somebody else has made. docs/share.md has what is answered.
pub const NEXT_CHANGE: u32 = 2 << 30 | 8192 << 16 | (b'v' as u32) << 8 | 1;
/// In [`FsyncIn::flags`]: the data alone.
pub const FSYNC_FDATASYNC: u32 = 1;

macro_rules! opcodes {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// What is asked for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Opcode { $($name),* }

        impl Opcode {
            /// None if this server has no such request.
            pub fn of(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            #[cfg(test)]
            pub const ALL: &[(u32, Self)] = &[$(($number, Self::$name)),*];
        }
    };
}

opcodes! {
    Lookup = 1, Forget = 2, Getattr = 3, Setattr = 4, Readlink = 5, Symlink = 6, Mknod = 8, Mkdir = 9, Unlink = 10,
    Rmdir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, Statfs = 17, Release = 18, Fsync = 20,
    Setxattr = 21, Getxattr = 22, Listxattr = 23, Removexattr = 24, Flush = 25, Init = 26, Opendir = 27, Readdir = 28,
    Releasedir = 29, Fsyncdir = 30, Getlk = 31, Setlk = 32, Setlkw = 33, Create = 35, Interrupt = 36, Destroy = 38, Ioctl = 39, BatchForget = 42, Fallocate = 43,
    Readdirplus = 44, Rename2 = 45, Lseek = 46, CopyFileRange = 47, Syncfs = 50, Tmpfile = 51,
    Statx = 52,
}

impl Opcode {
    /// Changes what is on the host's disk, whatever its arguments. What opens a file says by its flags whether it does.
    pub fn changes(self) -> bool {
        matches!(
            self,
            Self::Setattr
                | Self::Symlink
                | Self::Mknod
                | Self::Mkdir
                | Self::Unlink
                | Self::Rmdir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::Setxattr
                | Self::Removexattr
                | Self::Create
                | Self::Fallocate
                | Self::CopyFileRange
                | Self::Tmpfile
        )
    }
}

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub struct $name { $(pub $field: $kind),* }
    )*};
}

requests! {
    /// `struct fuse_in_header`, in front of each request.
    InHeader {
        len: le::U32, opcode: le::U32, unique: le::U64, node: le::U64, uid: le::U32, gid: le::U32, pid: le::U32,
        total_extlen: le::U16, _padding: le::U16,
    }
    /// `struct fuse_init_in` of before INIT_EXT.
    InitIn { major: le::U32, minor: le::U32, max_readahead: le::U32, flags: le::U32 }
    /// What INIT_EXT adds.
    InitExt { flags: le::U32, _unused: [le::U32; 11] }
    ForgetIn { lookups: le::U64 }
    BatchForgetIn { count: le::U32, _padding: le::U32 }
    ForgetOne { node: le::U64, lookups: le::U64 }
    GetattrIn { flags: le::U32, _padding: le::U32, handle: le::U64 }
    /// What of `struct statx` is asked for is the guest's to choose: it gets all that there is.
    StatxIn { flags: le::U32, _reserved: le::U32, handle: le::U64, _sx_flags: le::U32, _sx_mask: le::U32 }
    SetattrIn {
        valid: le::U32, _padding: le::U32, handle: le::U64, size: le::U64, _lock_owner: le::U64, atime: le::U64,
        mtime: le::U64, _ctime: le::U64, atime_nsec: le::U32, mtime_nsec: le::U32, _ctime_nsec: le::U32, mode: le::U32,
        _unused4: le::U32, uid: le::U32, gid: le::U32, _unused5: le::U32,
    }
    MknodIn { mode: le::U32, rdev: le::U32, umask: le::U32, _padding: le::U32 }
    MkdirIn { mode: le::U32, umask: le::U32 }
    RenameIn { new_folder: le::U64 }
    Rename2In { new_folder: le::U64, flags: le::U32, _padding: le::U32 }
    LinkIn { old: le::U64 }
    OpenIn { flags: le::U32, _open_flags: le::U32 }
    CreateIn { flags: le::U32, mode: le::U32, umask: le::U32, _open_flags: le::U32 }
    ReadIn {
        handle: le::U64, offset: le::U64, size: le::U32, _read_flags: le::U32, _lock_owner: le::U64, _flags: le::U32,
        _padding: le::U32,
    }
    WriteIn {
        handle: le::U64, offset: le::U64, size: le::U32, write_flags: le::U32, _lock_owner: le::U64, _flags: le::U32,
        _padding: le::U32,
    }
    ReleaseIn { handle: le::U64, _flags: le::U32, _release_flags: le::U32, _lock_owner: le::U64 }
    FsyncIn { handle: le::U64, flags: le::U32, _padding: le::U32 }
    FlushIn { handle: le::U64, _unused: le::U32, _padding: le::U32, owner: le::U64 }
    LkIn {
        handle: le::U64, owner: le::U64, start: le::U64, end: le::U64, kind: le::U32, _pid: le::U32, flags: le::U32,
        _padding: le::U32,
    }
    GetxattrIn { size: le::U32, _padding: le::U32 }
    SetxattrIn { size: le::U32, flags: le::U32 }
    IoctlIn { handle: le::U64, _flags: le::U32, command: le::U32, _argument: le::U64, _in_size: le::U32, out_size: le::U32 }
    FallocateIn { handle: le::U64, offset: le::U64, length: le::U64, mode: le::U32, _padding: le::U32 }
    LseekIn { handle: le::U64, offset: le::U64, whence: le::U32, _padding: le::U32 }
    CopyFileRangeIn {
        from: le::U64, from_offset: le::U64, to_node: le::U64, to: le::U64, to_offset: le::U64, len: le::U64,
        flags: le::U64,
    }
}

macro_rules! replies {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable, KnownLayout)]
        #[cfg_attr(test, derive(FromBytes))]
        #[repr(C)]
        pub struct $name { $(pub $field: $kind),* }
    )*};
}

replies! {
    /// `struct fuse_out_header`, in front of each reply. The error is negative.
    OutHeader { len: le::U32, error: le::I32, unique: le::U64 }
    InitOut {
        major: le::U32, minor: le::U32, max_readahead: le::U32, flags: le::U32, max_background: le::U16,
        congestion_threshold: le::U16, max_write: le::U32, time_gran: le::U32, max_pages: le::U16, map_alignment: le::U16,
        flags2: le::U32, _unused: [le::U32; 7],
    }
    /// `struct fuse_attr`.
    Attr {
        ino: le::U64, size: le::U64, blocks: le::U64, atime: le::U64, mtime: le::U64, ctime: le::U64, atime_nsec: le::U32,
        mtime_nsec: le::U32, ctime_nsec: le::U32, mode: le::U32, nlink: le::U32, uid: le::U32, gid: le::U32, rdev: le::U32,
        blksize: le::U32, flags: le::U32,
    }
    /// How long an entry and its attributes hold, in seconds and nanoseconds.
    EntryOut {
        node: le::U64, generation: le::U64, entry_valid: le::U64, attr_valid: le::U64, entry_valid_nsec: le::U32,
        attr_valid_nsec: le::U32, attr: Attr,
    }
    AttrOut { attr_valid: le::U64, attr_valid_nsec: le::U32, _padding: le::U32, attr: Attr }
    /// `struct fuse_sx_time`
    SxTime { seconds: le::I64, nanoseconds: le::U32, _reserved: le::U32 }
    /// `struct fuse_statx`
    SxAttr {
        mask: le::U32, blksize: le::U32, attributes: le::U64, nlink: le::U32, uid: le::U32, gid: le::U32, mode: le::U16,
        _spare0: le::U16, ino: le::U64, size: le::U64, blocks: le::U64, attributes_mask: le::U64, atime: SxTime,
        btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: le::U32, rdev_minor: le::U32, dev_major: le::U32,
        dev_minor: le::U32, _spare: [le::U64; 14],
    }
    StatxOut { attr_valid: le::U64, attr_valid_nsec: le::U32, flags: le::U32, _spare: [le::U64; 2], attr: SxAttr }
    OpenOut { handle: le::U64, flags: le::U32, _backing: le::U32 }
    WriteOut { size: le::U32, _padding: le::U32 }
    StatfsOut {
        blocks: le::U64, bfree: le::U64, bavail: le::U64, files: le::U64, ffree: le::U64, bsize: le::U32,
        namelen: le::U32, frsize: le::U32, _padding: le::U32, _spare: [le::U32; 6],
    }
    GetxattrOut { size: le::U32, _padding: le::U32 }
    /// `struct fuse_lk_out`. Whose it is, is somebody whom the guest does not know.
    LkOut { start: le::U64, end: le::U64, kind: le::U32, _pid: le::U32 }
    IoctlOut { result: le::I32, _flags: le::U32, _in_iovs: le::U32, _out_iovs: le::U32 }
    /// What [`NEXT_CHANGE`] answers: what it is, the mode of the file, and the lengths of two paths that follow.
    ChangeOut { kind: le::U32, mode: le::U32, path_len: le::U32, to_len: le::U32 }
    LseekOut { offset: le::U64 }
    /// `struct fuse_dirent`, without the name that follows.
    Dirent { ino: le::U64, offset: le::U64, name_len: le::U32, kind: le::U32 }
}

impl Attr {
    /// Of the file that is `stat`, with another inode number.
    pub fn of(stat: &Statx, ino: u64) -> Self {
        let seconds =
            |time: &rustix::fs::StatxTimestamp| (time.tv_sec.cast_unsigned().into(), time.tv_nsec.into());
        let (atime, atime_nsec) = seconds(&stat.stx_atime);
        let (mtime, mtime_nsec) = seconds(&stat.stx_mtime);
        let (ctime, ctime_nsec) = seconds(&stat.stx_ctime);
        Self {
            ino: ino.into(),
            size: stat.stx_size.into(),
            blocks: stat.stx_blocks.into(),
            atime,
            mtime,
            ctime,
            atime_nsec,
            mtime_nsec,
            ctime_nsec,
            mode: u32::from(stat.stx_mode).into(),
            nlink: stat.stx_nlink.into(),
            uid: stat.stx_uid.into(),
            gid: stat.stx_gid.into(),
            rdev: device(stat.stx_rdev_major, stat.stx_rdev_minor).into(),
            blksize: stat.stx_blksize.into(),
            flags: 0.into(),
        }
    }
}

impl SxAttr {
    /// Of the file that is `stat`, with another inode number. What device it is on is the guest's kernel's to say.
    pub fn of(stat: &Statx, ino: u64) -> Self {
        let time = |time: &rustix::fs::StatxTimestamp| SxTime {
            seconds: time.tv_sec.into(),
            nanoseconds: time.tv_nsec.into(),
            ..SxTime::default()
        };
        Self {
            mask: stat.stx_mask.into(),
            blksize: stat.stx_blksize.into(),
            nlink: stat.stx_nlink.into(),
            uid: stat.stx_uid.into(),
            gid: stat.stx_gid.into(),
            mode: stat.stx_mode.into(),
            ino: ino.into(),
            size: stat.stx_size.into(),
            blocks: stat.stx_blocks.into(),
            atime: time(&stat.stx_atime),
            btime: time(&stat.stx_btime),
            ctime: time(&stat.stx_ctime),
            mtime: time(&stat.stx_mtime),
            rdev_major: stat.stx_rdev_major.into(),
            rdev_minor: stat.stx_rdev_minor.into(),
            ..Self::default()
        }
    }
}

/// As the kernel packs a device's number into 32 bits (`new_encode_dev`).
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// Major and minor number of what [`device`] packs.
pub fn device_parts(device: u32) -> (u32, u32) {
    (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00)
}

impl From<StatVfs> for StatfsOut {
    fn from(stat: StatVfs) -> Self {
        Self {
            blocks: stat.f_blocks.into(),
            bfree: stat.f_bfree.into(),
            bavail: stat.f_bavail.into(),
            files: stat.f_files.into(),
            ffree: stat.f_ffree.into(),
            bsize: (stat.f_bsize as u32).into(),
            namelen: (stat.f_namemax as u32).into(),
            frsize: (stat.f_frsize as u32).into(),
            ..Self::default()
        }
    }
}

/// `DT_*` of a file's mode (`IFTODT`).
pub fn entry_kind(kind: FileType) -> u32 {
    kind.as_raw_mode() >> 12 & 0xf
}

/// What an entry of a folder takes in a reply, its name included: a multiple of 8.
pub fn entry_size(name: &CStr, plus: bool) -> usize {
    let head = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
    (head + name.count_bytes()).next_multiple_of(8)
}

/// What follows a request's header, taken from the front.
#[derive(Debug)]
pub struct Arguments<'a>(pub &'a [u8]);

impl<'a> Arguments<'a> {
    /// A structure.
    ///
    /// # Errors
    /// EINVAL: the request is too short.
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// A string that ends with a zero byte.
    ///
    /// # Errors
    /// EINVAL: there is no such byte.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// The name of an entry in a folder: one component of a path, and neither the folder itself nor the one above.
    ///
    /// # Errors
    /// EINVAL: it is none. ENAMETOOLONG: it has more than 255 bytes.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.count_bytes() {
            0..=NAME_MAX if !is_name(name) => Err(Errno::INVAL),
            0..=NAME_MAX => Ok(name),
            _ if name.to_bytes().contains(&b'/') => Err(Errno::INVAL),
            _ => Err(Errno::NAMETOOLONG),
        }
    }

    /// `len` bytes.
    ///
    /// # Errors
    /// EINVAL: the request has fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// One component of a path that leads down.
pub fn is_name(name: &CStr) -> bool {
    let bytes = name.to_bytes();
    !matches!(bytes, b"" | b"." | b"..") && !bytes.contains(&b'/') && bytes.len() <= NAME_MAX
}

/// Bytes of a name (include/uapi/linux/limits.h).
const NAME_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<InitIn>() + size_of::<InitExt>(), 64),
            (size_of::<SetattrIn>(), 88),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<ReleaseIn>(), 24),
            (size_of::<CopyFileRangeIn>(), 56),
            (size_of::<OutHeader>(), 16),
            (size_of::<InitOut>(), 64),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<StatxIn>(), 24),
            (size_of::<FlushIn>(), 24),
            (size_of::<LkIn>(), 48),
            (size_of::<LkOut>(), 24),
            (size_of::<IoctlIn>(), 32),
            (size_of::<IoctlOut>(), 16),
            (size_of::<StatxOut>(), 32 + 256),
            (size_of::<OpenOut>(), 16),
            (size_of::<StatfsOut>(), 80),
            (size_of::<Dirent>(), 24),
        ];
        for (ours, kernels) in sizes {
            assert_eq!(ours, kernels);
        }
    }

    #[test]
    fn a_name_is_one_component() {
        let name = |bytes: &'static [u8]| Arguments(bytes).name().map(CStr::to_bytes);
        assert_eq!(name(b"a\0"), Ok(&b"a"[..]));
        assert_eq!(name(b"...\0rest"), Ok(&b"..."[..]));
        assert_eq!(name(b"\xff\x01\n\0"), Ok(&b"\xff\x01\n"[..]));
        for bad in [&b"a"[..], b"", b"\0", b".\0", b"..\0", b"/\0", b"a/b\0", b"../a\0"] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(Arguments(&long).name(), Err(Errno::NAMETOOLONG));
        assert!(Arguments(&long[1..]).name().is_ok());
    }

    #[test]
    fn what_changes_something_is_told_from_what_does_not() {
        let unchanged = Opcode::ALL.iter().filter(|(_, opcode)| !opcode.changes()).map(|(number, _)| *number);
        let reading = [
            1, 2, 3, 5, 14, 15, 17, 18, 20, 22, 23, 25, 26, 27, 28, 29, 30, 31, 32, 33, 36, 38, 39, 42, 44,
            46, 50, 52,
        ];
        assert_eq!(unchanged.collect::<Vec<_>>(), reading);
        assert!(Opcode::ALL.iter().all(|(number, opcode)| Opcode::of(*number) == Some(*opcode)));
    }

    #[test]
    fn a_devices_number_comes_back_as_it_went() {
        for (major, minor) in [(1, 3), (259, 0), (0xfff, 0xf_ffff), (8, 0x1234)] {
            assert_eq!(device_parts(device(major, minor)), (major, minor));
        }
    }
}
