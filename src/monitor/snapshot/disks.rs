//! Disks that the guest may write to: a snapshot's folder has each as it was at that moment, and a machine that goes on from it
//! writes into an overlay of its own. What the image of a disk with an overlay was stays where it is, by its path.

use std::path::{Path, PathBuf};

use super::parts::Part;
use super::{Error, file};
use crate::config::{Disk, ImageFormat, Overlay, VmConfig};
use crate::machine::{Handle, Paused};
use crate::output;

/// The file of disk `index` in a folder.
fn name(index: usize) -> PathBuf {
    format!("disk{index}").into()
}

/// `config` for those who go on from its snapshot. What is in the folder has no other path than its name.
pub fn saved(config: &VmConfig) -> VmConfig {
    let mut config = config.clone();
    for (index, disk) in config.disk.iter_mut().enumerate().filter(|(_, disk)| !disk.readonly) {
        match disk.overlay {
            Some(_) => disk.lower = Some(name(index)),
            None => (disk.path, disk.format) = (name(index), Some(ImageFormat::Raw)),
        }
        disk.overlay = Some(Overlay::Temporary);
    }
    config
}

/// Copies the disks of `machine`, which was built as `config` says, into `folder`.
pub fn save(
    machine: &Handle,
    paused: &Paused<'_>,
    config: &VmConfig,
    folder: &Path,
) -> Result<Vec<Part>, Error> {
    let written = config.disk.iter().enumerate().filter(|(_, disk)| !disk.readonly);
    written
        .map(|(index, disk)| {
            let path = folder.join(name(index));
            // It is read, too, where the file system copies for itself.
            let file = output::create(&path).map_err(file("make", &path))?;
            machine.save_disk(paused, index, &file).map_err(self::file("copy disk", &disk.path))?;
            Ok(Part { path, file })
        })
        .collect()
}

fn in_folder(disk: &mut Disk) -> impl Iterator<Item = &mut PathBuf> {
    [&mut disk.path].into_iter().chain(&mut disk.lower).filter(|path| path.is_relative())
}

/// Whether disks of `config` are in a folder.
pub fn are_in_folder(config: &mut VmConfig) -> bool {
    config.disk.iter_mut().flat_map(in_folder).next().is_some()
}

/// Has them found in `folder` from wherever they are looked for.
pub fn locate(config: &mut VmConfig, folder: &Path) -> Result<(), Error> {
    let folder = std::path::absolute(folder).map_err(file("open", folder))?;
    config.disk.iter_mut().flat_map(in_folder).for_each(|path| *path = folder.join(&path));
    Ok(())
}
