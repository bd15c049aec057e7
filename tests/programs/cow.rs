//! Copy-on-write: pages that parent and child share after fork are still the same frames after a restore.

use anyhow::{Context, bail};

use crate::kit::crew::{Member, member};
use crate::kit::mem::{Mapping, PAGE, anon, frames};
use crate::kit::{Check, mem, rest, skip};

const PAGES: usize = 64;
/// Pages from here on are written by the child, so they are its own.
const OWN: usize = 48;

/// Writes the frame numbers of `m` to shared memory, for the parent to compare.
fn publish(m: Mapping, to: Mapping) -> Check {
    for (i, frame) in frames(m)?.into_iter().enumerate() {
        let frame = frame.unwrap_or(0);
        to.atomic(2 * i).store(frame as u32, std::sync::atomic::Ordering::SeqCst);
        to.atomic(2 * i + 1).store((frame >> 32) as u32, std::sync::atomic::Ordering::SeqCst);
    }
    Ok(())
}

fn published(from: Mapping, i: usize) -> u64 {
    let word = |at| u64::from(from.atomic(at).load(std::sync::atomic::Ordering::SeqCst));
    word(2 * i) | word(2 * i + 1) << 32
}

fn compare(m: Mapping, child: Mapping, when: &str) -> Check {
    let mine = frames(m)?;
    let shared = (0..OWN).filter(|i| mine[*i].is_some_and(|f| f != 0 && f == published(child, *i))).count();
    let own = (OWN..PAGES).filter(|i| mine[*i].is_some_and(|f| f == published(child, *i))).count();
    if (shared, own) != (OWN, 0) {
        bail!("{when}: {shared} of {OWN} unwritten pages are shared with the child, and {own} of its own");
    }
    Ok(())
}

/// Parent, child and grandchild with one range.
pub fn run(_: &[String]) -> Check {
    let m = anon(PAGES * PAGE)?;
    // Small pages: sharing is compared page by page.
    let _ = m.advise(libc::MADV_NOHUGEPAGE);
    m.fill(1);
    if frames(m)?.iter().all(|f| f.is_none_or(|f| f == 0)) {
        return Err(skip("frame numbers are hidden from this user"));
    }
    let (of_child, of_grandchild) = (mem::shared(2 * PAGES * PAGE)?, mem::shared(2 * PAGES * PAGE)?);
    let role = move |to: Mapping, below: Option<Mapping>| -> Check {
        let below: Option<Member> = match below {
            Some(to) => Some(member(move || {
                publish(m, to)?;
                rest()?;
                m.pages(0, PAGES).check("memory of the grandchild", 1)?;
                publish(m, to)
            })?),
            None => None,
        };
        m.pages(OWN, PAGES - OWN).fill(2);
        publish(m, to)?;
        rest()?;
        m.pages(OWN, PAGES - OWN).check("pages the child wrote", 2)?;
        publish(m, to)?;
        below.map_or(Ok(()), |b| b.verify())
    };
    let child = member(move || role(of_child, Some(of_grandchild)))?;
    compare(m, of_child, "before").context("set up")?;
    rest()?;
    child.verify()?;
    m.check("memory of the parent", 1)?;
    compare(m, of_child, "after")?;
    let mine = frames(m)?;
    let kept = (0..PAGES).filter(|i| mine[*i].is_some_and(|f| f == published(of_grandchild, *i))).count();
    // Its parent wrote the rest after the fork: those pages are shared past the one between, which is more
    // than a restore has to find.
    if kept < OWN {
        bail!("after: {kept} of {PAGES} pages are shared with the grandchild");
    }
    Ok(())
}
