//! What a machine that goes on from a snapshot beside others, or beside the one that was saved, may not share with them.

use crate::config::{CharTarget, Console, NetTarget, OutputFile, VmConfig};

/// The network of `config` that only one machine can be on, if it has one.
pub fn network_of_one(config: &VmConfig) -> Option<&NetTarget> {
    config.net.iter().map(|net| &net.to).find(|to| !matches!(to, NetTarget::User(_)))
}

/// `config` for one more machine of it: with consoles of its own, and without what of the host is another's: name, published
/// ports, files and sockets. Networks stay.
pub fn child(mut config: VmConfig) -> VmConfig {
    config.name = None;
    config.net_dump = None;
    config.vsock.iter_mut().for_each(|vsock| vsock.path = None);
    for net in &mut config.net {
        if let NetTarget::User(network) = &mut net.to {
            network.publish.clear();
        }
    }
    let of_another = |to: &CharTarget| matches!(to, CharTarget::File(_) | CharTarget::Socket(_));
    let mut console = config.console();
    let ends = [&mut console, &mut config.serial];
    // The devices stay, and one of them has something to say by.
    let mut is_silent = ends.iter().all(|end| **end != CharTarget::Stdio);
    for end in ends.into_iter().chain(config.port.iter_mut().map(|port| &mut port.to)) {
        if of_another(end) {
            *end = if std::mem::take(&mut is_silent) { CharTarget::Stdio } else { nowhere() };
        }
    }
    config.console = Console(Some(console));
    config
}

fn nowhere() -> CharTarget {
    CharTarget::File(OutputFile { path: "/dev/null".into(), max: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> VmConfig {
        child(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn a_child_has_no_host_end_of_another() {
        let config = of(
            r#"{"name": "a", "kernel": "k", "vsock": "/tmp/v", "serial": "file=/tmp/s", "port": ["p=socket=/tmp/p", "q=pty"],
            "net": ["user,publish=8080:80"], "net_dump": "/tmp/d"}"#,
        );
        assert_eq!((&config.name, &config.net_dump), (&None, &None));
        assert!(config.vsock.is_some_and(|vsock| vsock.path.is_none()));
        assert_eq!(config.net[0].to.to_string(), "user");
        assert_eq!(config.net, of(r#"{"net": ["user"]}"#).net);
        let ends = [&config.serial, &config.port[0].to, &config.port[1].to];
        assert_eq!(ends, [&nowhere(), &nowhere(), &CharTarget::Pty], "the console is on stdio");
    }

    #[test]
    fn a_child_of_a_machine_whose_console_went_elsewhere_has_one_end_to_speak_by() {
        let both = of(r#"{"console": "file=c", "serial": "socket=s"}"#);
        assert_eq!((both.console(), &both.serial), (CharTarget::Stdio, &nowhere()));
        let serial = of(r#"{"console": "off", "serial": "file=s"}"#);
        assert_eq!((serial.console(), &serial.serial), (CharTarget::Off, &CharTarget::Stdio));
        let quiet = of(r#"{"console": "off"}"#);
        assert_eq!((quiet.console(), &quiet.serial), (CharTarget::Off, &CharTarget::Off));
    }

    #[test]
    fn networks_for_one_machine_are_found() {
        let config: VmConfig = serde_json::from_str(r#"{"net": ["user", "tap=t"]}"#).unwrap();
        assert_eq!(network_of_one(&config).unwrap().to_string(), "tap=t");
        assert!(network_of_one(&of(r#"{"net": ["user"]}"#)).is_none());
    }
}
