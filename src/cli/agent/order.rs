//! `vmm agent time`, `reseed`, `hostname`, `network`: what a guest needs to hear that was copied, moved or asleep.

use std::io;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Reach;
use vmm_agent::protocol::{Network, Request};
use vmm_command::{Code, Failure};

/// What a guest's random pool gets: 256 bits are all that it holds.
pub const SEED: usize = 32;

/// Bytes that Linux takes for a host name (`__NEW_UTS_LEN`), and for the name of an interface (`IFNAMSIZ` less its NUL).
const LONGEST_HOSTNAME: usize = 64;
const LONGEST_INTERFACE: usize = 15;

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
    /// The guest's new host name: letters, digits and hyphens, in parts that dots separate; at most 64 bytes
    #[arg(value_parser = hostname_of)]
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
    /// The way to all other networks: another address of this network
    #[arg(long, value_name = "ADDRESS")]
    gateway: Option<Ipv4Addr>,
    /// Who resolves names, in place of those in the guest's /etc/resolv.conf
    #[arg(long, value_name = "ADDRESS")]
    dns: Option<Ipv4Addr>,
    /// The interface
    #[arg(long, value_name = "NAME", default_value = "eth0", value_parser = interface)]
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

impl Address {
    /// The address that all of its network's have in common.
    fn network(self) -> Self {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.bits)).unwrap_or(0);
        Self { address: Ipv4Addr::from(u32::from(self.address) & mask), ..self }
    }

    /// Whether one host alone can have it: it names neither no one, nor this host, nor many. A network of two has no address for
    /// itself or for all (RFC 3021).
    fn is_of_a_host(self) -> bool {
        let Self { address, bits } = self;
        let rest = u32::MAX.checked_shr(bits.into()).unwrap_or(0);
        let host = u32::from(address) & rest;
        let octet = address.octets()[0];
        (1..224).contains(&octet) && octet != 127 && (bits >= 31 || (host != 0 && host != rest))
    }
}

/// A host name as RFC 1123, section 2.1, has it.
pub fn hostname_of(text: &str) -> Result<String, String> {
    let part = |part: &str| {
        (1..64).contains(&part.len())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    let fine = text.len() <= LONGEST_HOSTNAME && text.split('.').all(part);
    fine.then(|| text.to_owned()).ok_or_else(|| {
        format!("{text:?} is no host name: letters, digits and hyphens, at most {LONGEST_HOSTNAME} bytes")
    })
}

/// The name of an interface as Linux takes it. A longer one would be cut to that of another.
fn interface(text: &str) -> Result<String, String> {
    let fine = (1..=LONGEST_INTERFACE).contains(&text.len())
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    fine.then(|| text.to_owned()).ok_or_else(|| {
        format!("{text:?} is no interface's name: eth0; it has at most {LONGEST_INTERFACE} bytes")
    })
}

impl Options {
    fn order(&self, request: Request) -> Result<Code, Failure> {
        let guest = self.reach.guest(&self.name)?;
        guest.order(request).map_err(|error| guest.failure(error))?;
        Ok(Code::Success)
    }
}

/// `vmm agent time`: the host's.
pub fn time(options: &Options) -> Result<Code, Failure> {
    let guest = options.reach.guest(&options.name)?;
    // Looked at when the agent is there: what was waited for it is not to be missing.
    guest.facts().map_err(|error| guest.failure(error))?;
    guest.order(Request::SetTime(nanoseconds()))?;
    Ok(Code::Success)
}

/// `vmm agent reseed`: from the host's generator.
pub fn reseed(options: &Options) -> Result<Code, Failure> {
    options.order(Request::Reseed(random::<SEED>()?.to_vec()))
}

/// The host's wall clock: nanoseconds since 1970.
pub fn nanoseconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes of the host's generator.
pub fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    let got = getrandom(&mut bytes, GetRandomFlags::empty()).map_err(io::Error::from);
    let all = got.and_then(|got| if got == N { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) });
    all.context("cannot read random bytes of the host").map_err(|error| Failure::new(Code::Host, error))
}

/// `vmm agent hostname`.
pub fn hostname(options: HostnameOptions) -> Result<Code, Failure> {
    options.guest.order(Request::SetHostname(options.hostname.into_bytes()))
}

/// `vmm agent network`.
pub fn network(options: NetworkOptions) -> Result<Code, Failure> {
    let NetworkOptions { guest, address: of, gateway, dns, device } = options;
    let Address { address, bits } = of;
    let wrong = |error| Failure::new(Code::BadArgument, error);
    if !of.is_of_a_host() {
        let error = anyhow!("{address}/{bits} is no address that a host can have");
        return Err(
            wrong(error).hint(Some("give one within its network, not the first or last of it: 10.0.2.15/24"))
        );
    }
    let Address { address: network, .. } = of.network();
    if let Some(gateway) = gateway
        && (Address { address: gateway, bits }.network().address != network || gateway == address)
    {
        let error = anyhow!("gateway {gateway} is no other host of the network {network}/{bits}");
        return Err(wrong(error)
            .hint(Some(format!("give the address of one that is: --gateway, within {network}/{bits}"))));
    }
    guest.order(Request::SetNetwork(Network { device: device.into_bytes(), address, bits, gateway, dns }))
}
