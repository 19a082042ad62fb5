//! What lies between the host and the inside: made for one contender, and gone with it. Made by ip(8), which takes root.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::rivals::command::prepare;
use crate::rivals::{Helper, Setting};

/// A kind of network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The monitor's own, with the host's sockets behind it.
    User,
    /// A tap.
    Tap,
    /// passt, a user network in a process of its own, over a socket.
    Passt,
    /// A pair of interfaces, one of them in a network namespace.
    Veth,
}

/// A network, and its addresses.
#[derive(Debug)]
pub struct Network {
    kind: Kind,
    /// The interface on the host, and the namespace's name.
    name: String,
    subnet: u8,
    socket: PathBuf,
}

impl Network {
    /// The `number`th of this run.
    ///
    /// # Errors
    /// It cannot be made: what ip(8) said.
    pub fn make(kind: Kind, number: u8, setting: &Setting) -> Result<Self, String> {
        let name = format!("vb{}n{number}", std::process::id() % 1_000_000);
        let socket = setting.scratch.join(format!("{name}.sock"));
        let network = Self { kind, name, subnet: number, socket };
        let name = &network.name;
        match kind {
            Kind::User => {}
            // passt takes addresses from an interface that has some.
            Kind::Tap | Kind::Passt => {
                ip(&format!("tuntap add dev {name} mode tap"))?;
                ip(&format!("addr add {}/24 dev {name}", network.host_side()))?;
                ip(&format!("link set {name} up"))?;
            }
            Kind::Veth => {
                ip(&format!("netns add {name}"))?;
                ip(&format!("link add {name} type veth peer name eth0 netns {name}"))?;
                ip(&format!("addr add {}/24 dev {name}", network.host_side()))?;
                ip(&format!("link set {name} up"))?;
                let inside = network.inside();
                ip(&format!("-n {name} addr add {inside}/24 dev eth0"))?;
                ip(&format!("-n {name} link set eth0 up"))?;
            }
        }
        Ok(network)
    }

    /// The interface, or the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// passt's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn host_side(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 97, self.subnet, 1)
    }

    fn inside(&self) -> Ipv4Addr {
        match self.kind {
            Kind::User | Kind::Passt => Ipv4Addr::new(10, 0, 2, 15),
            Kind::Tap | Kind::Veth => Ipv4Addr::new(10, 97, self.subnet, 2),
        }
    }

    /// Where the host listens.
    pub fn listens(&self) -> Ipv4Addr {
        match self.kind {
            Kind::User | Kind::Passt => Ipv4Addr::LOCALHOST,
            Kind::Tap | Kind::Veth => self.host_side(),
        }
    }

    /// Where that is for who is inside.
    pub fn peer(&self) -> Ipv4Addr {
        match self.kind {
            Kind::User | Kind::Passt => Ipv4Addr::new(10, 0, 2, 2),
            Kind::Tap | Kind::Veth => self.host_side(),
        }
    }

    /// What a guest sets its interface up with: the kernel's `ip=`.
    pub fn ip(&self) -> String {
        format!("{}::{}:255.255.255.0::eth0:off", self.inside(), self.peer())
    }

    /// Starts what it needs beside the contender.
    ///
    /// # Errors
    /// It is not installed, or does not come up.
    pub fn start(&self, setting: &Setting) -> Result<Option<Helper>, String> {
        if self.kind != Kind::Passt {
            return Ok(None);
        }
        let mut command = Command::new(setting.find("passt")?);
        command.args(["--foreground", "--quiet", "--ipv4-only", "--one-off", "--interface", &self.name]);
        command.args(["--address", "10.0.2.15", "--netmask", "255.255.255.0", "--gateway", "10.0.2.2"]);
        // As another user it could not make its socket in the scratch folder.
        command.args(["--dns", "none", "--runas", "0", "--socket"]).arg(&self.socket);
        command.stderr(Stdio::null());
        Helper::start(command, &self.socket).map(Some)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = match self.kind {
            Kind::User => Ok(()),
            Kind::Tap | Kind::Passt => ip(&format!("link delete {}", self.name)),
            // The other end goes with the namespace.
            Kind::Veth => {
                ip(&format!("link delete {}", self.name)).and(ip(&format!("netns delete {}", self.name)))
            }
        };
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    prepare(command).map(drop)
}
