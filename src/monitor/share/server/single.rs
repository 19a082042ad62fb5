//! A file that is shared alone: the guest, which mounts nothing but folders, is shown one that has it and nothing else, and that never
//! changes.

use std::ffi::CStr;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::{Answer, EMPTY, Found, Reply, Server, bytes, sized};
use crate::share::nodes::ROOT;
use crate::share::wire::*;

/// What the guest calls the file. To the server's [`Folder`](super::Folder), which has nothing above it, it is [`ROOT`].
const FILE: u64 = 2;
/// The folder that it is shown in, which to the server's has no number.
pub(super) const ABOVE: u64 = u64::MAX;

/// The server's number of what the guest calls `node`.
pub(super) fn number(node: u64) -> u64 {
    match node {
        ROOT => ABOVE,
        FILE => ROOT,
        // There are no others.
        _ => 0,
    }
}

impl Server {
    /// Answers what is asked of the folder that the file `name` is shown in.
    pub(super) fn above(
        &mut self,
        opcode: Opcode,
        mut rest: Arguments<'_>,
        room: usize,
        name: &CStr,
    ) -> Answer {
        match opcode {
            Opcode::Lookup if rest.name()? == name => {
                let entry = self.shown()?;
                bytes(&entry)
            }
            Opcode::Lookup => Err(Errno::NOENT),
            Opcode::Forget => Ok(Reply::None),
            Opcode::Getattr => {
                let stat = folder_of(self.folder.stat(ROOT, None)?);
                bytes(&self.attributes(&stat))
            }
            Opcode::Statx => {
                let stat = folder_of(self.folder.stat(ROOT, None)?);
                bytes(&self.statx(&stat))
            }
            Opcode::Statfs => bytes(&StatfsOut::from(self.folder.space(ROOT)?)),
            Opcode::Opendir => bytes(&OpenOut::default()),
            Opcode::Releasedir | Opcode::Fsyncdir => EMPTY,
            Opcode::Syncfs => self.folder.sync_all(ROOT).and(EMPTY),
            Opcode::Listxattr => {
                let GetxattrIn { size, .. } = rest.take()?;
                sized(size.get(), Vec::new())
            }
            Opcode::Getxattr => Err(Errno::NODATA),
            Opcode::Readdir | Opcode::Readdirplus => {
                let ReadIn { offset, size, .. } = rest.take()?;
                let most = (size.get() as usize).min(room);
                self.list_above(offset.get(), most, opcode == Opcode::Readdirplus, name)
            }
            opcode if opcode.changes() => Err(Errno::ROFS),
            _ => Err(Errno::ISDIR),
        }
    }

    fn list_above(&mut self, offset: u64, most: usize, plus: bool, name: &CStr) -> Answer {
        let mut reply = Vec::new();
        let all = [(c".", true), (c"..", true), (name, false)];
        for (at, (name, is_folder)) in (1..).zip(all).skip(offset.min(all.len() as u64) as usize) {
            if reply.len() + entry_size(name, plus) > most {
                break;
            }
            let shown = if is_folder { EntryOut::default() } else { self.shown()? };
            if plus {
                reply.extend(shown.as_bytes());
            }
            let kind =
                if is_folder { FileType::Directory } else { FileType::from_raw_mode(shown.attr.mode.get()) };
            let head = Dirent {
                ino: if is_folder { ROOT.into() } else { shown.attr.ino },
                offset: at.into(),
                name_len: (name.count_bytes() as u32).into(),
                kind: entry_kind(kind).into(),
            };
            reply.extend(head.as_bytes());
            reply.extend(name.to_bytes());
            reply.resize(reply.len().next_multiple_of(8), 0);
        }
        Ok(Reply::Bytes(reply))
    }

    fn shown(&mut self) -> Result<EntryOut, Errno> {
        let stat = self.folder.stat(ROOT, None)?;
        Ok(self.entry_of(&Found { number: FILE, stat }))
    }
}

/// A folder with the owner and the times of the file that is `stat`.
fn folder_of(mut stat: Statx) -> Statx {
    stat.stx_mode = (FileType::Directory.as_raw_mode() | 0o555) as u16;
    (stat.stx_nlink, stat.stx_size, stat.stx_blocks, stat.stx_ino) = (2, 0, 0, ROOT);
    stat
}
