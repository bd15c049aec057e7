//! What the format cannot say of a mapping: names, seals, locks that take pages only when they are touched,
//! NUMA policies, protection keys.

use parasite::task::TaskInfo;
use rcriu_images::pb;

use super::{restore::Range, vma::Vma};
use crate::{
    error::{Error, Result},
    mm::status as st,
    procfs::{
        ProcDir,
        maps::{self, Map, VmFlags},
    },
    sys::{attributes, map::Region},
    task::numa,
};

/// What smaps tells; mappings without anything to tell are left out.
pub fn collect(maps: &[Map]) -> Vec<pb::RcriuMappingEntry> {
    maps.iter().filter_map(entry).collect()
}

fn entry(map: &Map) -> Option<pb::RcriuMappingEntry> {
    // The kernel's own mappings are sealed or not as the kernel likes.
    if matches!(map.name.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]" | b"[uprobes]")
    {
        return None;
    }
    let name = map
        .name
        .strip_prefix(b"[anon:")
        .or_else(|| map.name.strip_prefix(b"[anon_shmem:"))
        .and_then(|n| n.strip_suffix(b"]"));
    let entry = pb::RcriuMappingEntry {
        start: map.start,
        end: map.end,
        sealed: map.flags.any(VmFlags::SEALED).then_some(true),
        pkey: (map.pkey != 0).then_some(map.pkey),
        policy: None,
        name: name.map(<[u8]>::to_vec),
        lock_on_fault: map.flags.any(VmFlags::LOCK_ON_FAULT).then_some(true),
    };
    let told = entry.sealed.is_some()
        || entry.pkey.is_some()
        || entry.name.is_some()
        || entry.lock_on_fault.is_some();
    told.then_some(entry)
}

/// `MCL_FUTURE` and `MCL_ONFAULT` of mlockall(2): `at` is the start of a mapping that was made in the task just
/// now.
pub fn lock_future(info: &TaskInfo, dir: &ProcDir, at: u64) -> Result<u32> {
    if info.own_memory != -i64::from(libc::EBUSY) {
        return Ok(0);
    }
    let on_fault =
        maps::smaps(dir)?.iter().any(|map| map.start == at && map.flags.any(VmFlags::LOCK_ON_FAULT));
    Ok(if on_fault { libc::MCL_FUTURE | libc::MCL_ONFAULT } else { libc::MCL_FUTURE } as u32)
}

/// Addresses at which the task is to be asked for the policy of each mapping, in order.
pub fn starts(vmas: &[Vma]) -> Vec<u64> {
    let none = st::VDSO | st::VVAR | st::VSYSCALL | st::GUARD;
    vmas.iter().filter(|vma| vma.entry.status & none == 0).map(|vma| vma.entry.start).collect()
}

/// Adds policies, by the start of their mappings, to what `entries` tell.
pub fn add_policies(
    entries: &mut Vec<pb::RcriuMappingEntry>,
    vmas: &[Vma],
    policies: impl IntoIterator<Item = (u64, pb::RcriuPolicyEntry)>,
) {
    for (start, policy) in policies {
        match entries.binary_search_by_key(&start, |entry| entry.start) {
            Ok(at) => entries[at].policy = Some(policy),
            Err(at) => {
                let Some(vma) = vmas.iter().find(|vma| vma.entry.start == start) else { continue };
                let (start, end) = (vma.entry.start, vma.entry.end);
                let policy = Some(policy);
                entries.insert(at, pb::RcriuMappingEntry { start, end, policy, ..Default::default() });
            }
        }
    }
}

/// What the images tell of the mappings of one task.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a>(&'a [pb::RcriuMappingEntry]);

impl<'a> Told<'a> {
    /// Of a task whose images may lack it.
    pub fn new(task: Option<&'a pb::RcriuTaskEntry>) -> Told<'a> {
        Told(task.map_or(&[], |task| task.mapping.as_slice()))
    }

    /// What is told of the mapping `start` to `end`.
    pub fn of(&self, start: u64, end: u64) -> Option<&'a pb::RcriuMappingEntry> {
        let at = self.0.binary_search_by_key(&start, |entry| entry.start).ok()?;
        Some(&self.0[at]).filter(|entry| entry.end == end)
    }

    /// Ranges to be sealed.
    pub fn sealed(&self) -> impl Iterator<Item = Range> + 'a {
        self.0.iter().filter(|entry| entry.sealed()).map(|entry| (entry.start, entry.end))
    }
}

/// Checks what the image says: in order, without overlap.
pub fn check(entries: &[pb::RcriuMappingEntry]) -> Result<()> {
    let mut last = 0;
    for entry in entries {
        if entry.start < last || entry.end <= entry.start || (entry.start | entry.end) & 0xfff != 0 {
            let range = format!("{:x}-{:x}", entry.start, entry.end);
            return Err(Error::image(format!("rcriu-tasks.img: mapping {range} is out of order")));
        }
        last = entry.end;
    }
    Ok(())
}

/// Gives a mapping its policy before it takes memory. One that was inherited may have another: `had`.
pub fn set_policy(
    region: &Region,
    told: Option<&pb::RcriuMappingEntry>,
    had: bool,
    nodes: impl FnOnce() -> Result<numa::Nodes>,
) -> Result<bool> {
    let Some(policy) = told.and_then(|told| told.policy.as_ref()) else {
        if had {
            attributes::set_region_policy(region, numa::DEFAULT, &[])?;
        }
        return Ok(false);
    };
    let what = format!("mapping {:x}-{:x}", region.start(), region.end());
    match nodes()?.fit(&what, policy) {
        Some((mode, nodes)) => attributes::set_region_policy(region, mode, nodes).map(|()| true),
        None => Ok(false),
    }
}

/// Gives a mapping its name.
pub fn set_name(region: &Region, told: Option<&pb::RcriuMappingEntry>) -> Result<()> {
    let Some(name) = told.and_then(|told| told.name.as_deref()) else { return Ok(()) };
    let name = std::ffi::CString::new(name)
        .map_err(|_| Error::image("rcriu-tasks.img: the name of a mapping has a zero in it"))?;
    match attributes::name_mapping(region, &name) {
        Err(e) if e.errno() == Some(libc::EINVAL) => {
            log::warn!("This kernel takes no name for a mapping: {name:?} is lost");
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(start: u64, flags: u64, name: &[u8]) -> Map {
        let flags = VmFlags::of(flags);
        Map { start, end: start + 0x1000, name: name.to_vec(), flags, ..Map::default() }
    }

    #[test]
    fn only_what_the_format_cannot_say_is_kept() {
        let maps = [
            map(0x1000, VmFlags::LOCKED, b""),
            map(0x2000, VmFlags::SEALED, b"/bin/true"),
            map(0x3000, 0, b"[anon:jit [code]]"),
            map(0x4000, VmFlags::SEALED, b"[vdso]"),
            map(0x5000, VmFlags::LOCKED | VmFlags::LOCK_ON_FAULT, b"[anon_shmem:pool]"),
        ];
        let kept = collect(&maps);
        assert_eq!(kept.iter().map(|e| e.start).collect::<Vec<_>>(), [0x2000, 0x3000, 0x5000]);
        assert_eq!(kept[1].name(), b"jit [code]");
        assert!(kept[2].lock_on_fault() && kept[2].name() == b"pool");
        let task = pb::RcriuTaskEntry { mapping: kept, ..Default::default() };
        let told = Told::new(Some(&task));
        assert_eq!(told.sealed().collect::<Vec<_>>(), [(0x2000, 0x3000)]);
        assert!(told.of(0x3000, 0x4000).is_some() && told.of(0x3000, 0x5000).is_none());
        assert!(check(&task.mapping).is_ok());
    }

    #[test]
    fn mappings_out_of_order_are_refused() {
        let entry = |start, end| pb::RcriuMappingEntry { start, end, ..Default::default() };
        assert!(check(&[entry(0x2000, 0x3000), entry(0x1000, 0x2000)]).is_err());
        assert!(check(&[entry(0x2000, 0x2000)]).is_err());
        assert!(check(&[entry(0x2000, 0x3001)]).is_err());
    }
}
