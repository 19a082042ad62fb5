//! [`Disk`]: an image, and where what the guest writes goes.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::text::{Size, flag};
use super::{Invalid, host_path};

/// A disk: `path=FILE[,readonly][,overlay[=FILE]][,lower=FILE][,format=raw][,serial=TEXT][,block-size=512|4096]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    /// Raw image file or block device.
    #[serde(with = "host_path")]
    pub path: PathBuf,
    /// Refuse writes.
    #[serde(default, deserialize_with = "flag")]
    pub readonly: bool,
    /// Where writes go, in place of the image. Absent: into it.
    #[serde(default, deserialize_with = "overlay", skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// An overlay that is only read, between the image and what is written: a snapshot's.
    #[serde(default, with = "host_path::optional", skip_serializing_if = "Option::is_none")]
    pub lower: Option<PathBuf>,
    /// What the image is. Absent: a raw one, if nothing in it says otherwise.
    #[serde(default)]
    pub format: Option<ImageFormat>,
    /// What the guest reads as the disk's serial number: at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Logical block size. Absent: 512.
    #[serde(default)]
    pub block_size: Option<Size>,
}

/// A disk image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// Byte for byte what the guest sees, also where that begins like another format: a guest can write what
    /// it likes.
    Raw,
}

/// What a guest writes to a disk whose image stays as it is: `overlay`, in JSON `true`, or `overlay=FILE`, in JSON the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Overlay {
    /// Gone when the run ends.
    Temporary,
    /// In this file, for the next run too.
    Kept(PathBuf),
}

impl Disk {
    /// The image at `path`, to be read and written, with all else as it is unless said.
    pub fn at(path: PathBuf) -> Self {
        Self {
            path,
            readonly: false,
            overlay: None,
            lower: None,
            format: None,
            serial: None,
            block_size: None,
        }
    }

    /// The files that it names.
    pub(super) fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let overlay = match &mut self.overlay {
            Some(Overlay::Kept(path)) => Some(path),
            Some(Overlay::Temporary) | None => None,
        };
        std::iter::once(&mut self.path).chain(overlay).chain(&mut self.lower)
    }

    /// The files that it names, with what they are.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let overlay = match &self.overlay {
            Some(Overlay::Kept(path)) => Some(path),
            Some(Overlay::Temporary) | None => None,
        };
        let over = overlay.into_iter().chain(&self.lower).map(|path| ("overlay", path.as_path()));
        std::iter::once(("disk", self.path.as_path())).chain(over)
    }

    /// Checks what can be checked without opening anything.
    pub(super) fn validate(&self) -> Result<(), Invalid> {
        let invalid = |what: &str, hint: &str| {
            let what = format!("disk {}: {what}", self.path.display());
            Err(Invalid { what, hint: hint.to_owned() })
        };
        if self.serial.as_ref().is_some_and(|s| s.len() > 20 || !s.is_ascii()) {
            return invalid("the serial number is not 1 to 20 ASCII characters", "shorten it: serial=root-1");
        }
        if self.block_size.is_some_and(|s| ![512, 4096].contains(&s.bytes())) {
            return invalid("unsupported block size", "use block-size=512 or block-size=4096");
        }
        match &self.overlay {
            Some(_) if self.readonly => invalid(
                "nothing is written to a disk that is read-only, and an overlay is what is written",
                "drop readonly: with overlay the image stays as it is",
            ),
            None if self.lower.is_some() && !self.readonly => invalid(
                "nothing is written to its lower overlay",
                "say where writes go, overlay or overlay=FILE, or make it readonly",
            ),
            Some(Overlay::Kept(overlay)) if *overlay == self.path || Some(overlay) == self.lower.as_ref() => {
                invalid("a file cannot be its own overlay", "name another file; a new one is made")
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Temporary => f.write_str("overlay"),
            Self::Kept(path) => write!(f, "overlay={}", path.display()),
        }
    }
}

impl Serialize for Overlay {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Temporary => serializer.serialize_bool(true),
            Self::Kept(path) => host_path::serialize_bytes(path.as_os_str().as_bytes(), serializer),
        }
    }
}

fn overlay<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Overlay>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null | Value::Bool(false) => Ok(None),
        Value::Bool(true) => Ok(Some(Overlay::Temporary)),
        value @ (Value::String(_) | Value::Array(_)) => {
            let path = host_path::from_value(value).map_err(de::Error::custom)?;
            Ok(Some(Overlay::Kept(path.into())))
        }
        other => Err(de::Error::custom(format_args!("{other} is neither true nor an overlay's file"))),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::super::{Plug, VmConfig};
    use super::*;

    #[test]
    fn an_overlay_is_a_word_or_a_file_and_reads_back() {
        let kept = |bytes: &[u8]| Some(Overlay::Kept(OsStr::from_bytes(bytes).into()));
        for (text, overlay) in [
            (&b"a.img"[..], None),
            (b"a.img,overlay", Some(Overlay::Temporary)),
            (b"path=a.img,overlay,readonly=off", Some(Overlay::Temporary)),
            (b"a.img,overlay=b,,c", kept(b"b,c")),
            (b"path=a.img,overlay=on,format=raw", kept(b"on")),
            (b"a.img,overlay=\xff", kept(b"\xff")),
            (b"a.img,overlay,lower=\xff", Some(Overlay::Temporary)),
            (b"a.img,readonly,lower=b", None),
        ] {
            let disk: Disk = OsStr::from_bytes(text).try_into().unwrap();
            assert_eq!((disk.overlay.as_ref(), disk.validate()), (overlay.as_ref(), Ok(())), "{text:?}");
            let config = VmConfig { disk: vec![disk], ..VmConfig::default() };
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<VmConfig>(&json).unwrap(), config, "{json}");
        }
        let json = r#"{"disk": [{"path": "a", "overlay": true}, {"path": "a", "overlay": "b"}, {"path": "a", "overlay": false}]}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        let overlays: Vec<_> = config.disk.into_iter().map(|disk| disk.overlay).collect();
        assert_eq!(overlays, [Some(Overlay::Temporary), kept(b"b"), None]);
        for text in ["a,overlay=", "a,overlay,overlay=b"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<VmConfig>(r#"{"disk": [{"path": "a", "overlay": 7}]}"#).is_err());
    }

    #[test]
    fn an_overlay_that_nothing_can_be_written_to_or_that_is_the_image_is_refused() {
        for (text, word) in [
            ("a,overlay,readonly", "drop readonly"),
            ("a,overlay=b,readonly=on", "drop readonly"),
            ("a,overlay=a", "another file"),
            ("a,overlay=b,lower=b", "another file"),
            ("a,lower=b", "where writes go"),
        ] {
            let error = text.parse::<Disk>().unwrap().validate().unwrap_err();
            assert!(error.hint.contains(word), "{error:?}");
        }
    }

    #[test]
    fn both_files_of_a_disk_are_found_from_another_folder() {
        let mut config =
            VmConfig { disk: vec!["a,overlay=b,lower=c".parse().unwrap()], ..VmConfig::default() };
        config.make_absolute();
        let here = std::env::current_dir().unwrap();
        assert_eq!(config.disk[0].path, here.join("a"));
        assert_eq!(config.disk[0].overlay, Some(Overlay::Kept(here.join("b"))));
        let files: Vec<_> = config.disk[0].files().collect();
        let [a, b, c] = ["a", "b", "c"].map(|name| here.join(name));
        assert_eq!(files, [("disk", a.as_path()), ("overlay", &b), ("overlay", &c)]);
        let mut plug = Plug::try_from(OsStr::new("disk=a,overlay=b,lower=c")).unwrap();
        assert_eq!(plug.to_string(), "disk=a,overlay=b");
        plug.make_absolute().unwrap();
        let (Plug::Disk(plugged), [named]) = (plug, &config.disk[..]) else { panic!("no disk") };
        assert_eq!(plugged, *named);
    }
}
