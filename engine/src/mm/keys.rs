//! Memory protection keys, pkeys(7), and memory that can only be executed.
//!
//! Where the processor has keys, the kernel gives memory that is `PROT_EXEC` and nothing else a key of its own, the
//! lowest that is free then. Such memory is therefore readable until the task has all its other keys: only then does
//! each key get the number it had, which the programs' access rights (PKRU) go by.

use std::collections::HashMap;

use rcriu_images::pb;
use restorer::args::Setting;

use super::{restore::Range, status as st};
use crate::error::{Error, Result};

const PROT_READ: u32 = libc::PROT_READ as u32;
const PROT_EXEC: u32 = libc::PROT_EXEC as u32;
/// Highest key of the architecture; key 0 is everybody's.
const HIGHEST: u32 = 15;
/// What no key is for: the kernel's own mappings.
const KERNELS: u32 = st::VDSO | st::VVAR | st::VSYSCALL | st::GUARD;

/// Makes memory readable that can only be executed, for as long as the task is restored, and says where it is.
pub fn withhold(vmas: &mut [pb::VmaEntry]) -> Vec<Range> {
    let only = vmas.iter_mut().filter(|vma| vma.prot == PROT_EXEC && vma.status & KERNELS == 0);
    only.map(|vma| {
        vma.prot |= PROT_READ;
        (vma.start, vma.end)
    })
    .collect()
}

/// Which keys are allocated, as the image tells; 0 if it does not.
fn allocated(more: Option<&pb::RcriuTaskEntry>) -> u32 {
    more.and_then(|more| more.pkeys).unwrap_or(0)
}

/// Mappings with a key that the program chose, also one that it has freed since.
fn chosen<'a>(
    more: Option<&'a pb::RcriuTaskEntry>,
    only: &'a [Range],
) -> impl Iterator<Item = (&'a pb::RcriuMappingEntry, u32)> {
    let known = allocated(more);
    let told = more.map_or(&[][..], |more| &more.mapping);
    let keyed = told.iter().filter_map(|entry| Some((entry, entry.pkey.filter(|key| *key != 0)?)));
    keyed.filter(move |(entry, key)| known >> key & 1 != 0 || !is_only(only, entry))
}

fn is_only(only: &[Range], entry: &pb::RcriuMappingEntry) -> bool {
    only.binary_search(&(entry.start, entry.end)).is_ok()
}

/// Whether the processor must have keys for this task.
pub fn needed(more: Option<&pb::RcriuTaskEntry>, only: &[Range]) -> bool {
    allocated(more) != 0 || chosen(more, only).next().is_some()
}

/// Mappings by their start. Guard pages are no mappings: their entries follow those, in an order of their own.
fn by_start(vmas: &[pb::VmaEntry]) -> HashMap<u64, &pb::VmaEntry> {
    vmas.iter().filter(|vma| vma.status & st::GUARD == 0).map(|vma| (vma.start, vma)).collect()
}

/// Checks what the image says: keys that there are, of mappings that there are.
pub fn check(more: Option<&pb::RcriuTaskEntry>, vmas: &[pb::VmaEntry]) -> Result<()> {
    let bad = |what: String| Err(Error::image(format!("rcriu-tasks.img: {what}")));
    let mask = allocated(more);
    if mask & 1 != 0 || mask >> HIGHEST > 1 {
        return bad(format!("{mask:#x} are no memory protection keys"));
    }
    let keyed: Vec<_> =
        more.map_or(&[][..], |more| &more.mapping).iter().filter(|e| e.pkey.is_some()).collect();
    let vmas = if keyed.is_empty() { HashMap::new() } else { by_start(vmas) };
    for entry in keyed {
        let key = entry.pkey();
        let range = format!("{:x}-{:x}", entry.start, entry.end);
        if key > HIGHEST {
            return bad(format!("mapping {range} has protection key {key}"));
        }
        if vmas.get(&entry.start).is_none_or(|vma| vma.end != entry.end) {
            return bad(format!(
                "mapping {range} has a protection key but is not in the image of the memory"
            ));
        }
    }
    Ok(())
}

/// The calls that give a task its keys and its mappings their keys. `only` is what [`withhold`] gave.
///
/// Precondition: the task has no keys, [`check`] was passed.
pub fn settings(more: Option<&pb::RcriuTaskEntry>, vmas: &[pb::VmaEntry], only: &[Range]) -> Vec<Setting> {
    if only.is_empty() && !needed(more, only) {
        return Vec::new();
    }
    let known = allocated(more);
    let chosen: Vec<_> = chosen(more, only).collect();
    let own: Vec<Range> = only
        .iter()
        .filter(|range| !chosen.iter().any(|(entry, _)| (entry.start, entry.end) == **range))
        .copied()
        .collect();
    // The number of the kernel's own key, if the mappings had one.
    let kernels = more.map_or(&[][..], |more| &more.mapping).iter();
    let kernels = kernels.filter(|entry| is_only(&own, entry)).find_map(|entry| entry.pkey);
    let highest = chosen
        .iter()
        .map(|(_, key)| *key)
        .chain(kernels)
        .chain((1..=HIGHEST).filter(|k| known >> k & 1 != 0));
    let highest = highest.max().unwrap_or(0);

    let execute_only = || {
        own.iter().map(|(start, end)| {
            Setting::call(libc::SYS_mprotect, [*start, end - start, PROT_EXEC.into(), 0, 0])
        })
    };
    let mut calls = Vec::new();
    // Each call takes the lowest key that is free.
    for key in 1..=highest {
        match kernels == Some(key) {
            true => calls.extend(execute_only()),
            false => calls.push(Setting::call(libc::SYS_pkey_alloc, [0; 5])),
        }
    }
    let vmas = if chosen.is_empty() { HashMap::new() } else { by_start(vmas) };
    for (entry, key) in &chosen {
        let prot = vmas.get(&entry.start).map_or(0, |vma| vma.prot);
        let prot = if is_only(only, entry) { PROT_EXEC } else { prot };
        let (start, len) = (entry.start, entry.end - entry.start);
        calls.push(Setting::call(libc::SYS_pkey_mprotect, [start, len, prot.into(), (*key).into(), 0]));
    }
    let spare = (1..=highest).filter(|key| known >> key & 1 == 0 && kernels != Some(*key));
    calls.extend(spare.map(|key| Setting::call(libc::SYS_pkey_free, [key.into(), 0, 0, 0, 0])));
    if kernels.is_none() {
        calls.extend(execute_only());
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(page: u64, prot: i32) -> pb::VmaEntry {
        let (start, end) = (page << 12, (page + 1) << 12);
        pb::VmaEntry { start, end, prot: prot as u32, ..Default::default() }
    }

    fn keyed(page: u64, key: u32) -> pb::RcriuMappingEntry {
        pb::RcriuMappingEntry {
            start: page << 12,
            end: (page + 1) << 12,
            pkey: Some(key),
            ..Default::default()
        }
    }

    /// Calls as short words.
    fn words(mask: u32, mapping: Vec<pb::RcriuMappingEntry>, vmas: &mut [pb::VmaEntry]) -> String {
        let more = pb::RcriuTaskEntry { pkeys: Some(mask), mapping, ..Default::default() };
        let only = withhold(vmas);
        check(Some(&more), vmas).unwrap();
        let calls = settings(Some(&more), vmas, &only);
        let word = |call: &Setting| match (i64::from(call.call), call.args) {
            (libc::SYS_pkey_alloc, _) => "alloc".to_owned(),
            (libc::SYS_pkey_free, [key, ..]) => format!("free {key}"),
            (libc::SYS_mprotect, [at, _, prot, ..]) => format!("page {} {prot}", at >> 12),
            (libc::SYS_pkey_mprotect, [at, _, prot, key, _]) => format!("page {} {prot} key {key}", at >> 12),
            other => panic!("{other:?}"),
        };
        calls.iter().map(word).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn every_key_gets_the_number_it_had() {
        let mut vmas = [vma(1, 3), vma(2, 4), vma(3, 1), vma(4, 4)];
        assert_eq!(words(0, Vec::new(), &mut [vma(1, 3)]), "");
        assert_eq!(words(0, Vec::new(), &mut vmas.clone()), "page 2 4, page 4 4");
        assert_eq!(words(0, vec![keyed(2, 1), keyed(4, 1)], &mut vmas.clone()), "page 2 4, page 4 4");
        assert_eq!(
            words(0b1010, vec![keyed(1, 1), keyed(2, 2), keyed(4, 2)], &mut vmas.clone()),
            "alloc, page 2 4, page 4 4, alloc, page 1 3 key 1"
        );
        // Key 1 is free again but for its mapping, key 3 is on memory that can only be executed.
        assert_eq!(
            words(0b1000, vec![keyed(1, 1), keyed(4, 3)], &mut vmas),
            "alloc, alloc, alloc, page 1 3 key 1, page 4 4 key 3, free 1, free 2, page 2 4"
        );
    }

    #[test]
    fn guard_pages_that_follow_are_no_mappings() {
        let guard = |page| pb::VmaEntry { status: st::GUARD, ..vma(page, 0) };
        let mut vmas = vec![vma(8, 3), vma(9, 1)];
        // Also one at the start of a mapping.
        vmas.extend((1..9).map(guard));
        assert_eq!(
            words(0b10, vec![keyed(8, 1), keyed(9, 1)], &mut vmas),
            "alloc, page 8 3 key 1, page 9 1 key 1"
        );
    }

    #[test]
    fn keys_that_cannot_be_are_refused() {
        let vmas = [vma(1, 3)];
        let told = |mask, mapping| pb::RcriuTaskEntry { pkeys: Some(mask), mapping, ..Default::default() };
        assert!(check(None, &vmas).is_ok());
        assert!(check(Some(&told(0xfffe, vec![keyed(1, 15)])), &vmas).is_ok());
        for bad in [
            told(1, Vec::new()),
            told(0x1_0000, Vec::new()),
            told(0, vec![keyed(1, 16)]),
            told(0, vec![keyed(2, 1)]),
        ] {
            assert!(check(Some(&bad), &vmas).is_err());
        }
    }
}
