//! [`Files`]: what a disk's configuration names, open and locked. Whoever may name them opens them; a disk is made of them alone, in this
//! process or in another.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};

use super::overlay::{self, Base};
use super::{Error, Foreign, Info};
use crate::{config, planted};

/// The open files of a disk.
#[derive(Debug)]
pub struct Files {
    pub(super) image: File,
    /// What the image is.
    pub(super) facts: Facts,
    /// The overlay that is only read.
    pub(super) lower: Option<File>,
    /// The one that is written to.
    pub(super) overlay: Option<File>,
}

/// What an image is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub info: Info,
    /// It is a block device.
    pub is_device: bool,
}

impl Files {
    /// Opens what `config` names, and locks it: the image shared if it is only read, else for this disk alone. An overlay that is not
    /// there is made.
    ///
    /// # Errors
    /// [`Error`] names the file, and [`Error::hint`] what to do.
    pub fn open(config: &config::Disk) -> Result<Self, Error> {
        let path = &config.path;
        // Without O_NONBLOCK a FIFO would be waited for; files and block devices do not know it.
        let readonly = config.readonly || config.overlay.is_some();
        let access = if readonly { OFlags::RDONLY } else { OFlags::RDWR };
        let file = planted::open(path, access | OFlags::NONBLOCK);
        let image = file.map_err(|source| Error::Open { path: path.clone(), source })?;
        let facts = Facts::of(config, &image)?;
        let base = |image| {
            Base::of(image, facts.info.size).map_err(|source| Error::Open { path: path.clone(), source })
        };
        let lower = config.lower.as_deref().map(overlay::open_lower).transpose()?;
        let overlay = match &config.overlay {
            None => None,
            Some(config::Overlay::Temporary) => Some(overlay::temporary(&base(&image)?)?),
            Some(config::Overlay::Kept(path)) => Some(overlay::open_kept(path, &base(&image)?)?),
        };
        Ok(Self { image, facts, lower, overlay })
    }

    /// The same for another process, as [`Files::of_descriptors`] takes them.
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        let files = [Some(self.image), self.lower, self.overlay];
        files.into_iter().flatten().map(OwnedFd::from).collect()
    }

    /// Those of `config`, which another process has opened. They are looked at as if they had been opened here.
    ///
    /// # Errors
    /// As [`Files::open`]; they are more, or fewer, than `config` names.
    pub fn of_descriptors(config: &config::Disk, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut files = descriptors.into_iter().map(File::from);
        let missing = |path: &Path| Error::NotGiven { path: path.to_owned() };
        let mut take = |named: bool| {
            if named { files.next().ok_or_else(|| missing(&config.path)).map(Some) } else { Ok(None) }
        };
        let [image, lower, overlay] =
            [take(true)?, take(config.lower.is_some())?, take(config.overlay.is_some())?];
        let (Some(image), None) = (image, files.next()) else { return Err(missing(&config.path)) };
        let facts = Facts::of(config, &image)?;
        Ok(Self { image, facts, lower, overlay })
    }
}

impl Facts {
    /// Of the image that `config` names, which is locked once it is found to be one.
    fn of(config: &config::Disk, image: &File) -> Result<Self, Error> {
        let path = &config.path;
        let failed = |source| Error::Open { path: path.clone(), source };
        let kind = image.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::NotAnImage { path: path.clone() });
        }
        lock(image, path, config.readonly || config.overlay.is_some())?;

        let is_device = kind.is_block_device();
        let native =
            if is_device { rustix::fs::ioctl_blksszget(image).map_err(|e| failed(e.into()))? } else { 512 };
        let block_size = config.block_size.map_or(native, |size| size.bytes() as u32);
        if block_size < native || !block_size.is_power_of_two() {
            return Err(Error::BlockSize { path: path.clone(), block_size, native });
        }
        let size = rustix::fs::seek(image, rustix::fs::SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        if let (None, Some(format)) = (config.format, Foreign::find(image, size)) {
            return Err(Error::Foreign { path: path.clone(), format });
        }
        if size == 0 || !size.is_multiple_of(u64::from(block_size)) {
            return Err(Error::Size { path: path.clone(), size, block_size });
        }
        if (config.overlay.is_some() || config.lower.is_some())
            && let Some(most) = overlay::too_small_for(size)
        {
            return Err(Error::TooLarge { path: path.clone(), size, most });
        }
        let physical = if is_device { rustix::fs::ioctl_blkpbszget(image).unwrap_or(native) } else { 4096 };
        // A partition or a sparse file may end in the middle of a physical block: that costs speed, nothing else.
        let physical_block_size =
            if physical.is_power_of_two() { physical.max(block_size) } else { block_size };
        let (readonly, discard) = (config.readonly, !config.readonly);
        Ok(Self { info: Info { size, readonly, block_size, physical_block_size, discard }, is_device })
    }
}

/// Locks the open file of an image or an overlay. The lock goes with the file, however the process ends, and wherever it is passed on.
pub(super) fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), Error> {
    let how = if readonly {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, how) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked { path: path.to_owned() }),
        Err(error) => {
            // Some network file systems know no locks.
            log::warn!("disk image {} cannot be locked: {error}", path.display());
            Ok(())
        }
    }
}
