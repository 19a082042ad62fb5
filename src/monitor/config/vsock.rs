//! [`Vsock`]: a socket device, and where its connections arrive on the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::text::{flag, optional_number};
use super::{Invalid, host_path};

/// A socket device: `PATH`, `cid=N`, `PATH,cid=N` or `vhost=on[,cid=N]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vsock {
    /// The unix socket on which the host's programs reach the guest; those that the guest reaches listen beside it. Absent: beside
    /// the VM's control socket.
    #[serde(with = "host_path::optional")]
    pub path: Option<PathBuf>,
    /// The guest's address. Absent: 3.
    #[serde(deserialize_with = "optional_number")]
    pub cid: Option<u32>,
    /// The host's kernel carries connections (vhost-vsock), in the monitor's place: the host's programs use AF_VSOCK.
    #[serde(deserialize_with = "flag", skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
}

impl Vsock {
    /// Where the host's kernel carries connections.
    pub const HOST_DEVICE: &'static str = "/dev/vhost-vsock";
    /// The first that is no other's (virtio 1.3, 5.10.4).
    const FIRST_CID: u32 = 3;
    /// What stands for any (VMADDR_CID_ANY).
    const ANY_CID: u32 = u32::MAX;

    /// The guest's address.
    pub fn cid(&self) -> u32 {
        self.cid.unwrap_or(Self::FIRST_CID)
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// The address is no guest's, or there is a path that nothing would be at.
    pub fn validate(&self) -> Result<(), Invalid> {
        if let (true, Some(path)) = (self.vhost, &self.path) {
            return Err(Invalid {
                what: format!("`vsock={}`: with vhost=on there is no unix socket", path.display()),
                hint: "drop the path: the host's programs use AF_VSOCK".to_owned(),
            });
        }
        let cid = self.cid();
        let whose = match cid {
            0 => "the hypervisor's",
            1 => "that of a machine to itself",
            2 => "the host's",
            Self::ANY_CID => "one that stands for any",
            _ => return Ok(()),
        };
        Err(Invalid {
            what: format!("`vsock=cid={cid}`: that address is {whose}"),
            hint: "give the guest one from 3 on, or leave it at that: `vsock=cid=3`".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::VmConfig;
    use super::*;

    #[test]
    fn a_device_is_written_as_text_or_object_and_reads_back() {
        let read = |json: &str| serde_json::from_str::<VmConfig>(&format!("{{\"vsock\": {json}}}")).unwrap();
        for (json, path, cid) in [
            ("{}", None, 3),
            ("\"cid=7\"", None, 7),
            ("\"/run/a,,b,cid=4294967294\"", Some("/run/a,b"), u32::MAX - 1),
            (r#"{"path": "v", "cid": 9}"#, Some("v"), 9),
        ] {
            let config = read(json);
            let vsock = config.vsock.as_ref().unwrap();
            assert_eq!((vsock.path.as_deref(), vsock.cid()), (path.map(|path| path.as_ref()), cid));
            assert_eq!(config.validate(), Ok(()));
            assert_eq!(
                serde_json::from_str::<VmConfig>(&serde_json::to_string(&config).unwrap()).unwrap(),
                config
            );
        }
        assert_eq!(read("null").vsock, None);
        let kernels = read("\"vhost=on,cid=4\"");
        assert!(kernels.vsock.as_ref().is_some_and(|vsock| vsock.vhost && vsock.cid() == 4));
        let written = serde_json::to_string(&kernels).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&written).unwrap(), kernels);
    }

    #[test]
    fn addresses_that_are_no_guests_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            let vsock: Vsock = format!("cid={cid}").parse().unwrap();
            assert!(vsock.validate().unwrap_err().to_string().contains(&cid.to_string()));
        }
        let both: Vsock = "/run/v,vhost=on".parse().unwrap();
        assert!(both.validate().unwrap_err().to_string().contains("/run/v"));
        for text in ["vhost=yes", "cid=4294967296", "cid=-1", "cid=x", "a,b", "a,cid=3,cid=4", ""] {
            assert!(text.parse::<Vsock>().is_err(), "{text}");
        }
    }
}
