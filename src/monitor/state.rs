//! Guest-visible state as plain values: what a part of the machine saves and takes back.
//!
//! A part implements [`Stateful`] with a value of its own; the blanket impl of [`Saved`] erases it to
//! bytes in one place, so that snapshot code never names a device. Knows nothing of files or formats.

use serde::{Serialize, de::DeserializeOwned};

/// Why saved state could not be taken back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The bytes do not decode to the part's state type.
    #[error("decode saved state")]
    Decode(#[source] postcard::Error),
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
        // postcard fails only on a sequence of unknown length or a custom Serialize error: neither is
        // possible for the plain structs that states are, so this is a bug in a device, not input.
        postcard::to_stdvec(&self.save()).expect("a plain state value serializes")
    }

    fn restore_bytes(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.restore(postcard::from_bytes(bytes).map_err(StateError::Decode)?)
    }
}
