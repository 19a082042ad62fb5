//! Users and groups by the guest's /etc/passwd and /etc/group, read by ourselves: a static program has no NSS.

use std::fs;

use rustix::fs::{Gid, Uid};

/// As whom a command runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: Vec<u8>,
    pub uid: Uid,
    pub gid: Gid,
    /// Supplementary groups.
    pub groups: Vec<Gid>,
    pub home: Vec<u8>,
    pub shell: Vec<u8>,
}

/// The user databases' content.
pub struct Database {
    pub passwd: Vec<u8>,
    pub group: Vec<u8>,
}

impl Database {
    /// As the guest has it now; nothing where it has none.
    pub fn of_guest() -> Self {
        let read = |path| fs::read(path).unwrap_or_default();
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    /// The user that `text` says, `USER[:GROUP]`; `own` if it is empty. Numbers need not be in the databases.
    ///
    /// # Errors
    /// In words, who there is not.
    pub fn find(&self, text: &[u8], own: Uid) -> Result<User, String> {
        let (user, group) = match text.iter().position(|byte| *byte == b':') {
            Some(at) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        let known = match user {
            b"" => self.users().find(|known| known.uid == own),
            _ => self.users().find(|known| known.name == user),
        };
        let number = if user.is_empty() { Some(own.as_raw()) } else { number(user) };
        let known = known.or_else(|| self.users().find(|known| Some(known.uid.as_raw()) == number));
        let mut found = match (known, number) {
            (Some(known), _) => known,
            (None, Some(uid)) => User {
                name: uid.to_string().into_bytes(),
                uid: Uid::from_raw(uid),
                gid: Gid::from_raw(0),
                groups: Vec::new(),
                home: b"/".to_vec(),
                shell: b"/bin/sh".to_vec(),
            },
            (None, None) => return Err(format!("the guest has no user {}", user.escape_ascii())),
        };
        match group {
            // As docker has it: who says a group gets that group alone.
            Some(group) => {
                found.gid = self
                    .group(group)
                    .ok_or_else(|| format!("the guest has no group {}", group.escape_ascii()))?;
                found.groups = vec![found.gid];
            }
            None => found.groups = self.groups_of(&found),
        }
        Ok(found)
    }

    fn users(&self) -> impl Iterator<Item = User> + '_ {
        lines(&self.passwd).filter_map(|fields| {
            let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
            let or = |text: &[u8], other: &[u8]| if text.is_empty() { other } else { text }.to_vec();
            Some(User {
                name: name.to_vec(),
                uid: Uid::from_raw(number(uid)?),
                gid: Gid::from_raw(number(gid)?),
                groups: Vec::new(),
                home: or(home, b"/"),
                shell: or(shell, b"/bin/sh"),
            })
        })
    }

    fn group(&self, text: &[u8]) -> Option<Gid> {
        let named = lines(&self.group).find(|fields| fields.first() == Some(&text));
        let named = named.and_then(|fields| number(fields.get(2)?));
        named.or_else(|| number(text)).map(Gid::from_raw)
    }

    fn groups_of(&self, user: &User) -> Vec<Gid> {
        let member = |fields: &[&[u8]]| {
            let [_, _, gid, members] = fields else { return None };
            let is_member = members.split(|byte| *byte == b',').any(|name| name == user.name);
            is_member.then(|| number(gid)).flatten().map(Gid::from_raw)
        };
        let others = lines(&self.group).filter_map(|fields| member(&fields)).filter(|gid| *gid != user.gid);
        std::iter::once(user.gid).chain(others).collect()
    }
}

fn lines(text: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    text.split(|byte| *byte == b'\n').map(|line| line.split(|byte| *byte == b':').collect())
}

/// A user's or group's number. The last one is "nobody asked", which no user has.
fn number(text: &[u8]) -> Option<u32> {
    let digits = text.iter().all(u8::is_ascii_digit) && !text.is_empty();
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok().filter(|number| *number != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        let passwd =
            b"root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1000:,,,:/home/ann:\n7:x:8:9::/:/bin/sh\n";
        let group = b"root:x:0:\nann:x:1000:\nwheel:x:10:ann,bob\naudio:x:29:bob,ann\n";
        let database = Database { passwd: passwd.to_vec(), group: group.to_vec() };
        let user = database.find(text.as_bytes(), Uid::ROOT)?;
        let groups = user.groups.iter().map(|gid| gid.as_raw()).collect();
        Ok((user.uid.as_raw(), user.gid.as_raw(), groups, String::from_utf8(user.home).unwrap()))
    }

    #[test]
    fn names_and_numbers_are_found_with_their_groups() {
        let home = |home: &str| home.to_owned();
        assert_eq!(found(""), Ok((0, 0, vec![0], home("/root"))));
        assert_eq!(found("ann"), Ok((1000, 1000, vec![1000, 10, 29], home("/home/ann"))));
        assert_eq!(found("1000"), found("ann"));
        assert_eq!(found("ann:audio"), Ok((1000, 29, vec![29], home("/home/ann"))));
        assert_eq!(found("4711:12"), Ok((4711, 12, vec![12], home("/"))));
        assert_eq!(found("4711"), Ok((4711, 0, vec![0], home("/"))));
        assert_eq!(found("7"), Ok((8, 9, vec![9], home("/"))), "a name comes before a number");
        assert_eq!(found(":wheel"), Ok((0, 10, vec![10], home("/root"))));
    }

    #[test]
    fn who_there_is_not_is_named() {
        assert!(found("eve").unwrap_err().contains("no user eve"));
        assert!(found("ann:none").unwrap_err().contains("no group none"));
        assert!(found("4294967295").is_err());
        assert!(found("-1").is_err());
    }
}
