//! `vmm device`: the devices of a running virtual machine, which come and go on its PCI bus.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::Subcommand;

use super::control::connect;
use super::options::os_text;
use vmm_command::{Code, Failure, pretty, print};
use vmm_monitor::api::Error;
use vmm_monitor::api::client::Client;
use vmm_monitor::config::{Disk, Overlay, Plug};
use vmm_monitor::disk;
use vmm_monitor::machine::{self, Attached, Attachment};
use vmm_monitor::virtio;

const EXAMPLES: &str = "\
Examples:
  vmm run -d --name web --disk root.img --transport pci
  vmm device add web disk=data.img
      another disk, /dev/vdb in the guest; prints its name, virtio-blk1
  vmm device add web net=user,publish=8080:80
  vmm device list web
  vmm device remove web virtio-blk1
      after umount in the guest
";

/// Between two looks whether a device is gone.
const LOOK: Duration = Duration::from_millis(20);

/// The options of `vmm device`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Give a virtual machine with --transport pci another disk or network device, and print its name
    Add(AddOptions),
    /// Have the guest let a disk or network device go, and wait until it is gone
    Remove(RemoveOptions),
    /// List the devices of a virtual machine
    List(ListOptions),
}

#[derive(Debug, clap::Args)]
struct AddOptions {
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// disk=FILE or net=user, and what else --disk and --net of vmm run take: disk=FILE,readonly; net=tap=tap0
    #[arg(value_name = "disk=FILE|net=WHERE", value_parser = os_text::<Plug, _>())]
    device: Plug,
    /// Print the device as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct RemoveOptions {
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// The device's name, as vmm device list shows it
    device: String,
    /// Seconds that the guest has to let it go
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// Take it away at once, and tell the guest nothing: for one that has let it go but cannot say so (Linux without ACPI hot plug,
    /// after echo 1 >/sys/bus/pci/devices/0000:PCI/remove). One that still uses it hangs
    #[arg(long, conflicts_with = "timeout")]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct ListOptions {
    /// The virtual machine's name, as vmm list shows it
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `vmm device`.
///
/// # Errors
/// The virtual machine refuses; or its guest does not let a device go.
pub fn device(options: Options) -> Result<Code, Failure> {
    match options.command {
        Command::Add(options) => add(options),
        Command::Remove(options) => remove(&options),
        Command::List(options) => list(&options),
    }
}

fn add(options: AddOptions) -> Result<Code, Failure> {
    let mut device = options.device;
    device.make_absolute().map_err(|error| Failure::new(Code::Host, error))?;
    let mut client = connect(&options.name)?;
    let added = match (client.add_device(&device, &[])?, &device) {
        (Some(added), _) => added,
        (None, Plug::Disk(disk)) => add_disk(&mut client, &device, disk)?,
        (None, Plug::Net(_)) => {
            return Err(Failure::new(Code::Host, anyhow!("a network device has no files")));
        }
    };
    print(&if options.json { pretty(&added)? } else { format!("{}\n", added.name) })?;
    Ok(Code::Success)
}

/// Opens what `disk`, which is `device`, names, and hands it over.
fn add_disk(client: &mut Client, device: &Plug, disk: &Disk) -> Result<Attached, Failure> {
    let new = match &disk.overlay {
        Some(Overlay::Kept(path)) if !path.exists() => Some(path),
        _ => None,
    };
    let files = disk::Files::open(disk).map_err(virtio::Error::from).map_err(machine::Error::from)?;
    let added = client.add_device(device, &files.into_descriptors());
    // Of one that does not answer nobody knows whether it has the disk.
    if let Err(Error::Refused { .. }) = added {
        let _ = new.map(fs::remove_file);
    }
    added?.ok_or_else(|| Failure::new(Code::Host, anyhow!("it did not take the disk's files")))
}

fn remove(options: &RemoveOptions) -> Result<Code, Failure> {
    let RemoveOptions { name, device, timeout, force } = options;
    let mut client = connect(name)?;
    let asked = client.remove_device(device, *force)?;
    if asked.state == Attachment::Gone {
        return Ok(Code::Success);
    }
    let deadline = Instant::now().checked_add(Duration::from_secs(*timeout));
    loop {
        match client.devices() {
            Ok(devices) if devices.iter().all(|device| device.id != asked.id) => return Ok(Code::Success),
            // While it reboots it has no devices to tell of.
            Ok(_) | Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(ignored(name, &asked, *timeout));
        }
        thread::sleep(LOOK);
    }
}

fn ignored(name: &str, asked: &Attached, timeout: u64) -> Failure {
    let (device, place) = (&asked.name, asked.place.as_deref().unwrap_or("PCI"));
    let error = anyhow!("the guest of {name:?} has not let {device} go within {timeout} seconds");
    let hint = format!(
        "it may still do so, and a reboot removes it, too. One that knows no ACPI hot plug (Linux without \
         CONFIG_HOTPLUG_PCI_ACPI) has to remove it by itself: echo 1 >/sys/bus/pci/devices/0000:{place}/remove; then vmm \
         device remove --force {name} {device}"
    );
    Failure::new(Code::Host, error).hint(Some(hint))
}

fn list(options: &ListOptions) -> Result<Code, Failure> {
    let devices = connect(&options.name)?.devices()?;
    print(&if options.json { pretty(&devices)? } else { table(&devices) })?;
    Ok(Code::Success)
}

fn table(devices: &[Attached]) -> String {
    let width = devices.iter().map(|device| device.name.len()).max().unwrap_or(0).max(4);
    let row = |name: &str, place: &str, state: &str, device: &str| {
        format!("{name:<width$}  {place:<7}  {state:<8}  {device}\n")
    };
    let mut text = row("NAME", "PCI", "STATE", "DEVICE");
    for Attached { name, place, state, device, .. } in devices {
        text.push_str(&row(name, place.as_deref().unwrap_or("-"), &state.to_string(), device));
    }
    text
}
