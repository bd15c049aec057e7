//! Copy-on-write: pages that parent and child share after fork are still the same frames after a restore.

use anyhow::{Context, bail};

use crate::kit::crew::{Member, member};
use crate::kit::mem::{Mapping, PAGE, anon, frames};
use crate::kit::{Check, mem, number, rest, skip};

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

/// Of how many pages, and how many of them the child left as they were; it wrote the others.
fn sizes(m: Mapping) -> (usize, usize) {
    (m.len / PAGE, m.len / PAGE / 4 * 3)
}

fn compare(m: Mapping, child: Mapping, when: &str) -> Check {
    let (pages, kept) = sizes(m);
    let mine = frames(m)?;
    let shared = (0..kept).filter(|i| mine[*i].is_some_and(|f| f != 0 && f == published(child, *i))).count();
    let own = (kept..pages).filter(|i| mine[*i].is_some_and(|f| f == published(child, *i))).count();
    // The kernel may have moved some of very many between both looks.
    if shared < kept - kept / 256 || own != 0 {
        bail!("{when}: {shared} of {kept} unwritten pages are shared with the child, and {own} of its own");
    }
    Ok(())
}

/// `cow PAGES`: parent, child and grandchild with one range.
pub fn run(args: &[String]) -> Check {
    let m = anon(number(args, 0, 64)? * PAGE)?;
    let (pages, unwritten) = sizes(m);
    // Small pages: sharing is compared page by page.
    let _ = m.advise(libc::MADV_NOHUGEPAGE);
    m.fill(1);
    if frames(m)?.iter().all(|f| f.is_none_or(|f| f == 0)) {
        return Err(skip("frame numbers are hidden from this user"));
    }
    let (of_child, of_grandchild) = (mem::shared(2 * pages * PAGE)?, mem::shared(2 * pages * PAGE)?);
    let role = move |to: Mapping, below: Option<Mapping>| -> Check {
        let below: Option<Member> = match below {
            Some(to) => Some(member(move || {
                publish(m, to)?;
                rest()?;
                m.check("memory of the grandchild", 1)?;
                publish(m, to)
            })?),
            None => None,
        };
        m.pages(unwritten, pages - unwritten).fill(2);
        publish(m, to)?;
        rest()?;
        m.pages(unwritten, pages - unwritten).check("pages the child wrote", 2)?;
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
    let kept = (0..pages).filter(|i| mine[*i].is_some_and(|f| f == published(of_grandchild, *i))).count();
    // Its parent wrote the rest after the fork: those pages are shared past the one between, which is more
    // than a restore has to find.
    if kept < unwritten {
        bail!("after: {kept} of {pages} pages are shared with the grandchild");
    }
    Ok(())
}
