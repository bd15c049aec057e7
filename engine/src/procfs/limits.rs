//! `/proc/PID/limits`: resource limits without the right to prlimit(2) another user's task.

use super::{ProcDir, number, words};
use crate::error::Result;

/// Soft and hard limit; [`u64::MAX`] is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub cur: u64,
    pub max: u64,
}

/// Number of limits, `RLIM_NLIMITS`.
pub const COUNT: usize = 16;

/// Names as the kernel prints them, in order of `RLIMIT_*`.
const NAMES: [&str; COUNT] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Reads all limits, in order of `RLIMIT_*`.
pub fn read(dir: &ProcDir) -> Result<[Limit; COUNT]> {
    let bytes = dir.read("limits")?;
    parse(&bytes).ok_or_else(|| dir.strange("limits", &bytes))
}

/// Parses the content of the file.
pub fn parse(bytes: &[u8]) -> Option<[Limit; COUNT]> {
    let mut limits = [Limit { cur: 0, max: 0 }; COUNT];
    for (limit, name) in limits.iter_mut().zip(NAMES) {
        let line = bytes.split(|c| *c == b'\n').find_map(|l| l.strip_prefix(name.as_bytes()))?;
        let mut values = words(line);
        let mut next = || match values.next()? {
            b"unlimited" => Some(u64::MAX),
            word => number(word),
        };
        *limit = Limit { cur: next()?, max: next()? };
    }
    Some(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_agrees_with_getrlimit() {
        use nix::sys::resource::{Resource, getrlimit};
        let me = ProcDir::open(crate::pstree::RealPid(std::process::id() as i32)).unwrap();
        let limits = read(&me).unwrap();
        for (resource, at) in
            [(Resource::RLIMIT_NOFILE, 7), (Resource::RLIMIT_STACK, 3), (Resource::RLIMIT_SIGPENDING, 11)]
        {
            let (cur, max) = getrlimit(resource).unwrap();
            assert_eq!(limits[at], Limit { cur, max });
        }
    }

    #[test]
    fn a_missing_limit_is_refused() {
        assert_eq!(
            parse(b"Limit  Soft Limit  Hard Limit  Units\nMax cpu time  unlimited unlimited seconds\n"),
            None
        );
    }
}
