//! Disks made by other people's tools: mke2fs, mkfs.vfat with mtools, and sfdisk. Each test needs the ones that it names.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use bootdisk::entries::{self, Entries};
use bootdisk::partition::{self, Partition};
use bootdisk::volume::Volume;
use bootdisk::{Disk, Error};

/// Runs a tool. These come with e2fsprogs, dosfstools, mtools and fdisk.
fn tool(name: &str, args: &[&str], input: &str) {
    let mut child = Command::new(name)
        .args(args)
        .env("MTOOLS_SKIP_CHECK", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("{name}: {error} (apt-get install e2fsprogs dosfstools mtools fdisk)")
        });
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn put(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let at = root.join(path);
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    fs::write(at, content).unwrap();
}

/// The folder as an ext4 image of 32 MiB.
fn ext4(root: &Path, options: &[&str]) -> Vec<u8> {
    let image = root.with_extension("ext4");
    File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let (root, image_path) = (root.to_str().unwrap(), image.to_str().unwrap());
    tool(
        "mke2fs",
        &[&["-q", "-F", "-t", "ext4", "-L", "root", "-d", root], options, &[image_path]].concat(),
        "",
    );
    fs::read(image).unwrap()
}

/// The folder's children as a FAT image.
fn fat(root: &Path, bits: &str, mib: u64) -> Vec<u8> {
    let image = root.with_extension("fat");
    File::create(&image).unwrap().set_len(mib << 20).unwrap();
    let path = image.to_str().unwrap();
    tool("mkfs.vfat", &["-F", bits, "-i", "1234abcd", "-n", "EFI", path], "");
    let children =
        fs::read_dir(root).unwrap().map(|child| child.unwrap().path().to_str().unwrap().to_owned());
    let children: Vec<String> = children.collect();
    let mut args = vec!["-i", path, "-s"];
    args.extend(children.iter().map(String::as_str));
    args.push("::");
    tool("mcopy", &args, "");
    fs::read(image).unwrap()
}

fn whole(disk: &[u8]) -> Partition {
    Partition { number: 0, start: 0, len: disk.len() as u64, esp: false }
}

fn slurp(volume: &Volume, path: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; 8 << 20];
    volume.read_file(path.as_bytes(), &mut bytes).map(<[u8]>::to_vec)
}

fn menu(disks: &[&[u8]]) -> (Entries, Vec<String>) {
    let mut volumes = Vec::new();
    for disk in disks {
        for partition in partition::find(disk).unwrap().all() {
            volumes.push(Volume::open(disk, *partition).ok());
        }
    }
    let (mut found, mut notes) = (Entries::new(), Vec::new());
    entries::find(&volumes, &mut vec![0; 128 << 10], &mut found, &mut |note| notes.push(note.to_string()));
    (found, notes)
}

fn kernels(found: &Entries) -> Vec<String> {
    found.all().iter().map(|entry| entry.linux.to_string()).collect()
}

/// Bytes that tell where they are.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|at| (at >> 9) as u8 ^ at as u8).collect()
}

#[test]
fn ext4_files_folders_symlinks_and_holes_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    put(&root, "boot/big", pattern(3_000_001));
    for index in 0..300 {
        put(&root, &format!("many/file number {index}"), index.to_string());
    }
    // Every second block is a hole, so the extents need a tree.
    let holes = File::create(root.join("holes")).unwrap();
    (0..500).for_each(|block| holes.write_all_at(b"data", block * 8192).unwrap());
    symlink("boot/big", root.join("short")).unwrap();
    symlink(format!("/boot/{}big", "./".repeat(60)), root.join("boot/long")).unwrap();
    symlink("circle", root.join("circle")).unwrap();
    for options in [&[][..], &["-b", "1024"], &["-O", "^64bit"], &["-I", "128", "-O", "^metadata_csum"]] {
        let image = ext4(&root, options);
        let disk = &image[..];
        let volume = Volume::open(&disk, whole(disk)).unwrap();
        assert_eq!(volume.label().bytes(), b"root");
        for path in ["/boot/big", "/short", "/boot/long", "/boot/../short", "//boot//./big"] {
            assert!(slurp(&volume, path).unwrap() == pattern(3_000_001), "{path} {options:?}");
        }
        assert!(slurp(&volume, "/holes").unwrap() == fs::read(root.join("holes")).unwrap(), "{options:?}");
        assert_eq!(slurp(&volume, "/many/file number 299").unwrap(), b"299");
        assert_eq!(slurp(&volume, "/circle"), Err(Error::Damaged("symlinks in a circle")));
        assert_eq!(slurp(&volume, "/nothing"), Err(Error::Missing));
        assert_eq!(slurp(&volume, "/short/x"), Err(Error::Missing));
    }
}

#[test]
fn fat_long_names_and_split_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    put(&root, "loader/entries/a very long name, longer than one entry.conf", "x");
    put(&root, "EFI/Debian/big", pattern(700_001));
    put(&root, "SHORT.TXT", "short");
    for (bits, mib) in [("12", 4), ("16", 20), ("32", 40)] {
        let image = fat(&root, bits, mib);
        let disk = &image[..];
        let volume = Volume::open(&disk, whole(disk)).unwrap();
        assert_eq!(volume.uuid().bytes(), b"1234-ABCD");
        assert_eq!(volume.label().bytes(), b"EFI");
        assert!(slurp(&volume, "/efi/debian/BIG").unwrap() == pattern(700_001), "FAT{bits}");
        assert_eq!(slurp(&volume, "/EFI/Debian/../../short.txt").unwrap(), b"short");
        let long = "/loader/entries/a very long name, longer than one entry.conf";
        assert_eq!(slurp(&volume, long).unwrap(), b"x");
    }
}

#[test]
fn a_gpt_is_found_by_its_backup_too_and_an_mbr_with_logical_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let make = |script: &str| {
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        tool("sfdisk", &["-q", image.to_str().unwrap()], script);
        fs::read(&image).unwrap()
    };
    let mut gpt = make("label: gpt\nsize=20MiB,type=U\nsize=30MiB,type=L\n");
    let found = partition::find(&&gpt[..]).unwrap();
    let expected = [
        Partition { number: 1, start: 1 << 20, len: 20 << 20, esp: true },
        Partition { number: 2, start: 21 << 20, len: 30 << 20, esp: false },
    ];
    assert_eq!(found.all(), expected);
    gpt[512 + 60] ^= 1;
    assert_eq!(partition::find(&&gpt[..]).unwrap().all(), expected);
    // Neither header is right; then the protective MBR says only that there was one.
    let end = gpt.len();
    gpt[end - 512 + 60] ^= 1;
    assert_eq!(partition::find(&&gpt[..]).unwrap().all(), [whole(&gpt)]);

    let mbr = make("label: dos\nsize=10MiB,type=ef\ntype=5\nsize=10MiB,type=83\nsize=10MiB,type=83\n");
    let found = partition::find(&&mbr[..]).unwrap();
    let told: Vec<_> =
        found.all().iter().map(|partition| (partition.number, partition.len >> 20, partition.esp)).collect();
    assert_eq!(told, [(1, 10, true), (5, 10, false), (6, 10, false)]);
}

#[test]
fn boot_loader_specification_entries_come_first_and_the_newest_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let (esp, root) = (dir.path().join("esp"), dir.path().join("root"));
    for version in ["6.1.0-9", "6.1.0-10"] {
        let entry = format!(
            "title Debian\nversion {version}\nsort-key debian\nlinux /m/{version}/linux\noptions a b\n"
        );
        put(&esp, &format!("loader/entries/m-{version}.conf"), entry);
        put(&esp, &format!("m/{version}/linux"), "kernel");
    }
    put(&esp, "loader/entries/gone.conf", "title Gone\nsort-key a\nlinux /gone\n");
    put(&root, "boot/vmlinuz-1", "kernel");
    let (esp, root) = (fat(&esp, "32", 40), ext4(&root, &[]));
    let (found, notes) = menu(&[&root, &esp]);
    assert_eq!(kernels(&found), ["/m/6.1.0-10/linux", "/m/6.1.0-9/linux"]);
    assert_eq!((found.default, found.all()[0].volume), (0, 1));
    assert_eq!(notes, ["/gone: no such file"]);
}

#[test]
fn debians_symlinks_say_which_kernel_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for version in ["6.1.0-9-amd64", "6.1.0-10-amd64"] {
        put(&root, &format!("boot/vmlinuz-{version}"), "kernel");
        put(&root, &format!("boot/initrd.img-{version}"), "initrd");
    }
    let image = ext4(&root, &["-U", "01234567-89ab-cdef-0123-456789abcdef"]);
    let (found, _) = menu(&[&image]);
    assert_eq!((kernels(&found).len(), found.default), (2, 0));
    let newest = &found.all()[0];
    assert_eq!(newest.version.bytes(), b"6.1.0-10-amd64");
    assert_eq!(newest.initrds()[0].bytes(), b"/boot/initrd.img-6.1.0-10-amd64");
    assert_eq!(newest.options.bytes(), b"root=UUID=01234567-89ab-cdef-0123-456789abcdef ro");

    symlink("boot/vmlinuz-6.1.0-9-amd64", root.join("vmlinuz")).unwrap();
    put(&root, "etc/kernel/cmdline", "root=/dev/vda1\nquiet\n");
    let (found, _) = menu(&[&ext4(&root, &[])]);
    assert_eq!(found.default, 1);
    assert_eq!(found.all()[0].options.bytes(), b"root=/dev/vda1 quiet");
}

/// In the form of what grub-mkconfig writes; the words are ours.
const GRUB: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="${saved_entry}"
fi
if [ x"${feature_menuentry_id}" = xy ]; then menuentry_id_option="--id"; else menuentry_id_option=""; fi
export menuentry_id_option
function savedefault { if [ -z "${boot_once}" ]; then save_env saved_entry; fi }
menuentry 'First one' --class gnu $menuentry_id_option 'simple' {
	insmod ext2
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0 01234567-89AB-cdef-0123-456789abcdef
	else
	  search --no-floppy --fs-uuid --set=root 01234567-89AB-cdef-0123-456789abcdef
	fi
	echo	'Loading ...'
	linux	/vmlinuz-2 root=UUID=x ro "two words" ${nothing} quiet
	initrd	/microcode /initrd.img-2
}
submenu 'More' $menuentry_id_option 'more' {
	menuentry 'Number two' $menuentry_id_option 'two' {
		linux	($root)/boot/vmlinuz-2
	}
	menuentry 'Number one' $menuentry_id_option 'one' { # an older one
		linux	/boot/vmlinuz-1 single
	}
}
menuentry 'Firmware' { fwsetup; }
"#;

#[test]
fn a_generated_grub_cfg_is_understood() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    put(&root, "boot/grub/grub.cfg", GRUB);
    for file in ["vmlinuz-1", "vmlinuz-2", "microcode", "initrd.img-2"] {
        put(&root, &format!("boot/{file}"), "x");
    }
    let other = dir.path().join("other");
    put(&other, "boot/grub/nothing", "");
    let uuid = ["-U", "01234567-89ab-cdef-0123-456789abcdef"];
    let other = ext4(&other, &[]);
    for (saved, default) in [
        (None, 0),
        (Some("simple"), 0),
        (Some("more>one"), 2),
        (Some("1>0"), 1),
        (Some("more"), 1),
        (Some("none"), 0),
    ] {
        if let Some(saved) = saved {
            put(
                &root,
                "boot/grub/grubenv",
                format!("# GRUB Environment Block\nsaved_entry={saved}\nnext_entry=1\n###"),
            );
        }
        let (found, notes) = menu(&[&other, &ext4(&root, &uuid)]);
        assert_eq!(notes, [""; 0]);
        assert_eq!(kernels(&found), ["/vmlinuz-2", "/boot/vmlinuz-2", "/boot/vmlinuz-1"]);
        assert_eq!(found.default, default, "{saved:?}");
        let first = &found.all()[0];
        assert_eq!(
            (first.title.bytes(), first.id.bytes(), first.volume),
            (&b"First one"[..], &b"simple"[..], 1)
        );
        assert_eq!(first.options.bytes(), b"root=UUID=x ro two words quiet");
        assert_eq!(first.initrds().len(), 2);
        assert_eq!(found.all()[2].title.bytes(), b"Number one");
    }
}

#[test]
fn a_disk_that_ends_early_is_told_and_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    put(&root, "boot/vmlinuz-1", pattern(100_000));
    let image = ext4(&root, &[]);
    for length in [0, 1, 511, 1024, 2048, 5000, 100_000, 1 << 20] {
        let cut = &image[..length];
        assert!(cut.read(0, &mut [0; 4096]).is_err() || length >= 4096);
        let (found, _) = menu(&[cut]);
        assert!(found.all().len() <= 1);
    }
    assert_eq!(Volume::open(&&[0u8; 4096][..], whole(&[0; 4096])).err(), Some(Error::Missing));
}
