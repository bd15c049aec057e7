//! Neighbours that differ in no more than their protection are mapped and filled as one: a program may have tens of
//! thousands of them in a row, and each call would cost as much as their content.

use std::collections::HashMap;

use rcriu_images::{pagemap::PageReader, pb};

use super::{Class, Placed, entry, fill};
use crate::error::Result;
use crate::mm::{more::Told, status as st};

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

/// What was placed as one becomes the mappings it stands for.
pub fn apart(whole: Placed, vmas: &[pb::VmaEntry], placed: &mut Vec<Placed>) -> Result<()> {
    let Placed { mut region, prot, policy, .. } = whole;
    for (at, vma) in vmas.iter().enumerate() {
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
