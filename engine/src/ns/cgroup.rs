//! The cgroup namespace: below which group of each hierarchy its tasks believe to be at the top (cgroup_namespaces(7)).
//!
//! There is no image of its own. Members of sets in `cgroup.img` have the whole path as seen from outside, and
//! `cgns_prefix`, how many bytes of it the namespace hides:
//!
//! ```text
//! seen outside   /machine/c1/init
//! seen inside               /init
//! cgns_prefix 11 /machine/c1          entered before unshare(CLONE_NEWCGROUP), the rest after
//! ```
//! A namespace made at the top of a hierarchy, or none, hides nothing: then there is no prefix.

use nix::sched::CloneFlags;

use crate::{
    error::{Error, Result},
    procfs::{
        ProcDir,
        cgroup::{self, Member},
        excerpt,
    },
    pstree::RealPid,
};

/// Memberships of task `pid` as it sees them itself. World: Dump.
///
/// # Errors
/// The namespace cannot be entered.
pub fn seen_inside(pid: RealPid) -> Result<Vec<Member>> {
    super::enter::inside(pid, CloneFlags::CLONE_NEWCGROUP, || cgroup::read(&ProcDir::open(pid)?))
}

/// Bytes of the path `outside` that a task does not see who sees `inside`; 0 if it sees all.
///
/// # Errors
/// The task has left the group at which its namespace begins: it sees a path that leads upwards.
pub fn prefix(outside: &[u8], inside: &[u8]) -> Result<usize> {
    if outside == inside {
        return Ok(0);
    }
    // The top of its namespace is written as if it were the root.
    let seen = if inside == b"/" { &b""[..] } else { inside };
    let hidden = outside.strip_suffix(seen).filter(|hidden| hidden.first() == Some(&b'/'));
    let upwards = seen == b"/.." || seen.starts_with(b"/../");
    match hidden {
        Some(hidden) if !upwards && (seen.is_empty() || seen.first() == Some(&b'/')) => Ok(hidden.len()),
        _ => Err(Error::unsupported(format!(
            "it is in control group {}, outside of its cgroup namespace, where that is {}",
            excerpt(outside),
            excerpt(inside)
        ))
        .remedy("move it below the group in which the namespace was made")),
    }
}

/// For each of a task's memberships as seen from `outside`, in the same order, the bytes hidden from it, from what it
/// sees `inside`.
///
/// # Errors
/// As those of [`prefix`]; a hierarchy that is seen from one side only.
pub fn prefixes(outside: &[Member], inside: &[Member]) -> Result<Vec<usize>> {
    let seen = |member: &Member| inside.iter().find(|i| i.controllers == member.controllers);
    outside
        .iter()
        .map(|member| match seen(member) {
            Some(inside) => prefix(&member.path, &inside.path),
            None => Err(Error::host(format!(
                "cgroup hierarchy '{}' is not seen from inside of a cgroup namespace",
                member.controllers
            ))),
        })
        .collect()
}

/// The part of a path that a namespace hides, and what is seen of it, from `cgns_prefix` of an image.
///
/// # Errors
/// A prefix that does not end where a name ends.
pub fn split(path: &[u8], prefix: u32) -> Result<(&[u8], &[u8])> {
    let at = prefix as usize;
    let fits = matches!(path.get(at), None | Some(b'/'));
    path.split_at_checked(at).filter(|_| fits && path.first() == Some(&b'/')).ok_or_else(|| {
        Error::image(format!("cgroup.img: {prefix} bytes are no part of the path {}", excerpt(path)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_what_differs() {
        for (outside, inside, hidden) in [
            ("/a/b", "/a/b", 0),
            ("/", "/", 0),
            ("/a/b", "/b", 2),
            ("/a/b", "/", 4),
            ("/b/b", "/b", 2),
            ("/machine/c1/init", "/init", 11),
        ] {
            let found = prefix(outside.as_bytes(), inside.as_bytes()).unwrap();
            assert_eq!(found, hidden, "{outside} {inside}");
            let (top, rest) = split(outside.as_bytes(), found as u32).unwrap();
            assert_eq!(top.len(), hidden);
            assert!(rest == inside.as_bytes() || inside == "/" && rest.is_empty());
        }
        for (outside, inside) in
            [("/a", "/../a"), ("/a/b", "/c"), ("/a", "/b/a"), ("/x/../y", "/../y"), ("/ab", "b")]
        {
            let said = prefix(outside.as_bytes(), inside.as_bytes()).unwrap_err().to_string();
            assert!(said.contains(outside) && said.contains("outside of its cgroup namespace"), "{said}");
        }
    }

    #[test]
    fn images_split_at_names_only() {
        for bad in [1, 4, 9, u32::MAX] {
            assert!(split(b"/aa/b", bad).is_err(), "{bad}");
        }
        assert_eq!(split(b"/aa/b", 3).unwrap(), (&b"/aa"[..], &b"/b"[..]));
        assert!(split(b"aa", 0).is_err());
        assert_eq!(split(b"/aa", 3).unwrap(), (&b"/aa"[..], &b""[..]));
    }

    #[test]
    fn hierarchies_are_matched_by_their_controllers() {
        let member = |controllers: &str, path: &str| Member {
            hierarchy: 1,
            controllers: controllers.into(),
            path: path.into(),
        };
        let outside = [member("cpu", "/x/y"), member("", "/z")];
        assert_eq!(prefixes(&outside, &[member("", "/"), member("cpu", "/y")]).unwrap(), [2, 2]);
        assert!(prefixes(&outside, &[member("cpu", "/y")]).unwrap_err().to_string().contains("hierarchy ''"));
    }

    #[test]
    fn this_process_hides_nothing_from_itself() {
        let me = RealPid(std::process::id().cast_signed());
        match seen_inside(me) {
            Ok(inside) => {
                let outside = cgroup::read(&ProcDir::open(me).unwrap()).unwrap();
                assert!(prefixes(&outside, &inside).unwrap().iter().all(|n| *n == 0));
            }
            Err(e) => eprintln!("skipped: {e}"),
        }
    }
}
