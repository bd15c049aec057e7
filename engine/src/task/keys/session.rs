//! Session keyrings: one for each service of systemd, for each login.
//!
//! A task joins one at its birth, and those it forks have it from there. Tasks that share one although none of them has it
//! from the other each get a keyring of their own with the same keys. Serial numbers and names are given anew.

use std::ffi::CString;

use nix::unistd::{Gid, Uid, getgid, getuid, setfsgid, setfsuid, setresgid, setresuid};
use rcriu_images::pb;

use super::{ANSWER, KEYCTL_DESCRIBE, KEYCTL_READ, is_everybodys};
use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::words,
    sys::keyctl,
};

/// What a keyring is.
#[derive(Debug, PartialEq)]
pub(super) enum Read {
    Session(pb::RcriuSession),
    /// Whoever asks for a session and has none gets it.
    Everybodys,
    /// With a key that cannot be kept: its description.
    Lost(String),
}

/// `user;0;0;3f010000;name`, as keyctl(2) describes keys.
struct Description<'a> {
    kind: &'a [u8],
    uid: u32,
    gid: u32,
    perm: u32,
    name: &'a [u8],
}

impl<'a> Description<'a> {
    fn parse(text: &'a [u8]) -> Result<Self> {
        let text = text.strip_suffix(b"\0").unwrap_or(text);
        let mut fields = text.splitn(5, |c| *c == b';');
        let mut next = || fields.next().and_then(|field| std::str::from_utf8(field).ok());
        let found = (|| {
            let (kind, uid, gid) = (next()?, next()?.parse().ok()?, next()?.parse().ok()?);
            let perm = u32::from_str_radix(next()?, 16).ok()?;
            Some((kind, uid, gid, perm))
        })();
        let (kind, uid, gid, perm) =
            found.ok_or_else(|| Error::host(format!("keyctl describes a key as {}", text.escape_ascii())))?;
        let name = text.splitn(5, |c| *c == b';').nth(4).unwrap_or_default();
        Ok(Description { kind: kind.as_bytes(), uid, gid, perm, name })
    }

    fn text(&self) -> String {
        format!("\"{}\" of type {}", self.name.escape_ascii(), self.kind.escape_ascii())
    }
}

/// Reads a session keyring. `ask` performs a keyctl(2) operation that stores an answer, `expires` says of a key whether
/// its time is limited.
pub(super) fn read(
    serial: i64,
    ask: impl Fn(u64, i64) -> Result<Option<Vec<u8>>>,
    expires: impl Fn(i64) -> bool,
) -> Result<Read> {
    let Some(text) = ask(KEYCTL_DESCRIBE, serial)? else { return Ok(Read::Everybodys) };
    let ring = Description::parse(&text)?;
    if is_everybodys(ring.name) {
        return Ok(Read::Everybodys);
    }
    let mut session = pb::RcriuSession {
        serial: serial as u32,
        uid: ring.uid,
        gid: ring.gid,
        perm: ring.perm,
        users: None,
        key: Vec::new(),
    };
    let content = ask(KEYCTL_READ, serial)?.unwrap_or_default();
    for key in content.as_chunks::<4>().0 {
        let number = i32::from_ne_bytes(*key).into();
        // Keys that are revoked or expired have no description.
        let Some(text) = ask(KEYCTL_DESCRIBE, number)? else { continue };
        let key = Description::parse(&text)?;
        match key.kind {
            b"keyring" if key.name == format!("_uid.{}", ring.uid).as_bytes() => session.users = Some(true),
            b"user" if !expires(number) => match ask(KEYCTL_READ, number)? {
                Some(payload) if payload.len() < ANSWER => session.key.push(pb::RcriuKey {
                    name: key.name.to_vec(),
                    payload,
                    uid: key.uid,
                    gid: key.gid,
                    perm: key.perm,
                }),
                _ => return Ok(Read::Lost(key.text())),
            },
            _ => return Ok(Read::Lost(key.text())),
        }
    }
    Ok(Read::Session(session))
}

/// Whether a line of /proc/keys says that the time of a key is limited:
/// `3d01e0ae I--Q---     1   3d 3f010000     0     0 user      name: 1`
pub(super) fn expires(keys: &[u8], key: i64) -> bool {
    keys.split(|c| *c == b'\n').any(|line| {
        let mut fields = words(line);
        let serial = fields.next().and_then(|text| std::str::from_utf8(text).ok());
        serial.and_then(|text| u32::from_str_radix(text, 16).ok()).map(i64::from) == Some(key)
            && fields.nth(2).is_some_and(|time| time != b"perm")
    })
}

/// Puts this process, born in the session `born`, into that of its image; which it is in then. To be called before it
/// forks, as root of its namespace.
///
/// # Errors
/// More keys than users may have.
pub fn enter(session: Option<&pb::RcriuSession>, born: Option<u32>) -> Result<Option<u32>> {
    let Some(session) = session.filter(|session| Some(session.serial) != born) else { return Ok(born) };
    match join(session).during(|| "session keyring".into()) {
        // Where a filter of system calls, or a limit, lets nobody have keys.
        Err(e) if session.key.is_empty() => {
            log::warn!("The task stays in the session keyring it is restored in: {e}");
            Ok(born)
        }
        other => other.map(|()| Some(session.serial)),
    }
}

/// Makes the keyring and fills it.
fn join(session: &pb::RcriuSession) -> Result<()> {
    if session.uid == u32::MAX || session.gid == u32::MAX {
        return Err(Error::image("rcriu-tasks.img: a keyring of nobody"));
    }
    // Of a keyring the real user and group are the owners, whom nobody but root may change later.
    let (ours, owner) = ((getuid(), getgid()), (Uid::from_raw(session.uid), Gid::from_raw(session.gid)));
    if owner != ours {
        set_real(owner)?;
    }
    let ring = keyctl::new_session();
    let linked = ring.and_then(|ring| {
        if session.users() {
            keyctl::link_users()?;
        }
        Ok(ring)
    });
    if owner != ours {
        set_real(ours)?;
    }
    let ring = linked?;
    for key in &session.key {
        let name = CString::new(key.name.clone())
            .map_err(|_| Error::image("rcriu-tasks.img: a key with a zero byte in its name"))?;
        add(key, &name).during(|| format!("key {name:?}"))?;
    }
    // Last: it may forbid adding.
    as_owner(owner, || keyctl::set_perm(ring, session.perm))
}

/// Sets the real user and group alone.
fn set_real((user, group): (Uid, Gid)) -> Result<()> {
    let (same_user, same_group) = (Uid::from_raw(u32::MAX), Gid::from_raw(u32::MAX));
    setresgid(group, same_group, same_group).call("setresgid")?;
    setresuid(user, same_user, same_user).call("setresuid")
}

fn add(key: &pb::RcriuKey, name: &std::ffi::CStr) -> Result<()> {
    as_owner((Uid::from_raw(key.uid), Gid::from_raw(key.gid)), || {
        keyctl::add(name, &key.payload).and_then(|serial| keyctl::set_perm(serial, key.perm))
    })
}

/// Does something as the owner of a key: root of a user namespace has no rights to keys of others.
fn as_owner(owner: (Uid, Gid), act: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = (setfsuid(owner.0), setfsgid(owner.1));
    let done = act();
    setfsgid(before.1);
    setfsuid(before.0);
    if before != owner {
        // That has made our files in /proc root's.
        nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)")?;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    type Answer = Result<Option<Vec<u8>>>;

    fn ring(content: &'static [i32]) -> impl Fn(u64, i64) -> Answer {
        move |operation, key| {
            Ok(match (operation, key) {
                (KEYCTL_READ, 1) => Some(content.iter().flat_map(|k| k.to_ne_bytes()).collect()),
                (KEYCTL_READ, 3) => Some(b"secret".to_vec()),
                (KEYCTL_READ, 6) => Some(vec![0; ANSWER + 1]),
                (_, 1) => Some(b"keyring;7;8;3f030000;_ses\0".to_vec()),
                (_, 2) => Some(b"keyring;7;65534;1f3f0000;_uid.7\0".to_vec()),
                (_, 3) => Some(b"user;0;1;b030000;invocation_id\0".to_vec()),
                (_, 4) => Some(b"logon;0;0;3f010000;a;b\0".to_vec()),
                (_, 5) => Some(b"keyring;7;65534;1f3f0000;_uid_ses.7\0".to_vec()),
                (_, 6) => Some(b"user;0;1;b030000;large\0".to_vec()),
                _ => None,
            })
        }
    }

    #[test]
    fn sessions_are_read_with_their_keys() {
        let read = |content| read(1, ring(content), |_| false).unwrap();
        let Read::Session(session) = read(&[2, 3, 9]) else { panic!("no session") };
        assert_eq!((session.uid, session.gid, session.perm, session.users), (7, 8, 0x3f03_0000, Some(true)));
        let [key] = session.key.as_slice() else { panic!("{session:?}") };
        assert_eq!((&key.name[..], &key.payload[..]), (&b"invocation_id"[..], &b"secret"[..]));
        assert_eq!((key.uid, key.gid, key.perm), (0, 1, 0x0b03_0000));
        assert_eq!(read(&[4]), Read::Lost("\"a;b\" of type logon".into()));
        assert_eq!(read(&[6]), Read::Lost("\"large\" of type user".into()));
        assert_eq!(super::read(5, ring(&[]), |_| false).unwrap(), Read::Everybodys);
        assert_eq!(
            super::read(1, ring(&[3]), |key| key == 3).unwrap(),
            Read::Lost("\"invocation_id\" of type user".into())
        );
    }

    #[test]
    fn time_limits_are_seen() {
        let keys = b"00000abc I--Q---     1   3d 3f010000     0     0 user      name: 1\n\
            00000abd I--Q---     1 perm 3f010000     0     0 user      name: 1\n";
        assert!(expires(keys, 0xabc));
        assert!(!expires(keys, 0xabd) && !expires(keys, 1));
    }
}
