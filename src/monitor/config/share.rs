//! [`Share`]: a folder or a file of the host's that the guest has, too.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::text::{ParseError, escaped, flag, items, optional_number, pairs};
use super::{Invalid, host_path};

/// A shared folder: `PATH[:TO][:ro]`, then any of `,tag=NAME ,cache=auto|always|never ,uid=N ,gid=N ,owners=map|xattr
/// ,locks=local|shared`. A path that has a colon in it is
/// written `path=PATH,to=TO,readonly`; one that another process serves, `vhost-user=PATH,to=TO`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Keys", into = "Keys")]
pub struct Share {
    /// What is shared.
    pub from: ShareFrom,
    /// Where the guest's init or agent mounts it. Absent: nowhere, and the guest mounts it by its tag if it wants it.
    pub to: Option<String>,
    /// The guest changes nothing in it.
    pub readonly: bool,
    /// What the guest mounts it by. Absent: `share0`, `share1` and so on.
    pub tag: Option<String>,
    /// How long the guest believes what it has seen.
    pub cache: ShareCache,
    /// The guest's user that the files of this host's user belong to. Absent: root.
    pub uid: Option<u32>,
    /// The guest's group likewise. Absent: that of the same number as the user.
    pub gid: Option<u32>,
    /// What becomes of the owners that the guest gives its files.
    pub owners: ShareOwners,
    /// Who sees the locks of the guest's programs.
    pub locks: ShareLocks,
}

/// Where the files of a shared folder come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShareFrom {
    /// The folder, or a file.
    Path(PathBuf),
    /// Who listens at this socket (vhost-user): virtiofsd, for instance. How the files are shared is its own affair.
    VhostUser(PathBuf),
}

impl ShareFrom {
    /// Of the folder, the file or the socket.
    pub fn path(&self) -> &PathBuf {
        match self {
            Self::Path(path) | Self::VhostUser(path) => path,
        }
    }

    /// The same, to be changed.
    pub(super) fn path_mut(&mut self) -> &mut PathBuf {
        match self {
            Self::Path(path) | Self::VhostUser(path) => path,
        }
    }
}

/// [`Share`] as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Keys {
    #[serde(default, with = "host_path::optional", skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    #[serde(default, with = "host_path::optional", skip_serializing_if = "Option::is_none")]
    vhost_user: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(default, deserialize_with = "flag")]
    readonly: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    #[serde(default)]
    cache: ShareCache,
    #[serde(default, deserialize_with = "optional_number", skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(default, deserialize_with = "optional_number", skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    #[serde(default)]
    owners: ShareOwners,
    #[serde(default)]
    locks: ShareLocks,
}

impl TryFrom<Keys> for Share {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, &'static str> {
        let Keys { path, vhost_user, to, readonly, tag, cache, uid, gid, owners, locks } = keys;
        let from = match (path, vhost_user) {
            (Some(path), None) if path.as_os_str().is_empty() => return Err("expected a path"),
            (Some(path), None) => ShareFrom::Path(path),
            (None, Some(path)) => ShareFrom::VhostUser(path),
            _ => return Err("a share has one of path=PATH and vhost-user=PATH"),
        };
        let plain = (false, ShareCache::default(), None, None, ShareOwners::default(), ShareLocks::default());
        if matches!(from, ShareFrom::VhostUser(_)) && (readonly, cache, uid, gid, owners, locks) != plain {
            return Err(
                "readonly, cache=, uid=, gid=, owners= and locks= are for folders that vmm serves itself: tell who listens at vhost-user=",
            );
        }
        Ok(Self { from, to, readonly, tag, cache, uid, gid, owners, locks })
    }
}

impl From<Share> for Keys {
    fn from(share: Share) -> Self {
        let Share { from, to, readonly, tag, cache, uid, gid, owners, locks } = share;
        let (path, vhost_user) = match from {
            ShareFrom::Path(path) => (Some(path), None),
            ShareFrom::VhostUser(path) => (None, Some(path)),
        };
        Self { path, vhost_user, to, readonly, tag, cache, uid, gid, owners, locks }
    }
}

/// What becomes of the owners that a guest gives files of a shared folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareOwners {
    /// A file belongs to the one user that the host's user is in the guest, and is given to nobody else.
    #[default]
    Map,
    /// They are kept in an extended attribute of the host's file, and so are modes by which programs run as their owner, and device nodes.
    Xattr,
}

/// Who sees the locks of a guest's programs on files of a shared folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareLocks {
    /// Programs of the same guest.
    #[default]
    Local,
    /// The host's programs and other guests, too.
    Shared,
}

/// How long a guest believes what it has seen of a shared folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareCache {
    /// Changes on the host are seen within a second.
    #[default]
    Auto,
    /// For good: nobody else changes anything.
    Always,
    /// Not at all.
    Never,
}

impl Share {
    /// Bytes of a tag (virtio 1.3, 5.11.4).
    pub const TAG_MOST: usize = 36;

    /// What the guest mounts the `index`th by.
    pub fn tag(&self, index: usize) -> String {
        self.tag.clone().unwrap_or_else(|| format!("share{index}"))
    }

    /// The guest's user and group that files of this host's user belong to.
    pub fn owner(&self) -> (u32, u32) {
        let uid = self.uid.unwrap_or(0);
        (uid, self.gid.unwrap_or(uid))
    }

    /// What the kernel command line says of the `index`th, which may be a file, to who mounts it: none if nobody is to.
    pub fn order(&self, index: usize, is_file: bool) -> Option<String> {
        let is_file = if is_file { ":file" } else { "" };
        let read_only = if self.readonly { ":ro" } else { "" };
        self.to.as_ref().map(|to| format!("vmm.share={}:{to}{is_file}{read_only}", self.tag(index)))
    }

    /// A file's name to the guest. None: it is no file's.
    pub fn name(&self) -> Option<CString> {
        let name = self.to.as_ref().map_or(self.from.path().as_path(), Path::new).file_name()?;
        CString::new(name.as_bytes()).ok()
    }

    /// Checks what can be checked of `shares` without opening anything.
    ///
    /// # Errors
    /// Two are mounted at the same place, or by the same tag; or one is none.
    pub(super) fn validate(shares: &[Self]) -> Result<(), Invalid> {
        for (index, share) in shares.iter().enumerate() {
            let invalid = |what: String, hint: &str| {
                let what = format!("share {}: {what}", share.from.path().display());
                Err(Invalid { what, hint: hint.to_owned() })
            };
            let tag = share.tag(index);
            if !(1..=Self::TAG_MOST).contains(&tag.len()) || !tag.bytes().all(is_plain) || tag.contains(':') {
                return invalid(
                    format!("{tag:?} cannot be its tag"),
                    "use 1 to 36 letters, digits and marks without ':': tag=src",
                );
            }
            let is_place = |to: &String| to.starts_with('/') && to.len() > 1 && to.bytes().all(is_plain);
            if let Some(to) = share.to.as_ref().filter(|to| !is_place(to) || to.contains(':')) {
                return invalid(
                    format!("{to:?} is no place for it"),
                    "name an absolute path of the guest's without spaces, quotes and ':': .:/src",
                );
            }
            for (other, earlier) in shares[..index].iter().enumerate() {
                if earlier.tag(other) == tag {
                    return invalid(format!("another has its tag, {tag}"), "give each its own: tag=src");
                }
                if share.to.is_some() && share.to == earlier.to {
                    return invalid("another is mounted there".to_owned(), "give each its own place");
                }
            }
        }
        Ok(())
    }
}

/// It stands for itself on a kernel command line.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !b"\"'\\,".contains(&byte)
}

impl TryFrom<&OsStr> for Share {
    type Error = ParseError;

    fn try_from(text: &OsStr) -> Result<Self, ParseError> {
        let all = items(text);
        let Some((first, rest)) = all.split_first().filter(|(first, _)| !first.contains(&b'=')) else {
            return pairs(text, "path", "", &[]);
        };
        let mut words = Vec::new();
        let mut path = first.as_slice();
        if let Some(before) = path.strip_suffix(b":ro") {
            path = before;
            words.push(b"readonly".to_vec());
        } else if let Some(before) = path.strip_suffix(b":rw") {
            path = before;
        }
        if let Some(at) = path.windows(2).rposition(|pair| pair == b":/") {
            words.push([b"to=", escaped(&path[at + 1..]).as_slice()].concat());
            path = &path[..at];
        }
        words.insert(0, [b"path=", escaped(path).as_slice()].concat());
        words.extend(rest.iter().map(|item| escaped(item)));
        pairs(&OsString::from(OsStr::from_bytes(&words.join(&b','))), "path", "", &[])
    }
}

impl FromStr for Share {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        OsStr::new(text).try_into()
    }
}

/// As it is written, without its options.
impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.from {
            ShareFrom::Path(path) => write!(f, "{}", path.display())?,
            ShareFrom::VhostUser(path) => write!(f, "vhost-user={}", path.display())?,
        }
        self.to.iter().try_for_each(|to| write!(f, ":{to}"))?;
        f.write_str(if self.readonly { ":ro" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::super::VmConfig;
    use super::*;

    #[test]
    fn a_share_is_a_folder_and_a_place_and_reads_back() {
        let os = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
        for (text, path, to, readonly) in [
            (&b"."[..], &b"."[..], None, false),
            (b".:/src", b".", Some("/src"), false),
            (b".:/src:ro", b".", Some("/src"), true),
            (b"a:b:/src:rw,cache=never", b"a:b", Some("/src"), false),
            (b"/a:ro,tag=t", b"/a", None, true),
            (b"/a,,b:/c", b"/a,b", Some("/c"), false),
            (b"\xff:/src", b"\xff", Some("/src"), false),
            (b"path=/a:/b,to=/c,readonly", b"/a:/b", Some("/c"), true),
        ] {
            let share: Share = OsStr::from_bytes(text).try_into().unwrap();
            let shown = (share.from.clone(), share.to.as_deref(), share.readonly);
            assert_eq!(shown, (ShareFrom::Path(os(path)), to, readonly), "{text:?}");
            let config = VmConfig { share: vec![share], ..VmConfig::default() };
            assert_eq!(config.validate(), Ok(()));
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config, "{json}");
        }
        let share: Share = ".:/src,uid=1000".parse().unwrap();
        assert_eq!(
            (share.owner(), share.order(1, false).unwrap()),
            ((1000, 1000), "vmm.share=share1:/src".into())
        );
        let share: Share = ".:/src:ro,uid=1000,gid=5,tag=t".parse().unwrap();
        assert_eq!(
            (share.owner(), share.order(0, false).unwrap()),
            ((1000, 5), "vmm.share=t:/src:ro".into())
        );
        assert_eq!(share.order(0, true).unwrap(), "vmm.share=t:/src:file:ro");
        let names =
            ["/a/b:/etc/hosts", "/a/b", "/a/b/", "/"].map(|text| text.parse::<Share>().unwrap().name());
        assert_eq!(names, [Some(c"hosts".to_owned()), Some(c"b".to_owned()), Some(c"b".to_owned()), None]);
        let share: Share = "vhost-user=/run/fs,to=/src,tag=t".parse().unwrap();
        assert_eq!(share.from, ShareFrom::VhostUser("/run/fs".into()));
        assert_eq!(serde_json::from_str::<Share>(&serde_json::to_string(&share).unwrap()).unwrap(), share);
        for wrong in
            ["vhost-user=/s,path=/a", "to=/src", "vhost-user=/s,readonly", "vhost-user=/s,cache=never"]
        {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        for wrong in ["", ":/src", ".:/src,tag=", ".,cache=some", ".,uid=-1", ".,uid=x", ".:/src,readnoly"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn shares_that_cannot_be_mounted_are_refused() {
        let long = format!(".,tag={}", "t".repeat(37));
        for (texts, word) in [
            (vec![".:/a", "b:/a"], "its own place"),
            (vec![".:/a,tag=t", "b:/b,tag=t"], "tag=src"),
            (vec![".,tag=share1", "b"], "tag=src"),
            (vec!["path=.,to=src"], ".:/src"),
            (vec![".:/"], ".:/src"),
            (vec![".:/a b"], ".:/src"),
            (vec![".:/a\"b"], ".:/src"),
            (vec![".,tag=a:b"], "tag=src"),
            (vec![&*long], "tag=src"),
        ] {
            let share = texts.iter().map(|text| text.parse().unwrap()).collect();
            let error = VmConfig { share, ..VmConfig::default() }.validate().unwrap_err();
            assert!(error.hint.contains(word), "{texts:?}: {error:?}");
        }
    }
}
