//! Which tasks, and which of their mappings, are worth protecting.

use crate::{
    procfs::{
        ProcDir,
        maps::{Map, VmFlags},
    },
    pstree::RealPid,
};

/// Bytes in small pages from which on protecting is faster than a fork, which takes 25 ms for a gigabyte.
const WORTH_WHILE: u64 = 128 << 20;
/// A mapping with less content than this is read while frozen.
const LARGE: u64 = 1 << 20;
/// How much of that there may be, in bytes.
pub const REST: u64 = 24 << 20;
/// More addresses than this are not protected: the state of each chunk takes 8 bytes.
const ADDRESSES: u64 = 1 << 40;
/// What of a mapping speaks against protecting it.
const UNFIT: u64 = VmFlags::HUGETLB
    | VmFlags::IO
    | VmFlags::PFNMAP
    | VmFlags::MIXED_MAP
    | VmFlags::DROPPABLE
    | VmFlags::SHADOW_STACK
    | VmFlags::GROWS_DOWN
    | VmFlags::MERGEABLE
    | VmFlags::MAYBE_GUARD;
const WATCHED: u64 = VmFlags::UFFD_MISSING | VmFlags::UFFD_WP | VmFlags::UFFD_MINOR;

/// Tasks with so much memory of their own that it may be worth while. One that is not found, or ends, is none.
pub fn large_tasks(root: RealPid) -> Vec<RealPid> {
    let mut large = Vec::new();
    let mut tasks = vec![root];
    while let Some(pid) = tasks.pop() {
        let Ok(dir) = ProcDir::open(pid) else { continue };
        for tid in dir.threads().unwrap_or_default() {
            tasks.extend(dir.children(tid).unwrap_or_default());
        }
        let status = dir.read("status").unwrap_or_default();
        let line = status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"RssAnon:"));
        let kib =
            line.and_then(|l| std::str::from_utf8(l).ok()?.trim().strip_suffix("kB")?.trim().parse().ok());
        if kib.is_some_and(|kib: u64| kib.saturating_mul(1024) >= WORTH_WHILE) {
            large.push(pid);
        }
    }
    large
}

/// The ranges to be protected, `None` if a fork is better or nothing else is possible.
pub fn choose(maps: &[Map]) -> Option<Vec<(u64, u64)>> {
    if maps.iter().any(|m| m.flags.any(WATCHED | VmFlags::HUGETLB)) {
        return None;
    }
    let fit = |m: &&Map| {
        let plain = m.name.is_empty() || m.name == b"[heap]" || m.name.starts_with(b"[anon:");
        !m.shared && m.ino == 0 && m.dev == (0, 0) && plain && !m.flags.any(UNFIT) && m.anonymous >= LARGE
    };
    let chosen: Vec<&Map> = maps.iter().filter(fit).collect();
    let small: u64 = chosen.iter().map(|m| m.anonymous.saturating_sub(m.huge)).sum();
    let rest =
        maps.iter().map(|m| m.anonymous).sum::<u64>() - chosen.iter().map(|m| m.anonymous).sum::<u64>();
    let addresses: u64 = chosen.iter().map(|m| m.len()).sum();
    (small >= WORTH_WHILE && rest <= REST && addresses <= ADDRESSES)
        .then(|| chosen.iter().map(|m| (m.start, m.end)).collect())
}

/// Whether a line of maps is that of before, but for a name of its own.
pub fn is_same(now: &Map, was: &Map) -> bool {
    (now.start, now.end, now.prot, now.shared, now.pgoff, now.dev, now.ino)
        == (was.start, was.end, was.prot, was.shared, was.pgoff, was.dev, was.ino)
}

/// Parts of private mappings that are not covered, and whether all of their pages are wanted.
pub fn uncovered(maps: &[Map], covered: &[(u64, u64)]) -> Vec<(u64, u64, bool)> {
    let mut parts = Vec::new();
    for map in maps {
        let all = map.name == b"[vdso]" || map.name.starts_with(b"/[aio]");
        if matches!(map.name.as_slice(), b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]") || map.shared && !all {
            continue;
        }
        let mut at = map.start;
        let from = covered.partition_point(|(_, end)| *end <= map.start);
        for (start, end) in covered[from..].iter().take_while(|(start, _)| *start < map.end) {
            if at < *start {
                parts.push((at, *start, all));
            }
            at = at.max(*end);
        }
        if at < map.end {
            parts.push((at, map.end, all));
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(start: u64, end: u64, name: &[u8], anonymous: u64) -> Map {
        Map { start, end, name: name.to_vec(), anonymous, ..Map::default() }
    }

    #[test]
    fn large_private_memory_in_small_pages_is_chosen() {
        let gib = 1 << 30;
        let heap = map(0x1000_0000, 0x1000_0000 + gib, b"[heap]", gib);
        let code = Map { ino: 7, ..map(0x1000, 0x2000, b"/bin/true", 0x1000) };
        assert_eq!(choose(&[code.clone(), heap.clone()]), Some(vec![(heap.start, heap.end)]));
        // A fork is cheap.
        assert_eq!(choose(&[Map { huge: gib, ..heap.clone() }]), None);
        assert_eq!(choose(&[Map { anonymous: WORTH_WHILE - 1, ..heap.clone() }]), None);
        // Private pages of a file cannot be protected.
        assert_eq!(choose(&[Map { anonymous: REST + 1, ..code }, heap.clone()]), None);
        let watched = Map { flags: VmFlags::of(VmFlags::UFFD_MISSING), ..map(0x5000, 0x6000, b"", 0) };
        assert_eq!(choose(&[watched, heap.clone()]), None);
        assert_eq!(choose(&[Map { shared: true, ..heap }]), None);
    }

    #[test]
    fn what_is_not_covered_is_found() {
        let shared = Map { shared: true, ..map(0x9000, 0xa000, b"", 0) };
        let maps = [
            map(0x1000, 0x5000, b"", 0),
            map(0x5000, 0x8000, b"", 0),
            shared,
            map(0xb000, 0xc000, b"[vdso]", 0),
        ];
        let parts = uncovered(&maps, &[(0x2000, 0x3000), (0x4000, 0x6000)]);
        let expected = [
            (0x1000, 0x2000, false),
            (0x3000, 0x4000, false),
            (0x6000, 0x8000, false),
            (0xb000, 0xc000, true),
        ];
        assert_eq!(parts, expected);
        assert_eq!(uncovered(&maps[..1], &[(0x1000, 0x8000)]), []);
    }
}
