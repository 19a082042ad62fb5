//! `vmm agent time`, `reseed`, `hostname`, `network`: what a guest needs to hear that was copied, moved or asleep.

use std::io;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;

use super::Reach;
use vmm_agent::protocol::{Network, Request};
use vmm_command::{Code, Failure};

/// What a guest's random pool gets: 256 bits are all that it holds.
const SEED: usize = 32;

/// The options of `vmm agent time` and `reseed`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    reach: Reach,
    /// The virtual machine's name, as vmm list shows it
    name: String,
}

/// The options of `vmm agent hostname`.
#[derive(Debug, clap::Args)]
pub struct HostnameOptions {
    #[command(flatten)]
    guest: Options,
    /// The guest's new host name
    hostname: String,
}

/// The options of `vmm agent network`.
#[derive(Debug, clap::Args)]
pub struct NetworkOptions {
    #[command(flatten)]
    guest: Options,
    /// Address of the guest's interface, and the bits of it that are its network's: 10.0.2.15/24
    #[arg(value_name = "ADDRESS/BITS")]
    address: Address,
    /// The way to all other networks
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<Ipv4Addr>,
    /// Who resolves names, in place of those in the guest's /etc/resolv.conf
    #[arg(long, value_name = "ADDRESS")]
    dns: Option<Ipv4Addr>,
    /// The interface
    #[arg(long, value_name = "NAME", default_value = "eth0")]
    device: String,
}

#[derive(Debug, Clone, Copy)]
struct Address {
    address: Ipv4Addr,
    bits: u8,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = |(address, bits): (&str, &str)| {
            let bits = bits.parse().ok().filter(|bits| *bits <= 32)?;
            Some(Self { address: address.parse().ok()?, bits })
        };
        let read = text.split_once('/').and_then(read);
        read.ok_or_else(|| format!("{text:?} is no IPv4 address with its network's bits: 10.0.2.15/24"))
    }
}

impl Options {
    fn order(&self, request: Request) -> Result<Code, Failure> {
        self.reach.guest(&self.name)?.order(request)?;
        Ok(Code::Success)
    }
}

/// `vmm agent time`: the host's.
pub fn time(options: &Options) -> Result<Code, Failure> {
    let guest = options.reach.guest(&options.name)?;
    // Looked at when the agent is there: what was waited for it is not to be missing.
    guest.facts()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    guest.order(Request::SetTime(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)))?;
    Ok(Code::Success)
}

/// `vmm agent reseed`: from the host's generator.
pub fn reseed(options: &Options) -> Result<Code, Failure> {
    let mut seed = vec![0; SEED];
    let read = rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty());
    read.map_err(io::Error::from)
        .context("cannot read random bytes of the host")
        .map_err(|error| Failure::new(Code::Host, error))?;
    options.order(Request::Reseed(seed))
}

/// `vmm agent hostname`.
pub fn hostname(options: HostnameOptions) -> Result<Code, Failure> {
    options.guest.order(Request::SetHostname(options.hostname.into_bytes()))
}

/// `vmm agent network`.
pub fn network(options: NetworkOptions) -> Result<Code, Failure> {
    let NetworkOptions { guest, address: Address { address, bits }, gateway, dns, device } = options;
    guest.order(Request::SetNetwork(Network { device: device.into_bytes(), address, bits, gateway, dns }))
}
