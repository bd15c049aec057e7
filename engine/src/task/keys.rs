//! Keys that a thread has for itself: in its own keyring, its process's, or a session keyring other than the one
//! the dump runs in. Keys cannot be read out in general, so a dump refuses them; empty keyrings, and those that
//! hold only what every session has, are no loss.
//!
//! A session keyring comes back ([`session`]), with keys of type user, which is all that those of services have: what
//! was in a session of its own must not be in that of whoever restores it, whose keys it could use.
//!
//! A thread without a session keyring gets its user's when it is asked for it. So that a dump changes nothing, it
//! is asked only if /proc/keys shows that there is such a keyring at all.

use std::collections::{HashMap, HashSet};

use nix::unistd::{Uid, setfsuid};
use parasite::thread::ThreadInfo;
use rcriu_images::pb;

use self::session::Read;
use crate::{
    error::{Error, Result},
    infect::{Infected, StoppedThread},
    procfs::{status::Status, words},
    sys::keyctl,
};

pub mod session;

const KEYCTL_DESCRIBE: u64 = 6;
const KEYCTL_READ: u64 = 11;
/// Bytes asked for at a time.
const ANSWER: usize = 8 << 10;

/// What is known about keyrings so far.
#[derive(Debug, Default)]
pub struct Keys {
    own_session: Option<i64>,
    /// Whether a user has a keyring of a session, as far as /proc/keys tells.
    sessions: HashMap<u32, bool>,
    /// Keyrings that were looked at.
    harmless: HashSet<i64>,
    /// Sessions that were read, by serial number.
    read: HashMap<i64, Option<pb::RcriuSession>>,
}

impl Keys {
    /// Asks for the keyring of our own session, which restored tasks will have.
    pub fn new() -> Keys {
        Keys { own_session: keyctl::own_session(), ..Keys::default() }
    }

    /// Whether the thread is to be asked for its session's keyring.
    pub fn may_have_session(&mut self, status: &Status) -> bool {
        // Owned by its user, or by root, who made the session.
        [0, status.uid[0], status.uid[3]].into_iter().any(|uid| {
            *self.sessions.entry(uid).or_insert_with(|| match visible_to(uid) {
                Ok(keys) => has_session(&keys),
                // A kernel without the file: then there is no other way.
                Err(_) => true,
            })
        })
    }

    /// Refuses keys that would be lost. Returns the session that the thread is in, if it is not ours.
    pub fn check(
        &mut self,
        infected: &Infected<'_>,
        thread: &StoppedThread,
        info: &ThreadInfo,
    ) -> Result<Option<pb::RcriuSession>> {
        let ask = |operation, key: i64| ask(infected, thread, operation, key);
        let own = info.keyrings.into_iter().zip(["own", "process"]);
        for (serial, whose) in own.filter(|(serial, _)| *serial > 0) {
            if Some(serial) == self.own_session || !self.harmless.insert(serial) {
                continue;
            }
            if let Some(description) = first_key(serial, ask)? {
                return Err(refusal(thread, &description, whose, serial));
            }
        }
        let serial = info.keyrings[2];
        if serial <= 0 || Some(serial) == self.own_session {
            return Ok(None);
        }
        if let Some(known) = self.read.get(&serial) {
            return Ok(known.clone());
        }
        let expires = |key: i64| {
            let mut users = [0, nix::unistd::geteuid().as_raw()].into_iter();
            users.any(|uid| visible_to(uid).is_ok_and(|keys| session::expires(&keys, key)))
        };
        let session = match session::read(serial, ask, expires)? {
            Read::Session(session) => Some(session),
            Read::Everybodys => None,
            Read::Lost(description) => return Err(refusal(thread, &description, "session", serial)),
        };
        self.read.insert(serial, session.clone());
        Ok(session)
    }
}

fn refusal(thread: &StoppedThread, key: &str, whose: &str, keyring: i64) -> Error {
    let tid = thread.tid();
    Error::unsupported(format!(
        "thread {tid} has the key {key} in its {whose} keyring, and such keys cannot be saved"
    ))
    .remedy(format!("unlink it for the time of the dump: keyctl unlink KEY {keyring}"))
}

/// The lines of /proc/keys that a user sees.
fn visible_to(uid: u32) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let before = setfsuid(Uid::from_raw(uid));
    // Who opens it counts.
    let file = std::fs::File::open("/proc/keys");
    setfsuid(before);
    let mut lines = Vec::new();
    file?.read_to_end(&mut lines)?;
    Ok(lines)
}

/// `3d01e0ae I--Q---     1 perm 3f030000     0     0 keyring   _ses: 1`
fn has_session(keys: &[u8]) -> bool {
    keys.split(|c| *c == b'\n').any(|line| {
        let mut fields = words(line).skip(7);
        fields.next() == Some(b"keyring") && fields.next().is_some_and(|name| !is_everybodys(name))
    })
}

/// Names of keyrings that the kernel gives every user, or has for itself.
fn is_everybodys(name: &[u8]) -> bool {
    [&b"_uid."[..], b"_uid_ses.", b"_persistent.", b"."].iter().any(|prefix| name.starts_with(prefix))
}

/// Description of the first key in a keyring that is worth anything. `ask` performs a keyctl(2) operation that
/// stores an answer.
fn first_key(keyring: i64, ask: impl Fn(u64, i64) -> Result<Option<Vec<u8>>>) -> Result<Option<String>> {
    let everybodys = |text: &[u8]| {
        let mut fields = text.splitn(5, |c| *c == b';');
        let (kind, name) = (fields.next(), fields.nth(3).unwrap_or_default());
        kind == Some(b"keyring") && is_everybodys(name)
    };
    if ask(KEYCTL_DESCRIBE, keyring)?.is_none_or(|text| everybodys(&text)) {
        return Ok(None);
    }
    let Some(content) = ask(KEYCTL_READ, keyring)? else { return Ok(None) };
    for key in content.as_chunks::<4>().0 {
        // Keys that are revoked or expired have no description.
        if let Some(text) = ask(KEYCTL_DESCRIBE, i32::from_ne_bytes(*key).into())?
            && !everybodys(&text)
        {
            let mut fields = text.splitn(5, |c| *c == b';');
            let (kind, name) = (fields.next().unwrap_or_default(), fields.nth(3).unwrap_or_default());
            let name = name.strip_suffix(b"\0").unwrap_or(name);
            return Ok(Some(format!("\"{}\" of type {}", name.escape_ascii(), kind.escape_ascii())));
        }
    }
    Ok(None)
}

/// keyctl(2) in the thread; `None` for keys that are gone, or none of its own.
fn ask(infected: &Infected<'_>, thread: &StoppedThread, operation: u64, key: i64) -> Result<Option<Vec<u8>>> {
    let args = [operation, key.cast_unsigned(), infected.data_address(), ANSWER as u64, 0];
    match infected.syscall_in(thread, "keyctl", libc::SYS_keyctl as u64, args, &[]) {
        Ok(len) => infected.data((len as usize).min(ANSWER)).map(Some),
        Err(e) => match e.errno() {
            Some(libc::ENOKEY | libc::EKEYEXPIRED | libc::EKEYREVOKED | libc::EACCES) => Ok(None),
            _ => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyrings_of_sessions_are_seen() {
        let users = b"0b0b8bb4 I--Q---     2 perm 1f3f0000     0 65534 keyring   _uid.0: empty\n\
            0c0b8bb4 I------     1 perm 1f0b0000     0     0 keyring   .builtin_trusted_keys: 2\n\
            1a2b3c4d I------     1 perm 3f030000     0     0 user      _ses: 12\n";
        assert!(!has_session(users));
        let session = b"3d01e0ae I--Q---     1 perm 3f030000     0     0 keyring   _ses.ab: 1\n";
        assert!(has_session(&[&users[..], session].concat()));
    }

    #[test]
    fn only_keys_of_worth_are_named() {
        let ring = |content: &'static [i32]| {
            move |operation, key: i64| {
                Ok(match (operation, key) {
                    (KEYCTL_READ, 1) => Some(content.iter().flat_map(|k| k.to_ne_bytes()).collect()),
                    (_, 1) => Some(b"keyring;0;0;3f030000;_ses\0".to_vec()),
                    (_, 2) => Some(b"keyring;0;65534;1f3f0000;_uid.0\0".to_vec()),
                    (_, 3) => Some(b"user;0;0;3f010000;a;b\0".to_vec()),
                    _ => None,
                })
            }
        };
        assert_eq!(first_key(1, ring(&[])).unwrap(), None);
        assert_eq!(first_key(1, ring(&[2, 9])).unwrap(), None);
        assert_eq!(first_key(2, ring(&[3])).unwrap(), None);
        assert_eq!(first_key(1, ring(&[2, 3])).unwrap().unwrap(), "\"a;b\" of type user");
    }
}
