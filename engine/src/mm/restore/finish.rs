//! The last things done to memory before the restorer takes over: what children must not inherit, and what
//! would be in the way while pages are filled.

use std::os::fd::{AsFd, BorrowedFd};

use rcriu_images::{pagemap::PageReader, pb};
use restorer::args::{Move, Span};

use super::{Class, HIDDEN, Placed, Prepared, Range, Ranges, TABLE, chosen::Chosen, entry, vmas};
use crate::error::{Context, Error, Result};
use crate::mm::{aio, more, status as st};
use crate::pstree::FileId;
use crate::restore::TaskImage;
use crate::sys::{
    attributes, fd,
    map::{Mapping, Region},
};

/// `MADV_GUARD_INSTALL` (Linux 6.13).
const MADV_GUARD_INSTALL: i32 = 102;
/// Advice that mappings keep, in the numbers of madvise(2).
const ADVICE: [i32; 8] = [
    libc::MADV_RANDOM,
    libc::MADV_SEQUENTIAL,
    libc::MADV_DONTFORK,
    libc::MADV_MERGEABLE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_DONTDUMP,
    libc::MADV_WIPEONFORK,
];

/// Gives io_urings by the number of their file.
pub type Urings<'a> = &'a dyn Fn(FileId) -> Option<BorrowedFd<'a>>;

/// Whether the kernel would merge pages of the mapping; others take the advice without effect.
fn can_merge(vma: &pb::VmaEntry) -> bool {
    vma.flags & libc::MAP_SHARED as u32 == 0
}

fn settle(at: &mut Placed, told: Option<&pb::RcriuMappingEntry>, merge_any: bool) -> Result<()> {
    let region = &at.region;
    more::set_name(region, told)?;
    if at.prot != at.vma.prot {
        region.protect(region.start(), region.len(), at.vma.prot)?;
        at.prot = at.vma.prot;
    }
    let advice = at.vma.madv.unwrap_or(0);
    for code in ADVICE.into_iter().filter(|code| advice >> code & 1 != 0) {
        region.advise(region.start(), region.len(), code)?;
    }
    if merge_any && advice >> libc::MADV_MERGEABLE & 1 == 0 && can_merge(&at.vma) {
        // Was made so with all others.
        region.advise(region.start(), region.len(), libc::MADV_UNMERGEABLE)?;
    }
    if at.vma.flags & libc::MAP_LOCKED as u32 != 0 {
        let on_fault = told.is_some_and(pb::RcriuMappingEntry::lock_on_fault);
        match region.lock(on_fault) {
            // Locked all the same, but there is nothing to bring in.
            Err(e) if e.errno() == Some(libc::ENOMEM) && at.vma.prot == 0 => {}
            other => other?,
        }
    }
    Ok(())
}

impl Prepared {
    /// Gives every mapping its protection, advice, guard pages and lock.
    ///
    /// Precondition: all children are forked, all pages filled, all descriptors (`fds`) there. `urings` gives io_urings.
    pub fn settle(
        &mut self,
        task: &TaskImage,
        fds: &[pb::FdinfoEntry],
        pages: Option<&PageReader>,
        urings: Urings<'_>,
    ) -> Result<()> {
        self.urings(task, urings)?;
        let told = more::Told::new(task.more.as_deref());
        let merge_any = task.more.as_ref().is_some_and(|more| more.merge_any());
        if merge_any {
            attributes::set_memory_merge(true)?;
        }
        for at in &mut self.placed {
            let of = told.of(at.vma.start, at.vma.end);
            settle(at, of, merge_any).during(|| entry::name(&at.vma))?;
        }
        self.guards(task)?;
        self.rings(task, pages)?;
        self.sockets(task, fds)
    }

    /// Memory of io_urings.
    fn urings(&mut self, task: &TaskImage, urings: Urings<'_>) -> Result<()> {
        let all = || vmas(task).iter().filter(|v| v.status & st::URING != 0);
        if all().next().is_none() {
            return Ok(());
        }
        let mut places = Chosen::new(all().map(|v| (v.start, v.end)).collect())?;
        for vma in all() {
            let placed = (|| -> Result<Placed> {
                let id = u32::try_from(vma.shmid).map(FileId);
                let ring = id.ok().and_then(urings);
                let ring = ring.ok_or_else(|| Error::image(format!("there is no io_uring {}", vma.shmid)))?;
                let (prot, flags) = (vma.prot, entry::map_flags(vma));
                let what = Mapping { prot, flags, file: Some((ring, vma.pgoff)) };
                let region = places.map(vma.start, vma.end - vma.start, what)?;
                Ok(Placed { vma: *vma, region, prot, policy: false })
            })();
            self.placed.push(placed.during(|| entry::name(vma))?);
        }
        self.placed.sort_unstable_by_key(|p| p.vma.start);
        Ok(())
    }

    /// Rings of packet sockets, which the sockets have got already.
    fn sockets(&mut self, task: &TaskImage, fds: &[pb::FdinfoEntry]) -> Result<()> {
        let before = self.placed.len();
        for vma in vmas(task).iter().filter(|v| v.status & st::SOCKET != 0) {
            let packet = pb::FdTypes::Packetsk as i32;
            let open = fds.iter().find(|fd| u64::from(fd.id) == vma.shmid && fd.r#type == packet);
            let placed = (|| -> Result<Placed> {
                let number = open.ok_or_else(|| {
                    Error::image(format!("the task has no descriptor of a packet socket {}", vma.shmid))
                })?;
                let file = fd::duplicate(number.fd.cast_signed())?;
                let (prot, flags) = (vma.prot, entry::map_flags(vma));
                let what = Mapping { prot, flags, file: Some((file.as_fd(), vma.pgoff)) };
                let region = self.room.map(vma.start, vma.end - vma.start, what)?;
                Ok(Placed { vma: *vma, region, prot, policy: false })
            })();
            self.placed.push(placed.during(|| entry::name(vma))?);
        }
        if self.placed.len() > before {
            self.placed.sort_unstable_by_key(|p| p.vma.start);
        }
        Ok(())
    }

    /// Contexts for asynchronous I/O, with their rings.
    fn rings(&mut self, task: &TaskImage, pages: Option<&PageReader>) -> Result<()> {
        let before = self.placed.len();
        for vma in vmas(task) {
            if entry::classify(vma)? != Class::AioRing {
                continue;
            }
            let len = vma.end - vma.start;
            let content = pages.map_or(Ok(None), |pages| pages.read(vma.start, len));
            let placed = (|| -> Result<Placed> {
                let content = content?.ok_or_else(|| Error::image("its content is missing"))?;
                let region = self.room.map(vma.start, len, HIDDEN)?;
                let entry = task.mm.iter().flat_map(|mm| &mm.aios).find(|ring| ring.id == vma.start);
                aio::restore(&region, &content, entry)?;
                Ok(Placed { vma: *vma, region, prot: vma.prot, policy: false })
            })();
            self.placed.push(placed.during(|| entry::name(vma))?);
        }
        if self.placed.len() > before {
            self.placed.sort_unstable_by_key(|p| p.vma.start);
        }
        Ok(())
    }

    /// Guard pages are ranges inside mappings, perhaps over the border of two.
    fn guards(&self, task: &TaskImage) -> Result<()> {
        for guard in vmas(task).iter().filter(|v| v.status & st::GUARD != 0) {
            let mut at = guard.start;
            let first = self.placed.partition_point(|p| p.vma.end <= at);
            for inside in &self.placed[first..] {
                if inside.vma.start > at || at >= guard.end {
                    break;
                }
                let end = guard.end.min(inside.vma.end);
                let here = inside.region.start() + (at - inside.vma.start);
                inside
                    .region
                    .advise(here, end - at, MADV_GUARD_INSTALL)
                    .during(|| format!("guard pages {at:x}-{end:x}"))?;
                at = end;
            }
            if at < guard.end {
                return Err(Error::image(format!("guard pages at {at:#x} lie in no mapping")));
            }
        }
        Ok(())
    }

    /// Mappings with pages that come late.
    pub fn late(&self) -> Vec<Span> {
        self.late.iter().map(|&(start, end)| Span { start, end }).collect()
    }

    /// Mappings that are not at their address yet.
    pub fn moves(&self) -> Vec<Move> {
        let waiting = self.placed.iter().filter(|p| p.region.start() != p.vma.start);
        waiting.map(|p| Move { from: p.region.start(), to: p.vma.start, len: p.region.len() }).collect()
    }

    /// What must not be unmapped: the task's memory where it is now, and `others`.
    pub fn keep(&self, others: impl IntoIterator<Item = Range>) -> Vec<Span> {
        let now = self.placed.iter().map(|p| (p.region.start(), p.region.end()));
        let all: Ranges = now.chain(others).collect();
        all.iter().map(|(start, end)| Span { start, end }).collect()
    }

    /// Reserves `len` bytes for the restorer where neither the task nor we have anything.
    pub fn hole(&mut self, len: u64) -> Result<Region> {
        self.room.map_elsewhere(0, len, TABLE, HIDDEN)
    }
}
