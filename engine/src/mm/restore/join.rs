//! Neighbours that differ in no more than their protection are mapped and filled as one: a program may have tens of
//! thousands of them in a row, and each call would cost as much as their content.

use std::collections::HashMap;

use rcriu_images::{
    pagemap::{PAGE_SIZE, PageReader},
    pb,
};

use super::{Class, Placed, READ_WRITE, entry, fill};
use crate::error::{Context, Result};
use crate::mm::{more::Told, status as st};
use crate::sys::map::Region;

/// Mappings of so many bytes on average are small: their pages take less time than tearing them apart.
const SMALL: u64 = 64 << 10;

/// How many of `vmas` from the first on can be one mapping until they get their protections: private anonymous memory
/// without gaps that agrees in everything else, of which all have content or none has any. At least 1.
pub fn together(
    vmas: &[pb::VmaEntry],
    pages: Option<&PageReader>,
    told: Told<'_>,
    inherited: &HashMap<u64, Placed>,
) -> usize {
    let Some((first, rest)) = vmas.split_first() else { return 1 };
    if !alone(first, told, inherited) {
        return 1;
    }
    let has_content = |v: &pb::VmaEntry| pages.is_some_and(|p| fill::has_content(p, v.start, v.end));
    let content = has_content(first);
    let mut end = first.end;
    let follows = |vma: &&pb::VmaEntry| {
        let fits = vma.start == end
            && (vma.flags, vma.status, vma.madv) == (first.flags, first.status, first.madv)
            && has_content(vma) == content
            // Without content memory gets its protection at once: what could never be written is not charged.
            && (content || vma.prot == first.prot)
            && alone(vma, told, inherited);
        end = vma.end;
        fits
    };
    1 + rest.iter().take_while(follows).count()
}

/// Private anonymous memory of small pages about which nothing else is to be done when it is made.
fn alone(vma: &pb::VmaEntry, told: Told<'_>, inherited: &HashMap<u64, Placed>) -> bool {
    let special = (libc::MAP_HUGETLB | libc::MAP_GROWSDOWN | libc::MAP_SHARED) as u32;
    vma.status & st::ANON_PRIVATE != 0
        && vma.flags & special == 0
        && matches!(entry::classify(vma), Ok(Class::Private))
        && !inherited.contains_key(&vma.start)
        && told.of(vma.start, vma.end).is_none_or(|told| told.policy.is_none())
}

/// All of `vmas`, which lie [`together`] from `first` on, as one.
pub fn joined(vmas: &[pb::VmaEntry], first: &pb::VmaEntry) -> pb::VmaEntry {
    pb::VmaEntry { end: vmas.last().map_or(first.end, |last| last.end), ..*first }
}

/// Gives small neighbours, mapped as one writable and empty mapping, their protections, if that is worth while and
/// memory that forbids it can be written all the same: to tear mappings apart that have pages takes twice as long.
///
/// Precondition: the region begins where they do.
pub fn protect(region: &Region, vmas: &[pb::VmaEntry]) -> Result<bool> {
    let len: u64 = vmas.iter().map(|vma| vma.end - vma.start).sum();
    let mut torn = vmas.iter().filter(|vma| vma.prot != READ_WRITE).peekable();
    let Some(first) = torn.peek().filter(|_| len / SMALL < vmas.len() as u64) else { return Ok(false) };
    region.protect(first.start, PAGE_SIZE, libc::PROT_READ as u32)?;
    let forced = region.force(first.start, &[0]);
    region.advise(first.start, PAGE_SIZE, libc::MADV_DONTNEED)?;
    if forced.is_err() {
        region.protect(first.start, PAGE_SIZE, READ_WRITE)?;
        return Ok(false);
    }
    torn.try_for_each(|vma| {
        region.protect(vma.start, vma.end - vma.start, vma.prot).during(|| entry::name(vma))
    })?;
    Ok(true)
}

/// What was placed as one becomes the mappings it stands for, which have their protections if it is `protected`.
pub fn apart(whole: Placed, vmas: &[pb::VmaEntry], protected: bool, placed: &mut Vec<Placed>) -> Result<()> {
    let Placed { mut region, prot, policy, .. } = whole;
    for (at, vma) in vmas.iter().enumerate() {
        let prot = if protected { vma.prot } else { prot };
        if at + 1 < vmas.len() {
            let (this, rest) = region.split(vma.end - vma.start)?;
            placed.push(Placed { vma: *vma, region: this, prot, policy });
            region = rest;
        } else {
            placed.push(Placed { vma: *vma, region, prot, policy });
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Mapping;

    const ANON: u32 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;

    fn vma(page: u64, prot: u32) -> pb::VmaEntry {
        let status = st::REGULAR | st::ANON_PRIVATE;
        let (start, end) = (page << 12, (page + 1) << 12);
        pb::VmaEntry { start, end, prot, flags: ANON, status, ..Default::default() }
    }

    fn count(vmas: &[pb::VmaEntry]) -> usize {
        together(vmas, None, Told::new(None), &HashMap::new())
    }

    #[test]
    fn only_what_agrees_is_joined() {
        assert_eq!(count(&[]), 1);
        assert_eq!(count(&[vma(1, 3), vma(2, 3), vma(3, 3), vma(5, 3)]), 3);
        // Without content the protection is given at once.
        assert_eq!(count(&[vma(1, 3), vma(2, 1)]), 1);
        for other in [
            pb::VmaEntry { flags: ANON | libc::MAP_NORESERVE as u32, ..vma(2, 3) },
            pb::VmaEntry { madv: Some(1 << 14), ..vma(2, 3) },
            pb::VmaEntry { status: st::REGULAR | st::ANON_PRIVATE | st::HEAP, ..vma(2, 3) },
            pb::VmaEntry { status: st::GUARD, ..vma(2, 3) },
        ] {
            assert_eq!(count(&[vma(1, 3), other]), 1, "{other:?}");
        }
        let grows = |page| pb::VmaEntry { flags: ANON | libc::MAP_GROWSDOWN as u32, ..vma(page, 3) };
        assert_eq!(count(&[grows(1), grows(2)]), 1);
        let policy = pb::RcriuMappingEntry {
            start: 2 << 12,
            end: 3 << 12,
            policy: Some(Default::default()),
            ..Default::default()
        };
        let task = pb::RcriuTaskEntry { mapping: vec![policy], ..Default::default() };
        assert_eq!(together(&[vma(1, 3), vma(2, 3)], None, Told::new(Some(&task)), &HashMap::new()), 1);
    }

    #[test]
    fn what_was_joined_comes_apart() {
        let at = 0x1600_0000_0000 >> 12;
        let vmas = [vma(at, 1), vma(at + 1, 3), vma(at + 2, 0)];
        let whole = joined(&vmas, &vmas[0]);
        assert_eq!((whole.start, whole.end), (at << 12, (at + 3) << 12));
        let what = Mapping { prot: 3, flags: ANON, file: None };
        let region = Region::map(whole.start, whole.end - whole.start, what).unwrap();
        let mut placed = Vec::new();
        apart(Placed { vma: whole, region, prot: 3, policy: false }, &vmas, false, &mut placed).unwrap();
        assert_eq!(placed.iter().map(|p| p.vma).collect::<Vec<_>>(), vmas);
        for p in placed {
            assert_eq!((p.region.start(), p.region.end(), p.prot), (p.vma.start, p.vma.end, 3));
            p.region.unmap().unwrap();
        }
    }

    #[test]
    fn small_neighbours_get_their_protections_first() {
        let at = 0x1600_0010_0000 >> 12;
        let vmas = [vma(at, 3), vma(at + 1, 1), vma(at + 2, 3), vma(at + 3, 0)];
        let whole = joined(&vmas, &vmas[0]);
        let what = Mapping { prot: 3, flags: ANON, file: None };
        let region = Region::map(whole.start, whole.end - whole.start, what).unwrap();
        if !protect(&region, &vmas).unwrap() {
            eprintln!("SKIP: this system forbids to write memory against its protection");
            return region.unmap().unwrap();
        }
        for (n, vma) in vmas.iter().enumerate() {
            let bytes = [n as u8; 3];
            assert_eq!(region.write(vma.start, &bytes).is_ok(), vma.prot == 3);
            region.force(vma.start, &bytes).unwrap();
            let mut seen = [9; 3];
            region.read(vma.start, &mut seen).unwrap();
            assert_eq!(seen, bytes);
        }
        // Long ones are better filled first.
        let long = [
            vma(at, 1),
            pb::VmaEntry { start: (at + 1) << 12, end: whole.end + (1 << 20), ..vma(at + 1, 3) },
        ];
        assert!(!protect(&region, &long).unwrap());
        assert!(!protect(&region, &[vma(at, 3), vma(at + 1, 3)]).unwrap());
        region.unmap().unwrap();
    }
}
