//! `/proc/PID/cgroup`: the group a task is in, per hierarchy.

use super::{ProcDir, number};
use crate::{error::Result, pstree::RealPid};

/// Membership in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    /// 0 for the unified hierarchy.
    pub hierarchy: u32,
    /// `cpu,cpuacct`, `name=systemd`; empty for the unified hierarchy.
    pub controllers: String,
    /// Path below the root of our cgroup namespace; any bytes.
    pub path: Vec<u8>,
}

/// Memberships of the task or thread.
pub fn read(dir: &ProcDir) -> Result<Vec<Member>> {
    let bytes = content(dir, "cgroup")?;
    parse(&bytes).ok_or_else(|| dir.strange("cgroup", &bytes))
}

/// The content of the file of thread `tid` of the task, to be parsed; empty without control groups.
pub fn read_thread(dir: &ProcDir, tid: RealPid) -> Result<Vec<u8>> {
    content(dir, &format!("task/{tid}/cgroup"))
}

fn content(dir: &ProcDir, name: &str) -> Result<Vec<u8>> {
    match dir.read(name) {
        // A kernel without control groups.
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
        other => other,
    }
}

/// Parses the content of the file.
pub fn parse(bytes: &[u8]) -> Option<Vec<Member>> {
    bytes
        .split(|c| *c == b'\n')
        .filter(|l| !l.is_empty())
        .map(|line| {
            let mut fields = line.splitn(3, |c| *c == b':');
            Some(Member {
                hierarchy: number(fields.next()?)?,
                controllers: String::from_utf8(fields.next()?.to_vec()).ok()?,
                path: fields.next()?.to_vec(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_at_the_first_two_colons() {
        let members = parse(b"5:cpu,cpuacct:/a:b c\n1:name=systemd:/\n0::/x\n").unwrap();
        assert_eq!(members.len(), 3);
        assert_eq!((members[0].hierarchy, members[0].controllers.as_str()), (5, "cpu,cpuacct"));
        assert_eq!(members[0].path, b"/a:b c");
        assert_eq!((members[2].controllers.as_str(), members[2].path.as_slice()), ("", &b"/x"[..]));
        assert_eq!(parse(b"nonsense\n"), None);
    }
}
