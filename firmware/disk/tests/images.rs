//! Disks made by other people's tools: mke2fs, mkfs.vfat with mtools, sfdisk, mkfs.xfs, mkfs.btrfs,
//! grub-editenv, objcopy. Each test needs the ones that it names.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use bootdisk::entries::{self, Entries};
use bootdisk::partition::{self, Partition};
use bootdisk::unknown::Inhabitant;
use bootdisk::volume::Volume;
use bootdisk::{Disk, Error};

/// What the tools come with.
const PACKAGES: &str = "e2fsprogs dosfstools mtools fdisk xfsprogs btrfs-progs grub-common binutils";

/// Runs a tool.
fn tool(name: &str, args: &[&str], input: &str) {
    let mut child = Command::new(name)
        .args(args)
        .env("MTOOLS_SKIP_CHECK", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{name}: {error} (apt-get install {PACKAGES})"));
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
    ext("ext4", root, options)
}

/// The folder as an image of 32 MiB with ext2, ext3 or ext4.
fn ext(kind: &str, root: &Path, options: &[&str]) -> Vec<u8> {
    let image = root.with_extension(kind);
    File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let (root, image_path) = (root.to_str().unwrap(), image.to_str().unwrap());
    tool(
        "mke2fs",
        &[&["-q", "-F", "-t", kind, "-L", "root", "-d", root], options, &[image_path]].concat(),
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
    // So far apart that with blocks of 1 KiB each is found by another level of a block map.
    let far = [0, 100 << 10, 40 << 20, 200 << 20];
    let sparse = File::create(root.join("sparse")).unwrap();
    far.iter().for_each(|at| sparse.write_all_at(format!("at {at}").as_bytes(), *at).unwrap());
    for (kind, options) in [
        ("ext4", &[][..]),
        ("ext4", &["-b", "1024"]),
        ("ext4", &["-O", "^64bit"]),
        ("ext4", &["-I", "128", "-O", "^metadata_csum"]),
        ("ext3", &["-b", "1024"]),
        ("ext3", &[]),
        ("ext2", &["-b", "1024"]),
        ("ext2", &["-I", "128", "-O", "^filetype,^dir_index"]),
    ] {
        let image = ext(kind, &root, options);
        let disk = &image[..];
        let volume = Volume::open(&disk, whole(disk)).unwrap();
        assert_eq!((volume.kind(), volume.label().bytes()), (kind, &b"root"[..]));
        let node = volume.find(b"/sparse").unwrap();
        for at in far {
            let (said, mut read) = (format!("at {at}"), vec![1; 4096]);
            let count = volume.read(&node, at, &mut read).unwrap();
            assert!(read.starts_with(said.as_bytes()), "{kind} {options:?} {at}");
            assert!(read[said.len()..count].iter().all(|byte| *byte == 0), "{kind} {options:?} {at}");
        }
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
	initrd	/microcode $nothing /initrd.img-2
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
        // As GRUB hands it over.
        assert_eq!(first.options.bytes(), b"root=UUID=x ro \"two words\" quiet");
        assert_eq!(first.initrds().len(), 2);
        assert_eq!(found.all()[2].title.bytes(), b"Number one");
    }
}

/// What the menu says of each entry: kernel, initrds, options.
fn told(found: &Entries) -> Vec<String> {
    let entry = |entry: &entries::Entry| {
        let initrds: Vec<_> = entry.initrds().iter().map(|path| path.to_string()).collect();
        format!("{} [{}] {}", entry.linux, initrds.join(" "), entry.options)
    };
    found.all().iter().map(entry).collect()
}

/// RHEL and its kin: GRUB reads type 1 entries, which are written in terms of its variables; /boot is of its
/// own.
#[test]
fn entries_in_terms_of_grubs_variables_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let (boot, esp) = (dir.path().join("boot"), dir.path().join("esp"));
    for (id, version) in [("f-1", "4.18.0-1"), ("f-2", "4.18.0-2")] {
        let entry = format!(
            "title Red Hat ({version})\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img $tuned_initrd\noptions $kernelopts $tuned_params\nid {id}\n\
             grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class kernel\n"
        );
        put(&boot, &format!("loader/entries/{id}.conf"), entry);
        put(&boot, &format!("vmlinuz-{version}"), "kernel");
        put(&boot, &format!("initramfs-{version}.img"), "initrd");
    }
    put(&boot, "tuned.img", "initrd");
    let config = "set tuned_params=\"\"\nset tuned_initrd=\"\"\nif [ -f ${config_directory}/grubenv ]; then\n  load_env -f x\n\
        elif [ -s $prefix/grubenv ]; then\n  load_env\nfi\nif [ \"${next_entry}\" ] ; then\n   set default=\"${next_entry}\"\n\
        else\n   set default=\"${saved_entry}\"\nfi\nif [ -z \"${kernelopts}\" ]; then\n  \
        set kernelopts=\"root=/dev/mapper/rhel-root ro rhgb \"\nfi\ninsmod blscfg\nblscfg\n";
    put(&boot, "grub2/grub.cfg", config);
    let newest = "/vmlinuz-4.18.0-2 [/initramfs-4.18.0-2.img] root=/dev/mapper/rhel-root ro rhgb";
    let (found, notes) = menu(&[&ext4(&boot, &[])]);
    assert_eq!((notes, found.default, told(&found)[0].as_str()), (vec![], 0, newest));

    // grubenv says more, as grub-editenv writes it.
    let environment = boot.join("grub2/grubenv");
    let environment = environment.to_str().unwrap();
    let long = format!("kernelopts=root=UUID=y ro {}", "crashkernel=auto ".repeat(30).trim_end());
    tool("grub-editenv", &[environment, "create"], "");
    tool("grub-editenv", &[environment, "set", "saved_entry=f-1", "next_entry=f-2", &long], "");
    let (found, _) = menu(&[&ext4(&boot, &[])]);
    assert_eq!((found.default, found.all()[1].id.bytes()), (1, &b"f-1"[..]));
    assert!(told(&found)[1].ends_with(long.strip_prefix("kernelopts=").unwrap()), "{:?}", told(&found));

    // By UEFI all of GRUB's files are on the ESP.
    fs::rename(boot.join("grub2"), dir.path().join("redhat")).unwrap();
    fs::create_dir_all(esp.join("EFI")).unwrap();
    fs::rename(dir.path().join("redhat"), esp.join("EFI/redhat")).unwrap();
    put(
        &esp,
        "EFI/redhat/grub.cfg",
        config.replace("set tuned_initrd=\"\"", "set tuned_initrd=\"/tuned.img\""),
    );
    let (found, _) = menu(&[&fat(&esp, "32", 40), &ext4(&boot, &[])]);
    assert_eq!((found.default, found.all()[0].volume), (1, 1));
    assert_eq!(found.all()[0].initrds()[1].bytes(), b"/tuned.img");
    // Without a GRUB a dollar is one.
    put(&boot, "loader/entries/f-2.conf", "linux /vmlinuz-4.18.0-2\noptions a=$b\n");
    let (found, _) = menu(&[&ext4(&boot, &[])]);
    assert_eq!(told(&found)[0], "/vmlinuz-4.18.0-2 [] a=$b");
}

/// Alpine's extlinux.conf, with /boot on the root and of its own, and Arch's syslinux.cfg.
#[test]
fn a_configuration_of_syslinux_is_understood() {
    let dir = tempfile::tempdir().unwrap();
    let alpine = "# Generated by update-extlinux\nDEFAULT menu.c32\nPROMPT 0\nMENU TITLE Alpine/Linux Boot Menu\nMENU HIDDEN\n\
        MENU AUTOBOOT Alpine will be booted automatically in # seconds.\nTIMEOUT 10\nLABEL lts\n  MENU LABEL Linux lts\n  \
        LINUX vmlinuz-lts\n  INITRD initramfs-lts\n  APPEND root=UUID=l quiet\n\nLABEL virt\n  MENU DEFAULT\n  \
        MENU LABEL Linux ^virt\n  LINUX vmlinuz-virt\n  INITRD initramfs-virt\n  \
        APPEND root=UUID=v modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext4 \n\nMENU SEPARATOR\n";
    for (name, prefix) in [("root", "/boot/"), ("boot", "//")] {
        let root = dir.path().join(name);
        let at = prefix.trim_matches('/');
        put(&root, format!("{at}/extlinux.conf").trim_start_matches('/'), alpine);
        for file in ["vmlinuz-lts", "vmlinuz-virt", "initramfs-lts", "initramfs-virt"] {
            put(&root, format!("{at}/{file}").trim_start_matches('/'), "x");
        }
        let (found, notes) = menu(&[&ext("ext4", &root, &[])]);
        let virt = format!(
            "{prefix}vmlinuz-virt [{prefix}initramfs-virt] root=UUID=v modules=sd-mod,usb-storage,ext4 quiet rootfstype=ext4"
        );
        assert_eq!((notes, found.default, told(&found)[1].clone()), (vec![], 1, virt));
        assert_eq!(found.all()[1].title.bytes(), b"Linux virt");
    }
    let arch = "PROMPT 0\nTIMEOUT 50\nUI menu.c32\nappend everywhere\nDEFAULT archfallback\n\nLABEL arch\n    MENU LABEL Arch Linux\n    \
        LINUX ../vmlinuz-linux\n    APPEND root=/dev/sda3 rw\n    INITRD ../ucode.img,../initramfs-linux.img\n\n\
        label archfallback\n    kernel /boot/vmlinuz-linux\n    append initrd=../initramfs-linux.img root=/dev/sda3 rw\n\n\
        LABEL plain\n    KERNEL ../vmlinuz-linux\n\nLABEL hdt\n        COM32 hdt.c32\nLABEL reboot\n        KERNEL reboot.c32\n";
    let root = dir.path().join("arch");
    put(&root, "boot/syslinux/syslinux.cfg", arch);
    for file in ["vmlinuz-linux", "ucode.img", "initramfs-linux.img"] {
        put(&root, &format!("boot/{file}"), "x");
    }
    let (found, notes) = menu(&[&ext("ext2", &root, &[])]);
    assert_eq!((notes, found.default), (vec![], 1));
    assert_eq!(
        told(&found),
        [
            "/boot/syslinux/../vmlinuz-linux [/boot/syslinux/../ucode.img /boot/syslinux/../initramfs-linux.img] root=/dev/sda3 rw",
            "/boot/vmlinuz-linux [/boot/syslinux/../initramfs-linux.img] initrd=../initramfs-linux.img root=/dev/sda3 rw",
            "/boot/syslinux/../vmlinuz-linux [] everywhere",
        ]
    );
}

/// As ukify does: objcopy adds sections to a PE file. The stub is no more than that here.
#[test]
fn unified_kernel_images_are_entries_too() {
    let dir = tempfile::tempdir().unwrap();
    let esp = dir.path().join("esp");
    let make = |name: &str, version: &str, kernel: &[u8]| {
        let part = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, content).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let osrel = "NAME=\"Arch Linux\"\nPRETTY_NAME=\"Arch Linux\"\nID=arch\n";
        let sections = [
            (".osrel", part("osrel", osrel.as_bytes())),
            (".uname", part("uname", version.as_bytes())),
            (".cmdline", part("cmdline", b"root=PARTUUID=z rw\tquiet\n\0")),
            (".initrd", part("initrd", &pattern(5001))),
            (".linux", part("linux", kernel)),
        ];
        let image = esp.join("EFI/Linux").join(name);
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        let (object, stub) = (part("object", b""), part("stub", b""));
        tool("as", &["-o", &object, "-"], ".globl _start\n_start: ret\n");
        tool("ld", &["-m", "i386pep", "--subsystem", "10", "-e", "_start", &object, "-o", &stub], "");
        let mut args = Vec::new();
        for (at, (name, file)) in sections.iter().enumerate() {
            args.push(format!("--add-section={name}={file}"));
            args.push(format!("--change-section-vma={name}={:#x}", 0x1_5000_0000u64 + 0x10_0000 * at as u64));
        }
        args.extend([stub, image.to_str().unwrap().to_owned()]);
        tool("objcopy", &args.iter().map(String::as_str).collect::<Vec<_>>(), "");
    };
    make("arch-6.6.efi", "6.6.1", &pattern(20_000));
    make("arch-6.10+3.efi", "6.10.1", &pattern(30_000));
    put(&esp, "EFI/Linux/other.efi", "MZ");
    put(&esp, "loader/loader.conf", "default arch-6.6.efi\n");
    put(&esp, "loader/entries/memory.conf", "title Z\nsort-key z\nlinux /loader/loader.conf\n");
    let image = fat(&esp, "32", 40);
    let (found, notes) = menu(&[&image]);
    assert_eq!((notes, found.default), (vec![], 1));
    assert_eq!(
        kernels(&found),
        ["/EFI/Linux/arch-6.10+3.efi", "/EFI/Linux/arch-6.6.efi", "/loader/loader.conf"]
    );
    let newest = &found.all()[0];
    assert_eq!((newest.id.bytes(), newest.title.bytes()), (&b"arch-6.10"[..], &b"Arch Linux"[..]));
    assert_eq!(
        (newest.version.bytes(), newest.options.bytes()),
        (&b"6.10.1"[..], &b"root=PARTUUID=z rw quiet"[..])
    );
    let disk = &image[..];
    let volume = Volume::open(&disk, whole(disk)).unwrap();
    let file = entries::open(&volume, newest.linux.bytes()).unwrap();
    let unified = newest.unified.unwrap();
    for (part, content) in [(unified.linux, pattern(30_000)), (unified.initrd, pattern(5001))] {
        let mut read = vec![0; part.size as usize];
        assert_eq!(volume.read(&file, part.offset, &mut read), Ok(content.len()));
        assert!(read == content);
    }
    // The one that UEFI starts if nothing else is said may be such an image; its end is cut off here.
    let fallback = dir.path().join("fallback");
    let whole_image = fs::read(esp.join("EFI/Linux/arch-6.6.efi")).unwrap();
    put(&fallback, "EFI/BOOT/BOOTX64.EFI", &whole_image);
    assert_eq!(
        told(&menu(&[&fat(&fallback, "32", 40)]).0),
        ["/EFI/BOOT/BOOTX64.EFI [] root=PARTUUID=z rw quiet"]
    );
    put(&fallback, "EFI/BOOT/BOOTX64.EFI", &whole_image[..whole_image.len() - 8192]);
    assert_eq!(told(&menu(&[&fat(&fallback, "32", 40)]).0), [""; 0]);
}

/// Debian without a boot loader, /boot on a partition of its own: the root is the other one, and which says
/// that.
#[test]
fn the_root_is_not_the_file_system_of_a_boot_partition() {
    let dir = tempfile::tempdir().unwrap();
    let (boot, root) = (dir.path().join("boot"), dir.path().join("root"));
    put(&boot, "vmlinuz-6.1", "kernel");
    put(&root, "etc/fstab", "");
    fs::create_dir(root.join("boot")).unwrap();
    let boot = ext("ext2", &boot, &[]);
    let (found, _) = menu(&[&boot, &ext4(&root, &["-U", "01234567-89ab-cdef-0123-456789abcdef"])]);
    assert_eq!(told(&found), ["//vmlinuz-6.1 [] root=UUID=01234567-89ab-cdef-0123-456789abcdef ro"]);
    // One that cannot be read is the initrd's to find.
    assert_eq!(told(&menu(&[&boot]).0), ["//vmlinuz-6.1 [] "]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let made = |tool_name: &str, args: &[&str], mib: u64| {
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        tool(tool_name, &[args, &[image.to_str().unwrap()]].concat(), "");
        let bytes = fs::read(&image).unwrap();
        fs::remove_file(&image).unwrap();
        bytes
    };
    let named = |disk: &[u8]| Inhabitant::of(&disk, Partition { number: 3, ..whole(disk) }).to_string();
    for (expected, disk) in [
        ("3: XFS: cannot be read here", made("mkfs.xfs", &["-q"], 300)),
        ("3: btrfs: cannot be read here", made("mkfs.btrfs", &["-q"], 128)),
        ("3: swap: cannot be read here", made("mkswap", &["-q"], 1)),
        ("3: not known here: ext4 with meta_bg", ext4(&empty, &["-O", "meta_bg,^resize_inode"])),
        ("3: empty, or of a kind that is not known: cannot be read here", vec![0; 1 << 20]),
    ] {
        assert_eq!(named(&disk), expected);
    }
    for (at, mark, expected) in
        [(0, &b"LUKS\xba\xbe"[..], "LUKS"), (512, b"LABELONE", "LVM"), (3, b"NTFS    ", "NTFS")]
    {
        let mut disk = vec![0; 1 << 20];
        disk[at..at + mark.len()].copy_from_slice(mark);
        assert!(named(&disk).contains(expected), "{}", named(&disk));
    }
    let ext2 = ext("ext2", &empty, &["-U", "01234567-89ab-cdef-0123-456789abcdef"]);
    assert!(named(&ext2).starts_with("3: ext2 01234567-89ab-cdef-0123-456789abcdef: neither loader/entries"));
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
