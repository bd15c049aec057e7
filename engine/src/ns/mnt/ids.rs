//! Owners in a user namespace: images have them as the tree sees them.

use crate::{
    error::{Error, Result},
    procfs::{ProcDir, number, words},
    pstree::RealPid,
};

/// `/proc/PID/uid_map` and `gid_map`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct IdMaps {
    /// First id inside, first id outside, how many; `None` if inside and outside are the same.
    users: Option<Vec<[u32; 3]>>,
    groups: Option<Vec<[u32; 3]>>,
}

impl IdMaps {
    /// Maps of the user namespace of task `pid`, as we see it.
    pub(super) fn read(pid: RealPid) -> Result<IdMaps> {
        let dir = ProcDir::open(pid)?;
        let ours = std::fs::read_link("/proc/self/ns/user");
        // Kernels without user namespaces have no link.
        if ours.is_ok_and(|ours| dir.link("ns/user").is_ok_and(|theirs| theirs != ours)) {
            let read = |name| {
                let text = dir.read(name)?;
                parse(&text).ok_or_else(|| dir.strange(name, &text))
            };
            return Ok(IdMaps { users: Some(read("uid_map")?), groups: Some(read("gid_map")?) });
        }
        Ok(IdMaps::default())
    }

    /// They are the same inside and outside.
    pub(super) fn are_plain(&self) -> bool {
        self.users.is_none()
    }

    /// Number inside of our user `id`.
    pub(super) fn user(&self, id: u32) -> Result<u32> {
        inside(self.users.as_deref(), id, "user")
    }

    /// Number inside of our group `id`.
    pub(super) fn group(&self, id: u32) -> Result<u32> {
        inside(self.groups.as_deref(), id, "group")
    }
}

fn parse(text: &[u8]) -> Option<Vec<[u32; 3]>> {
    let line = |line: &[u8]| {
        let mut fields = words(line).map(number::<u32>);
        Some([fields.next()??, fields.next()??, fields.next()??])
    };
    text.split(|c| *c == b'\n').filter(|l| !l.is_empty()).map(line).collect()
}

fn inside(map: Option<&[[u32; 3]]>, id: u32, kind: &str) -> Result<u32> {
    let Some(map) = map else { return Ok(id) };
    let found = map.iter().find_map(|[first, outside, count]| {
        id.checked_sub(*outside).filter(|at| at < count).and_then(|at| first.checked_add(at))
    });
    found.ok_or_else(|| Error::unsupported(format!("{kind} {id} does not exist in its user namespace")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_inside() {
        let map = parse(b"         0     100000      65536\n     70000          5          1\n").unwrap();
        let maps = IdMaps { users: Some(map), groups: None };
        assert_eq!(
            (maps.user(100_007).unwrap(), maps.user(5).unwrap(), maps.group(5).unwrap()),
            (7, 70_000, 5)
        );
        assert!(maps.user(165_536).is_err() && maps.user(0).is_err());
        assert!(parse(b"1 2\n").is_none());
        assert!(IdMaps::read(RealPid(std::process::id().cast_signed())).unwrap().are_plain());
    }
}
