//! A network device's address, where the configuration names none: a locally administered one.

use rustix::rand::{GetRandomFlags, getrandom};

/// The address of the `index`th network device of the machine called `name`: always the same, so that a guest keeps its name for the
/// device, and a network its address for the guest. A machine without a name gets a random one.
pub fn generated(name: Option<&str>, index: usize) -> [u8; 6] {
    let mut bytes = [0; 8];
    match name {
        Some(name) => bytes = hash(format!("{name}/{index}").as_bytes()).to_le_bytes(),
        // Where the host has no random bytes so early, the address is one that it may have given before.
        None => drop(getrandom(&mut bytes, GetRandomFlags::NONBLOCK)),
    }
    let [a, b, c, d, e, f, ..] = bytes;
    // Not a group's, and not a manufacturer's (IEEE 802, section 8.2).
    [a & 0xfc | 2, b, c, d, e, f]
}

/// FNV-1a, of 64 bits, and a last round that has every byte of the name in every byte of the result.
pub fn hash(bytes: &[u8]) -> u64 {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    (hash ^ hash >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_names_own_and_the_devices() {
        let all = [("web", 0), ("web", 1), ("web2", 0), ("", 0)].map(|(name, i)| generated(Some(name), i));
        assert_eq!(generated(Some("web"), 0), all[0]);
        let random = [generated(None, 0), generated(None, 0)];
        let all = [&all[..], &random].concat();
        for (at, mac) in all.iter().enumerate() {
            assert_eq!(mac[0] & 3, 2, "{mac:x?}");
            assert!(!all[..at].contains(mac), "{all:x?}");
        }
    }
}
