//! Disks that the guest may write to: a snapshot's folder has each as it was at that moment, and a machine that goes on from it
//! writes into an overlay of its own. What the image of a disk with an overlay was stays where it is, by its path.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::parts::{NAMES, Part, Parts};
use super::{Error, file};
use crate::config::{Disk, ImageFormat, Overlay, VmConfig};
use crate::disk;
use crate::machine::{Handle, Paused};

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

/// A disk of `config` that the guest writes to, and that has no overlay.
pub fn in_place(config: &VmConfig) -> Option<&Disk> {
    config.disk.iter().find(|disk| !disk.readonly && disk.overlay.is_none())
}

/// The disks of `config` that the guest may write to, with their places among all.
fn written(config: &VmConfig) -> impl Iterator<Item = (usize, &Disk)> {
    config.disk.iter().enumerate().filter(|(_, disk)| !disk.readonly)
}

/// The files that copies of those have in a folder.
pub fn copies(config: &VmConfig) -> impl Iterator<Item = PathBuf> {
    written(config).map(|(index, _)| name(index))
}

/// `files` as those that copies of those are written to.
pub fn of_files(config: &VmConfig, files: Vec<OwnedFd>) -> Vec<Part> {
    let disks = written(config).map(|(_, disk)| disk.path.clone());
    disks.zip(files).map(|(path, file)| Part { path, file: file.into() }).collect()
}

/// A file without a name for each of the disks among a snapshot's `files`: they are to be copied there.
///
/// # Errors
/// There is no place for them.
pub fn unnamed(files: &[PathBuf]) -> Result<Vec<File>, Error> {
    let disks = files.iter().filter(|file| !NAMES.iter().any(|name| Path::new(name) == **file));
    disks.map(|disk| disk::unnamed().map_err(file("make a place for the copy of", disk))).collect()
}

/// Whether `parts` has a file for each of those.
///
/// # Errors
/// It has others.
pub fn check(config: &VmConfig, parts: &Parts) -> Result<(), Error> {
    let (given, needed) = (parts.disks.len(), written(config).count());
    if given == needed {
        return Ok(());
    }
    let what = format!("{given} files for {needed} disks");
    Err(parts.config.failed("save beside")(io::Error::new(io::ErrorKind::InvalidInput, what)))
}

/// Copies each of those of `machine`, which was built as `config` says, into its file of `parts`.
///
/// # Errors
/// One cannot be copied.
pub fn save(machine: &Handle, paused: &Paused<'_>, config: &VmConfig, parts: &Parts) -> Result<(), Error> {
    written(config).zip(&parts.disks).try_for_each(|((index, disk), part)| {
        machine.save_disk(paused, index, &part.file).map_err(file("copy disk", &disk.path))
    })
}

fn in_folder(disk: &mut Disk) -> impl Iterator<Item = &mut PathBuf> {
    [&mut disk.path].into_iter().chain(&mut disk.lower).filter(|path| path.is_relative())
}

/// The files of a folder that disks of `config` are in.
pub fn names(config: &VmConfig) -> Vec<PathBuf> {
    config.clone().disk.iter_mut().flat_map(in_folder).map(|name| name.clone()).collect()
}

/// Has them found as `parts`, which are as many as there are [`names`].
pub fn locate_parts(config: &mut VmConfig, parts: &[Part]) {
    let names = config.disk.iter_mut().flat_map(in_folder);
    names.zip(parts).for_each(|(name, part)| part.path.clone_into(name));
}

/// Has them found in `folder` from wherever they are looked for.
pub fn locate(config: &mut VmConfig, folder: &Path) -> Result<(), Error> {
    let folder = std::path::absolute(folder).map_err(file("open", folder))?;
    config.disk.iter_mut().flat_map(in_folder).for_each(|path| *path = folder.join(&path));
    Ok(())
}
