//! All mappings of a task, and what its page tables tell of them.
//!
//! Where there are very many the kernel needs most of a dump's time to list them, in one thread. Meanwhile those that
//! have come are looked at and their pages copied from outside, in the order of addresses; what is left when the list
//! has ended the task writes itself:
//!
//! ```text
//! list     | mappings ->     | mappings ->     | mappings ->     |
//! walk                       | page tables ->  | page tables ->  | page tables -> |
//! pages                        | copied ->        | copied ->        |  the others, by the task ->
//! ```

use std::time::{Duration, Instant};

use rcriu_images::ImageKind;

use super::{
    DumpCx,
    collect::Task,
    later,
    mapped::{Mapped, space},
    task::{id, stacks},
};
use crate::{
    error::Result,
    infect::{self, StoppedTask},
    interrupt,
    mm::{
        pagemap::{Scanner, Walk},
        pages::{Copier, PagesOut},
        vma::{Collector, TASK_SIZE, Vma},
    },
    procfs::maps::{self, Came, Listing, Map},
};

/// What is known of the memory of a task.
pub(super) struct Listed {
    pub maps: Vec<Map>,
    /// Without guard pages.
    pub vmas: Vec<Vma>,
    /// Where they are many.
    pub walk: Option<Walk>,
    pub begun: Option<Begun>,
}

/// Pages that were copied while mappings were listed.
pub(super) struct Begun {
    pub out: PagesOut,
    /// All those below this address were.
    pub upto: u64,
    pub took: Duration,
}

/// Runs looked for at a time, and bytes that are copied at a time: somebody else waits when there is more to read.
const RUNS: usize = 256;
const STEP: u64 = 256 << 10;

/// Takes all mappings; `listing` was begun since the task stands still.
pub(super) fn take(
    task: &Task,
    stopped: &StoppedTask,
    listing: Listing,
    cx: &mut DumpCx<'_>,
) -> Result<Listed> {
    let begun = Instant::now();
    let stacks = stacks(stopped);
    let many = listing.is_coming();
    let scanner = if many { Some(Scanner::new(&task.dir, cx.kernel)?) } else { None };
    let scanner = scanner.filter(Scanner::can_walk);
    let mut out = match &scanner {
        Some(_) if later::are_plain(cx) => Some(cx.pages.create(ImageKind::Pagemap, id(task))?),
        _ => None,
    };
    let copier = match &mut out {
        Some(out) => Some(Copier::new(&task.dir, out, &stacks)?),
        None => None,
    };
    let mut beside = scanner.map(|scanner| Beside {
        scanner,
        walk: Walk::default(),
        copier,
        copied: 0,
        seen: 0,
        stop: None,
    });
    let mut collector = Collector::default();
    let maps = all(task, listing, &mut collector, beside.as_mut(), cx)?;
    let (mut walk, mut upto) = (None, 0);
    if let Some(Beside { mut scanner, walk: mut begun, copied, .. }) = beside {
        upto = copied;
        while begun.upto() < TASK_SIZE && !begun.is_too_long() {
            scanner.walk_on(&mut begun, TASK_SIZE, usize::MAX)?;
        }
        walk = Some(begun).filter(|walk| !walk.is_too_long());
    }
    let took = begun.elapsed();
    let begun = out.map(|out| Begun { out, upto, took });
    if infect::remove_leftover(stopped, &maps)? {
        // What was copied lies below.
        let maps = maps::smaps(&task.dir)?;
        let vmas = known(task, &maps, cx)?;
        return Ok(Listed { maps, vmas, walk: None, begun });
    }
    Ok(Listed { maps, vmas: collector.vmas, walk, begun })
}

/// Entries of mappings that are known already.
pub(super) fn known(task: &Task, maps: &[Map], cx: &mut DumpCx<'_>) -> Result<Vec<Vma>> {
    let mut collector = Collector::default();
    add(task, maps, &mut collector, cx)?;
    Ok(collector.vmas)
}

/// Reads the list to its end, and has something done `beside` when there is nothing to read.
fn all(
    task: &Task,
    mut listing: Listing,
    collector: &mut Collector,
    mut beside: Option<&mut Beside<'_>>,
    cx: &mut DumpCx<'_>,
) -> Result<Vec<Map>> {
    let mut taken = 0;
    let mut idle = false;
    loop {
        interrupt::check()?;
        let came = listing.more(idle)?;
        if came == Came::Nothing {
            idle = match &mut beside {
                Some(beside) => !beside.step(&collector.vmas)?,
                None => true,
            };
            continue;
        }
        idle = false;
        let new = &listing.maps()[taken..];
        add(task, new, collector, cx)?;
        if let Some(beside) = &mut beside {
            beside.stop = beside.stop.or_else(|| new.iter().find(|map| may_go(map)).map(|map| map.start));
        }
        taken += new.len();
        if came == Came::End {
            return listing.finish();
        }
    }
}

fn add(task: &Task, maps: &[Map], collector: &mut Collector, cx: &mut DumpCx<'_>) -> Result<()> {
    let mut mapped = Mapped {
        task: task.dir.pid(),
        files: &mut cx.files,
        shmem: &mut cx.shmem,
        segments: &mut cx.segments,
        space: space(task),
    };
    collector.add(&task.dir, maps, cx.rules, &mut mapped, &mut cx.mapped)
}

/// Whether it may be a parasite that nobody has removed, which [`infect::remove_leftover`] does when all are known.
fn may_go(map: &Map) -> bool {
    map.prot & libc::PROT_EXEC as u32 != 0 && !map.shared && map.ino == 0 && map.name.is_empty()
}

/// What is done while there is nothing to read.
struct Beside<'a> {
    scanner: Scanner,
    walk: Walk,
    copier: Option<Copier<'a>>,
    /// All below is copied.
    copied: u64,
    /// Mappings that were looked at for a reason to stop.
    seen: usize,
    /// From there on nothing is copied now.
    stop: Option<u64>,
}

impl Beside<'_> {
    /// Does a little; false if there is nothing to do. All of `vmas` are known, of those that follow nothing.
    fn step(&mut self, vmas: &[Vma]) -> Result<bool> {
        if let Some(whole) = vmas[self.seen..].iter().find(|vma| vma.dumps_all()) {
            // Not only what the walk finds.
            self.stop = Some(self.stop.map_or(whole.entry.start, |stop| stop.min(whole.entry.start)));
        }
        self.seen = vmas.len();
        let end = vmas.last().map_or(0, |vma| vma.entry.end).min(TASK_SIZE);
        let copy = self.walk.upto().min(self.stop.unwrap_or(u64::MAX));
        if let Some(copier) = self.copier.as_mut().filter(|_| self.copied < copy) {
            let add = |vma: &Vma, start, end| copier.add(vma, start, end);
            self.copied = self.walk.part(vmas, (self.copied, copy), STEP, add)?;
            copier.flush()?;
            return Ok(true);
        }
        if self.walk.upto() >= end || self.walk.is_too_long() {
            return Ok(false);
        }
        self.scanner.walk_on(&mut self.walk, end, RUNS)?;
        Ok(true)
    }
}
