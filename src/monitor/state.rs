//! Guest-visible state as plain values: what a part of the machine saves and takes back.
//!
//! A part implements [`Stateful`] with a value of its own; the blanket impl of [`Saved`] erases it to
//! bytes in one place, so that snapshot code never names a device. Knows nothing of files or formats.

use std::ops::RangeInclusive;

use serde::{Serialize, de::DeserializeOwned};

/// Why saved state could not be taken back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The bytes do not decode to the part's state type.
    #[error("decode saved state")]
    Decode(#[source] postcard::Error),
    /// The part was saved by a newer vmm, or by one that is too old.
    #[error("it is of version {found}, and this vmm reads {}", versions(*oldest, *newest))]
    Version {
        /// What it is of.
        found: u8,
        /// What can be read: from this one
        oldest: u8,
        /// to this one.
        newest: u8,
    },
    /// The bytes decode, but to a value that the part cannot be in (the text says which).
    #[error("saved state is not possible: {0}")]
    Invalid(String),
}

/// A part of the machine whose guest-visible state is one plain value.
///
/// Caller: the paused machine; nothing else touches the part meanwhile. `restore` is called on a freshly
/// built part of the same configuration, and must refuse (not clamp) a value that it could never have saved,
/// because snapshots come from files that may be damaged or hostile.
pub trait Stateful {
    /// The state: everything that the guest could tell apart, nothing else.
    type State: Serialize + DeserializeOwned;
    /// Of the state's encoding: a change of it is a new one (`tests/cli/state` has what belongs to each).
    const VERSION: u8 = 1;
    /// The first that [`Stateful::older`] reads.
    const OLDEST: u8 = Self::VERSION;
    /// What a part of an earlier `version` was, as the present one has it.
    ///
    /// # Errors
    /// The bytes are none of that version.
    fn older(version: u8, bytes: &[u8]) -> Result<Self::State, StateError> {
        let _ = bytes;
        Err(StateError::Version { found: version, oldest: Self::OLDEST, newest: Self::VERSION })
    }
    /// Copies the state out.
    fn save(&self) -> Self::State;
    /// Takes the state over.
    ///
    /// # Errors
    /// [`StateError::Invalid`] when no run of this part could have produced `state`.
    fn restore(&mut self, state: Self::State) -> Result<(), StateError>;
}

/// A part that remembers nothing which the guest could tell.
pub trait Stateless {}

impl<T: Stateless> Stateful for T {
    type State = ();

    fn save(&self) {}

    fn restore(&mut self, (): ()) -> Result<(), StateError> {
        Ok(())
    }
}

/// [`Stateful`] with the type erased, for lists of unlike parts.
pub trait Saved {
    /// The part's state as bytes.
    fn save_bytes(&self) -> Vec<u8>;
    /// Takes back what [`Saved::save_bytes`] gave.
    ///
    /// # Errors
    /// As [`Stateful::restore`], and when the bytes do not decode.
    fn restore_bytes(&mut self, bytes: &[u8]) -> Result<(), StateError>;
}

impl<T: Stateful> Saved for T {
    fn save_bytes(&self) -> Vec<u8> {
        encode(T::VERSION, &self.save())
    }

    fn restore_bytes(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.restore(decode(bytes, T::OLDEST..=T::VERSION, T::older)?)
    }
}

/// A state as bytes, the first of which is its `version`.
pub fn encode(version: u8, state: &impl Serialize) -> Vec<u8> {
    // postcard fails only on a sequence of unknown length or a custom Serialize error: neither is
    // possible for the plain structs that states are, so this is a bug in a device, not input.
    postcard::to_extend(state, vec![version]).expect("a plain state value serializes")
}

/// What [`encode`] gave, if it is of the last of `versions`; `older` reads the others.
///
/// # Errors
/// [`StateError`]
pub fn decode<T: DeserializeOwned>(
    bytes: &[u8],
    versions: RangeInclusive<u8>,
    older: impl FnOnce(u8, &[u8]) -> Result<T, StateError>,
) -> Result<T, StateError> {
    let cut = StateError::Decode(postcard::Error::DeserializeUnexpectedEnd);
    let (&found, bytes) = bytes.split_first().ok_or(cut)?;
    let (oldest, newest) = versions.into_inner();
    if !(oldest..=newest).contains(&found) {
        return Err(StateError::Version { found, oldest, newest });
    }
    if found < newest {
        return older(found, bytes);
    }
    match postcard::take_from_bytes(bytes).map_err(StateError::Decode)? {
        (state, []) => Ok(state),
        (_, rest) => Err(StateError::Invalid(format!("{} bytes follow it", rest.len()))),
    }
}

/// The versions from `oldest` to `newest`, in words.
fn versions(oldest: u8, newest: u8) -> String {
    if oldest == newest { format!("version {newest}") } else { format!("versions {oldest} to {newest}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was saved in half the bits once.
    struct Wide(u32);

    impl Stateful for Wide {
        type State = u32;
        const VERSION: u8 = 3;
        const OLDEST: u8 = 2;
        fn save(&self) -> u32 {
            self.0
        }
        fn restore(&mut self, state: u32) -> Result<(), StateError> {
            self.0 = state;
            Ok(())
        }
        fn older(_: u8, bytes: &[u8]) -> Result<u32, StateError> {
            postcard::from_bytes::<u16>(bytes).map(u32::from).map_err(StateError::Decode)
        }
    }

    #[test]
    fn an_older_part_is_read_and_a_newer_one_refused_with_the_versions() {
        let mut wide = Wide(300);
        assert_eq!(wide.save_bytes(), [3, 0xac, 2]);
        wide.restore_bytes(&[2, 5]).unwrap();
        assert_eq!(wide.0, 5);
        wide.restore_bytes(&[3, 6]).unwrap();
        for (bytes, why) in [
            (&[4, 5][..], "it is of version 4, and this vmm reads versions 2 to 3"),
            (&[1, 5], "it is of version 1, and this vmm reads versions 2 to 3"),
            (&[3, 5, 0], "saved state is not possible: 1 bytes follow it"),
            (&[3], "decode saved state"),
            (&[], "decode saved state"),
        ] {
            assert_eq!(wide.restore_bytes(bytes).unwrap_err().to_string(), why);
        }
        assert_eq!(wide.0, 6, "it is as it was");
        let newer = StateError::Version { found: 2, oldest: 1, newest: 1 };
        assert_eq!(newer.to_string(), "it is of version 2, and this vmm reads version 1");
    }
}
