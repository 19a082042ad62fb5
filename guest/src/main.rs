//! `cargo guest -- kernel|initramfs|rootfs|disk ...`: parses arguments and calls the library. Results go to standard output,
//! progress to standard error.

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand};
use guest::initramfs::Compression;
use guest::kernel::{Kernel, Kind};
use guest::{bundle, disk, initramfs, rootfs};
use std::path::PathBuf;
use std::process::ExitCode;

/// Build what runs inside a VM
#[derive(Debug, Parser)]
#[command(bin_name = "cargo guest --")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetch or build a kernel; prints where its files are
    Kernel {
        kind: Kind,
        /// Look for a newer version in place of taking the cached one
        #[arg(long)]
        refresh: bool,
    },
    /// Build an initramfs
    Initramfs(InitramfsArgs),
    /// Build an ext4 root image
    Rootfs(RootfsArgs),
    /// Build a disk with Debian and an installed kernel, which boots by itself
    Disk(DiskArgs),
    /// Build the agent, by which the host runs commands in a guest
    Agent {
        /// The file to write
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Everything that the tests and `make run` boot, in one folder
    Bundle(BundleArgs),
}

#[derive(Debug, Args)]
struct BundleArgs {
    /// The folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Only this kernel and its initramfs (may be repeated)
    #[arg(long, value_name = "KIND")]
    only: Vec<Kind>,
}

#[derive(Debug, Args)]
struct InitramfsArgs {
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Another program as /init
    #[arg(long, value_name = "BIN")]
    init: Option<PathBuf>,
    /// Our smallest /init: says "guest: init" and powers off
    #[arg(long, conflicts_with_all = ["init", "busybox", "kernel"])]
    tiny: bool,
    /// The kernel that it is for: Debian's need modules
    #[arg(long, value_name = "KIND")]
    kernel: Option<Kind>,
    /// One more module to load, with what it needs (Debian's kernels; may be repeated)
    #[arg(long, value_name = "NAME", requires = "kernel")]
    module: Vec<String>,
    /// Put busybox in, which gives a shell
    #[arg(long)]
    busybox: bool,
    /// A file or folder of the host, and where it goes (may be repeated)
    #[arg(long, value_name = "HOST=GUEST")]
    add: Vec<String>,
    /// How to pack it
    #[arg(long, value_enum, default_value_t)]
    compress: Compression,
}

#[derive(Debug, Args)]
struct RootfsArgs {
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// A folder, or `debian` for a small Debian with our init
    #[arg(long, value_name = "DIR|debian")]
    from: PathBuf,
    /// Size of the image; it is sparse
    #[arg(long, default_value = "512M")]
    size: String,
    /// Label of the file system
    #[arg(long, default_value = "root")]
    label: String,
    /// Packages to have in a Debian root beyond the minimum
    #[arg(long, value_name = "PKG,...", value_delimiter = ',')]
    include: Vec<String>,
}

#[derive(Debug, Args)]
struct DiskArgs {
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Size of the disk in MiB; it is sparse
    #[arg(long, value_name = "MIB", default_value_t = disk::MIB)]
    size: u64,
    /// Packages to have beyond the kernel and the minimum
    #[arg(long, value_name = "PKG,...", value_delimiter = ',')]
    include: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Kernel { kind, refresh } => println!("{}", Kernel::get(kind, refresh)?),
        Command::Initramfs(args) => {
            let add = args.add.iter().map(|pair| match pair.split_once('=') {
                Some((host, guest)) if !host.is_empty() && !guest.is_empty() => {
                    Ok((host.into(), guest.to_owned()))
                }
                _ => bail!("--add {pair}: expected HOST=GUEST"),
            });
            let recipe = initramfs::Recipe {
                init: args.init,
                tiny: args.tiny,
                kernel: args.kernel,
                modules: args.module,
                busybox: args.busybox,
                add: add.collect::<Result<_>>()?,
            };
            recipe.write(&args.out, args.compress)?;
            println!("initramfs {}", args.out.display());
        }
        Command::Bundle(args) => match args.only.as_slice() {
            [] => bundle::write(&args.out, &[Kind::Stock, Kind::Tuned], true)?,
            only => bundle::write(&args.out, only, false)?,
        },
        Command::Agent { out } => {
            guest::programs::write_agent(&out)?;
            println!("agent {}", out.display());
        }
        Command::Disk(args) => {
            disk::write(&args.out, args.size, &args.include)?;
            println!("disk {}", args.out.display());
        }
        Command::Rootfs(args) => {
            let source = if args.from.as_os_str() == "debian" {
                rootfs::Source::Debian { include: args.include }
            } else if args.include.is_empty() {
                rootfs::Source::Folder(args.from)
            } else {
                bail!("--include is for --from debian");
            };
            rootfs::Recipe { source, size: args.size, label: args.label }.write(&args.out)?;
            println!("rootfs {}", args.out.display());
        }
    }
    Ok(())
}
