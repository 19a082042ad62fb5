//! [`Net`]: a network device, and where its frames go on the host.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::net_limits::{Limit, NetLimits};
use super::text::{ParseError, Size, flag, list_of_texts, optional_number};
use super::{Allow, Invalid, OutputFile, Publish, Resolver, UserNet, host_path};

/// A network device: `user[,ipv6=off][,restrict=on][,dns=ADDR]...|switch=NAME[,dhcp=off]|tap=NAME|macvtap=NAME|fd=N|socket=PATH|vhost-user=PATH
/// [,mac=XX:XX:XX:XX:XX:XX][,mtu=N][,queues=N]
/// [,vhost=on|off][,bw=RATE[/BURST]][,pps=RATE[/BURST]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub struct Net {
    /// The host's end.
    pub to: NetTarget,
    /// The guest's address. Absent: derived from the VM's name, or random if it has none.
    pub mac: Option<Mac>,
    /// The largest packet, in bytes without Ethernet's header. Absent: what suits the end ([`Net::mtu`]).
    pub mtu: Option<u16>,
    /// Pairs of queues, of a tap or a vhost-user back end. Absent: one.
    pub queues: Option<u16>,
    /// The host's kernel serves a tap's queues (vhost-net), in the monitor's place.
    pub vhost: bool,
    /// The monitor gives the guest its address on a switch.
    pub dhcp: bool,
    /// What may pass in a second.
    pub limits: NetLimits,
}

/// Where frames go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetTarget {
    /// A network of the monitor's own, with the host's sockets behind it.
    User(UserNet),
    /// A tap, by name: one that is there, or one that is made and goes with the VM.
    Tap(String),
    /// A macvtap, by name, which is there: the guest has its address.
    Macvtap(String),
    /// A segment that machines of this user share, by name.
    Switch(String),
    /// A descriptor that this process was started with: a tap, or a unix socket.
    Fd(u32),
    /// A unix socket on which somebody listens for streams of frames.
    Socket(PathBuf),
    /// A unix socket of a process that serves the guest's queues by itself (vhost-user).
    VhostUser(PathBuf),
}

impl NetTarget {
    /// What each is called.
    pub(super) const WORDS: [&str; 7] = ["user", "switch", "tap", "macvtap", "fd", "socket", "vhost-user"];
}

impl fmt::Display for NetTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(_) => f.write_str("user"),
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::Macvtap(name) => write!(f, "macvtap={name}"),
            Self::Switch(name) => write!(f, "switch={name}"),
            Self::Fd(fd) => write!(f, "fd={fd}"),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
            Self::VhostUser(path) => write!(f, "vhost-user={}", path.display()),
        }
    }
}

impl Net {
    /// The most pairs of queues: a guest uses one for each vCPU.
    pub const MAX_QUEUES: u16 = 16;
    /// The MTU of a segment that machines share: large, for what is not cut, and small enough that a receiver's first window has
    /// several (with one, it waits with each acknowledgement).
    const SWITCH_MTU: u16 = 9000;
    /// The smallest MTU: any packet of IPv4 passes (virtio 1.3, 5.1.4.1).
    const MIN_MTU: u16 = 68;

    /// A device on a user network.
    pub fn user(network: UserNet) -> Self {
        Self {
            to: NetTarget::User(network),
            mac: None,
            mtu: None,
            queues: None,
            vhost: false,
            dhcp: true,
            limits: NetLimits::default(),
        }
    }

    /// The largest packet that the guest is told of; if none, it takes what it takes for Ethernet, 1500.
    pub fn mtu(&self) -> Option<u16> {
        match self.to {
            NetTarget::User(_) => self.mtu.or(Some(UserNet::MTU)),
            NetTarget::Switch(_) => self.mtu.or(Some(Self::SWITCH_MTU)),
            _ => self.mtu,
        }
    }

    /// Whether others than the monitor move its frames, which does not see them then.
    pub fn is_served_elsewhere(&self) -> bool {
        self.vhost || matches!(self.to, NetTarget::VhostUser(_))
    }

    /// Pairs of queues.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }
}

fn on() -> bool {
    true
}

fn is_on(flag: &bool) -> bool {
    *flag
}

/// [`Net`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "std::ops::Not::not")]
    user: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    macvtap: Option<String>,
    #[serde(default, deserialize_with = "optional_number", skip_serializing_if = "Option::is_none")]
    fd: Option<u32>,
    #[serde(default, with = "host_path::optional", skip_serializing_if = "Option::is_none")]
    socket: Option<PathBuf>,
    #[serde(
        default,
        rename = "vhost-user",
        with = "host_path::optional",
        skip_serializing_if = "Option::is_none"
    )]
    vhost_user: Option<PathBuf>,
    #[serde(default)]
    mac: Option<Mac>,
    #[serde(default, deserialize_with = "optional_number")]
    mtu: Option<u16>,
    #[serde(default, deserialize_with = "optional_number")]
    queues: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bw: Option<Limit<Size>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pps: Option<Limit<u64>>,
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "std::ops::Not::not")]
    vhost: bool,
    #[serde(default = "on", deserialize_with = "flag", skip_serializing_if = "is_on")]
    dhcp: bool,
    #[serde(default = "on", deserialize_with = "flag", skip_serializing_if = "is_on")]
    ipv6: bool,
    #[serde(default, deserialize_with = "flag", skip_serializing_if = "std::ops::Not::not")]
    restrict: bool,
    #[serde(default, deserialize_with = "list_of_texts", skip_serializing_if = "Vec::is_empty")]
    dns: Vec<Resolver>,
    #[serde(default, deserialize_with = "list_of_texts", skip_serializing_if = "Vec::is_empty")]
    allow: Vec<Allow>,
    #[serde(default, deserialize_with = "list_of_texts", skip_serializing_if = "Vec::is_empty")]
    publish: Vec<Publish>,
}

impl TryFrom<Keys> for Net {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, &'static str> {
        let Keys { ipv6, restrict, dns, allow, publish, .. } = keys;
        let network = UserNet { ipv6, restrict, dns, allow, publish };
        let is_plain = network == UserNet::default();
        let ends = [
            keys.user.then_some(NetTarget::User(network)),
            keys.switch.map(NetTarget::Switch),
            keys.tap.map(NetTarget::Tap),
            keys.macvtap.map(NetTarget::Macvtap),
            keys.fd.map(NetTarget::Fd),
            keys.socket.map(NetTarget::Socket),
            keys.vhost_user.map(NetTarget::VhostUser),
        ];
        let mut ends = ends.into_iter().flatten();
        let (Some(to), None) = (ends.next(), ends.next()) else {
            return Err(
                "a network device has one of user, switch=NAME, tap=NAME, macvtap=NAME, fd=N, socket=PATH and vhost-user=PATH",
            );
        };
        if !is_plain && !keys.user {
            return Err("ipv6=, restrict=, dns=, allow= and publish= are settings of net=user");
        }
        let Keys { mac, mtu, queues, vhost, dhcp, bw, pps, .. } = keys;
        if !dhcp && !matches!(to, NetTarget::Switch(_)) {
            return Err("dhcp= is a setting of net=switch=NAME");
        }
        Ok(Self { to, mac, mtu, queues, vhost, dhcp, limits: NetLimits { bw, pps } })
    }
}

impl From<Net> for Keys {
    fn from(net: Net) -> Self {
        let Net { to, mac, mtu, queues, vhost, dhcp, limits: NetLimits { bw, pps } } = net;
        let (mut switch, mut tap, mut macvtap, mut fd) = (None, None, None, None);
        let (mut socket, mut vhost_user) = (None, None);
        let (mut user, mut network) = (false, UserNet::default());
        match to {
            NetTarget::User(given) => (user, network) = (true, given),
            NetTarget::Switch(name) => switch = Some(name),
            NetTarget::Macvtap(name) => macvtap = Some(name),
            NetTarget::Tap(name) => tap = Some(name),
            NetTarget::Fd(number) => fd = Some(number),
            NetTarget::Socket(path) => socket = Some(path),
            NetTarget::VhostUser(path) => vhost_user = Some(path),
        }
        let UserNet { ipv6, restrict, dns, allow, publish } = network;
        Self {
            user,
            switch,
            tap,
            macvtap,
            fd,
            socket,
            vhost_user,
            mac,
            mtu,
            queues,
            vhost,
            dhcp,
            bw,
            pps,
            ipv6,
            restrict,
            dns,
            allow,
            publish,
        }
    }
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = |why| ParseError::new(format!("{text:?} is not {why}"));
        let parts: Vec<_> = text.split(':').collect();
        let byte = |part: &&str| {
            let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let bytes: Option<Vec<_>> = parts.iter().map(byte).collect();
        let bytes: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
        let bytes = bytes.ok_or_else(|| wrong("an Ethernet address like 52:54:00:12:34:56"))?;
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(wrong(
                "an address that a device can have: its first byte is even, and it is not all zeroes",
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Checks what can be checked without opening anything.
pub fn validate(list: &[Net]) -> Result<(), Invalid> {
    for (i, net) in list.iter().enumerate() {
        let invalid = |what: String, hint: &str| {
            Err(Invalid { what: format!("network device `net={}`: {what}", net.to), hint: hint.to_owned() })
        };
        if let NetTarget::Tap(name) | NetTarget::Macvtap(name) = &net.to {
            let plain = |c: char| c.is_ascii_graphic() && !"/%:".contains(c);
            if name.is_empty() || name.len() > 15 || !name.chars().all(plain) || name.starts_with('.') {
                return invalid(
                    format!("{name:?} cannot be the name of a network interface"),
                    "use 1 to 15 letters and digits: `net=tap=tap0`",
                );
            }
        }
        if matches!(net.to, NetTarget::Macvtap(_)) && net.mac.is_some() {
            return invalid(
                "the interface has an address of its own, which is the guest's".to_owned(),
                "drop mac=, or give the interface another: sudo ip link set NAME address XX:XX:XX:XX:XX:XX",
            );
        }
        if let NetTarget::Switch(name) = &net.to {
            let fine = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
            if name.is_empty() || name.len() > 32 || !name.chars().all(fine) {
                return invalid(
                    format!("{name:?} cannot be the name of a network segment"),
                    "use 1 to 32 letters, digits, '_', '.' and '-': `net=switch=lab`",
                );
            }
        }
        if let NetTarget::User(network) = &net.to {
            let mut published = network.publish.iter().enumerate();
            let clash = published.find_map(|(n, one)| {
                let address = network.publish[..n].iter().find_map(|other| one.clash(*other))?;
                Some(format!("{address}/{} is published twice", one.protocol()))
            });
            if let Some(clash) = clash {
                return invalid(
                    clash,
                    "publish another port of the host: each leads to one port of the guest",
                );
            }
            if net.mtu.is_some_and(|mtu| mtu < UserNet::MIN_MTU) {
                return invalid("the MTU is too small".to_owned(), "drop mtu=, or use mtu=576 to mtu=65535");
            }
            if list[..i].iter().any(|other| matches!(other.to, NetTarget::User(_))) {
                return invalid(
                    "a guest has one user network, for its addresses are always the same".to_owned(),
                    "drop one, and put its settings into the other: `net=user,publish=8080:80,publish=2222:22`",
                );
            }
        }
        if net.mtu.is_some_and(|mtu| mtu < Net::MIN_MTU) {
            return invalid(
                "the MTU is too small".to_owned(),
                "use mtu=68 to mtu=65535; Ethernet has mtu=1500",
            );
        }
        if !(1..=Net::MAX_QUEUES).contains(&net.queues()) {
            return invalid(format!("{} pairs of queues", net.queues()), "use queues=1 to queues=16");
        }
        let several = matches!(net.to, NetTarget::Tap(_) | NetTarget::Macvtap(_) | NetTarget::VhostUser(_));
        if net.queues() > 1 && !several {
            return invalid(
                "several queues need a tap, or a vhost-user back end".to_owned(),
                "drop queues=, or use tap=NAME",
            );
        }
        if net.vhost && !matches!(net.to, NetTarget::Tap(_)) {
            return invalid("vhost=on needs a tap".to_owned(), "drop vhost=, or use tap=NAME");
        }
        if net.is_served_elsewhere() && net.limits != NetLimits::default() {
            let (what, hint) = if net.vhost {
                (
                    "the host's kernel keeps no limits",
                    "drop bw= and pps=, or vhost=on; the host limits a tap with tc",
                )
            } else {
                ("a vhost-user back end keeps no limits", "drop bw= and pps=")
            };
            return invalid(what.to_owned(), hint);
        }
        let others = &list[..i];
        if !matches!(net.to, NetTarget::Socket(_)) && others.iter().any(|other| other.to == net.to) {
            return invalid("two devices have the same end".to_owned(), "give each its own");
        }
        if net.mac.is_some() && others.iter().any(|other| other.mac == net.mac) {
            return invalid(
                "two devices have the same address".to_owned(),
                "give each its own, or drop mac=",
            );
        }
    }
    Ok(())
}

/// The smallest limit of a dump: a file holds its head and one of the longest frames.
const LEAST_DUMP: Size = Size::from_bytes(256 << 10);

/// Where frames are to be written, by `PATH[,max=SIZE]`.
///
/// # Errors
/// It is no file, or its limit is too low.
pub fn dump(text: &OsStr) -> Result<OutputFile, ParseError> {
    OutputFile::with_least(text, LEAST_DUMP)
}

/// [`dump`] in a file.
pub fn optional_dump<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<OutputFile>, D::Error> {
    struct Dump(OutputFile);
    impl<'de> Deserialize<'de> for Dump {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = host_path::deserialize_text(deserializer)?;
            dump(&text).map(Self).map_err(ParseError::in_file)
        }
    }
    Ok(Option::<Dump>::deserialize(deserializer)?.map(|dump| dump.0))
}

/// Checks where the frames of the devices on the `list` are to be written.
pub fn validate_dump(list: &[Net], dump: Option<&OutputFile>) -> Result<(), Invalid> {
    let Some(dump) = dump else { return Ok(()) };
    let path = dump.path.display();
    let invalid = |what, hint: &str| Err(Invalid { what, hint: hint.to_owned() });
    match dump.max {
        _ if list.is_empty() => {
            let what =
                format!("network dump {path}: this machine has no network whose frames could be written");
            invalid(what, "add a network: `net=user`")
        }
        Some(max) if max < LEAST_DUMP => {
            let what = format!("network dump {path}: max={max} is too little for the longest frame");
            invalid(what, &format!("use max={LEAST_DUMP} or more"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::VmConfig;
    use super::*;

    #[test]
    fn a_device_is_written_as_text_or_object_and_reads_back() {
        let json = r#"{"net": ["tap=tap0", "tap=tap1,mac=02:00:00:00:00:0a,mtu=9000,queues=2,vhost=on", "fd=7",
            "socket=/run/a,,b", {"socket": "/run/a,b", "mtu": 1400}]}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        let told: Vec<_> = config.net.iter().map(|net| net.to.to_string()).collect();
        assert_eq!(told, ["tap=tap0", "tap=tap1", "fd=7", "socket=/run/a,b", "socket=/run/a,b"]);
        let tap = &config.net[1];
        assert_eq!((tap.mac.unwrap().0[5], tap.mtu, tap.queues(), tap.vhost), (10, Some(9000), 2, true));
        assert_eq!(config.validate(), Ok(()));
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn a_user_network_is_written_as_text_or_object_and_reads_back() {
        let text = "user,restrict=on,allow=127.0.0.1:80,allow=10.0.0.0/8,dns=9.9.9.9,publish=8080:80,publish=53:53/udp";
        let json = r#"{"user": true, "restrict": true, "allow": ["127.0.0.1:80", "10.0.0.0/8"], "dns": "9.9.9.9",
            "publish": ["8080:80", "53:53/udp"]}"#;
        let net: Net = text.parse().unwrap();
        assert_eq!(serde_json::from_str::<Net>(json).unwrap(), net);
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&net).unwrap()).unwrap(), net);
        let NetTarget::User(network) = &net.to else { panic!("{net:?}") };
        let without: Net = "user,ipv6=off".parse().unwrap();
        assert_eq!(without.to, NetTarget::User(UserNet { ipv6: false, ..UserNet::default() }));
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&without).unwrap()).unwrap(), without);
        assert!(network.ipv6 && network.restrict && network.allow.len() == 2 && network.publish[1].udp);
        let macvtap: Net = "macvtap=mv0,queues=2".parse().unwrap();
        assert_eq!((macvtap.to.to_string(), macvtap.queues()), ("macvtap=mv0".to_owned(), 2));
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&macvtap).unwrap()).unwrap(), macvtap);
        let switch: Net = "switch=lab".parse().unwrap();
        assert_eq!((switch.to.to_string(), switch.mtu()), ("switch=lab".to_owned(), Some(9000)));
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&switch).unwrap()).unwrap(), switch);
        let without: Net = "switch=lab,dhcp=off".parse().unwrap();
        assert!(switch.dhcp && !without.dhcp && switch.to == without.to);
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&without).unwrap()).unwrap(), without);
        let vhost_user: Net = "vhost-user=/run/a,,b,mtu=1400".parse().unwrap();
        assert_eq!(
            (vhost_user.to.to_string(), vhost_user.mtu()),
            ("vhost-user=/run/a,b".to_owned(), Some(1400))
        );
        assert_eq!(
            serde_json::from_str::<Net>(&serde_json::to_string(&vhost_user).unwrap()).unwrap(),
            vhost_user
        );
        let limited: Net = "user,bw=100M/1M,pps=5000".parse().unwrap();
        let json = r#"{"user": true, "bw": "100M/1M", "pps": 5000}"#;
        assert_eq!(serde_json::from_str::<Net>(json).unwrap(), limited);
        assert_eq!(serde_json::from_str::<Net>(&serde_json::to_string(&limited).unwrap()).unwrap(), limited);
        let (bw, pps) = (limited.limits.bw.unwrap(), limited.limits.pps.unwrap());
        assert_eq!((bw.each_second, bw.burst(), pps.burst()), (Size::mib(100), Size::mib(1), 500));
        assert_eq!((net.mtu(), "user,mtu=1500".parse::<Net>().unwrap().mtu()), (Some(65520), Some(1500)));
        assert_eq!("tap=user".parse::<Net>().unwrap().to, NetTarget::Tap("user".to_owned()));
    }

    #[test]
    fn a_dump_reads_back_and_has_a_network_and_room_for_a_frame() {
        let config = |json: &str| serde_json::from_str::<VmConfig>(json).unwrap();
        for dump in ["a,b.pcapng", "frames,max=1M"] {
            let config = config(&format!(r#"{{"net": ["user"], "net_dump": "{dump}"}}"#));
            assert_eq!(config.validate(), Ok(()));
            let json = serde_json::to_string(&config).unwrap();
            assert!(json.contains(&format!("\"{dump}\"")), "{json}");
            assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config);
        }
        assert!(config(r#"{"net_dump": "f"}"#).validate().is_err());
        for least in ["1K", "255K"] {
            let json = format!(r#"{{"net": ["user"], "net_dump": "f,max={least}"}}"#);
            let told = serde_json::from_str::<VmConfig>(&json).unwrap_err().to_string();
            assert!(told.contains(&format!("max={least} is too little; at least max=256K")), "{told}");
        }
        let mut config = config(r#"{"net": ["user"], "net_dump": "f"}"#);
        config.net_dump = Some("f,max=255K".parse().unwrap());
        assert!(config.validate().unwrap_err().hint.contains("max=256K"));
    }

    #[test]
    fn a_word_that_is_nearly_one_is_named() {
        for (text, hint) in [
            ("usr", Some("did you mean user?")),
            ("usre,restrict=on", Some("did you mean user?")),
            ("tpa=tap0", Some("did you mean tap=...?")),
            ("swich=lab", Some("did you mean switch=...?")),
            ("vhost_user=/run/a", Some("did you mean vhost-user=...?")),
            ("tap0", Some("did you mean tap=...?")),
            ("user,speed=9", None),
            ("eth0", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<Net>().unwrap_err().hint(), hint, "{text}");
        }
    }

    #[test]
    fn impossible_devices_are_refused() {
        for (text, word) in [
            ("mtu=1500", "one of user, switch=NAME, tap=NAME"),
            ("usr", "one of user, switch=NAME, tap=NAME"),
            ("tap0,mtu=1500", "one of user, switch=NAME, tap=NAME"),
            ("", "one of user, switch=NAME, tap=NAME"),
            ("socket=", "socket= is empty"),
            ("switch=,dhcp=off", "switch= is empty"),
            ("user,allow=", "allow= is empty"),
            ("user,allow=127.0.0.0/4", "begins at 112.0.0.0"),
            ("user,allow=192.168.1.7/24", "begins at 192.168.1.0"),
            ("user,allow=2001:db8::1/32", "begins at 2001:db8::"),
            ("user,allow=::ffff:127.0.0.1", "127.0.0.1"),
            ("switch=a,tap=b", "one of user"),
            ("switch=a,restrict=on", "settings of net=user"),
            ("tap=a,fd=3", "one of user"),
            ("tap=a,speed=9", "speed"),
            ("user,tap=a", "one of user"),
            ("tap=a,restrict=on", "settings of net=user"),
            ("tap=a,ipv6=off", "settings of net=user"),
            ("user,dhcp=off", "net=switch=NAME"),
            ("user,ipv6=6", "off"),
            ("tap=a,publish=8080:80", "settings of net=user"),
            ("user,publish=80", "the guest's port is missing"),
            ("user,allow=localhost", "127.0.0.1"),
            ("user,dns=one.one", "9.9.9.9"),
            ("tap=a,bw=0", "lets nothing pass"),
            ("tap=a,bw=1M/0", "lets nothing pass"),
            ("tap=a,bw=fast", "bw=100M or bw=100M/1M"),
            ("tap=a,bw=1M/", "bw=100M or bw=100M/1M"),
            ("tap=a,pps=-1", "pps=10000 or pps=10000/500"),
            ("tap=a,pps=1K", "pps=10000 or pps=10000/500"),
            ("fd=-1", "-1"),
            ("fd=x", "x"),
            ("tap=a,mtu=65536", "65536"),
            ("tap=a,mac=1:2:3:4:5:6", "1:2:3:4:5:6"),
            ("tap=a,mac=01:00:00:00:00:00", "even"),
            ("tap=a,mac=00:00:00:00:00:00", "zeroes"),
        ] {
            let error = text.parse::<Net>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        for list in [
            &["tap=a/b"][..],
            &["tap=tap%d"],
            &["tap=0123456789abcdef"],
            &["macvtap=a/b"],
            &["macvtap=a,mac=02:00:00:00:00:01"],
            &["switch=a/b"],
            &["switch=0123456789abcdef0123456789abcdef0"],
            &["switch=a,queues=2"],
            &["switch=a", "switch=a"],
            &["tap=a,mtu=67"],
            &["user,mtu=575"],
            &["user,queues=2"],
            &["user", "user,restrict=on"],
            &["tap=a,queues=0"],
            &["tap=a,queues=17"],
            &["fd=3,queues=2"],
            &["user,vhost=on"],
            &["tap=a,vhost=on,bw=1M"],
            &["vhost-user=a,pps=9"],
            &["vhost-user=a,queues=17"],
            &["vhost-user=a", "vhost-user=a"],
            &["tap=a", "tap=a"],
            &["fd=3", "fd=3"],
            &["tap=a,mac=02:00:00:00:00:01", "tap=b,mac=02:00:00:00:00:01"],
        ] {
            let list: Vec<Net> = list.iter().map(|text| text.parse().unwrap()).collect();
            assert!(validate(&list).is_err(), "{list:?}");
        }
    }
}
