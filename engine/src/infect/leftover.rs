//! Taking away the parasite of an engine that was killed.
//!
//! The mapping is known by what no other has at once: private, anonymous, read-execute, without reserve
//! (`MAP_NORESERVE` means nothing for memory that is not writable), and either the address that was told or the
//! length, or the parasite's first bytes.

use std::time::{Duration, Instant};

use super::{
    Gadget, Hints, StoppedTask,
    area::{Area, TOGETHER},
    blob::PARASITE,
    ledger::Guest,
};
use crate::{
    arch::SigFrame,
    error::{Error, Kind, Result},
    kernel::Kernel,
    procfs::{
        ProcDir,
        maps::{self, Map, VmFlags},
        stat::Stat,
    },
    pstree::RealPid,
    sys::vm,
};

/// Longest time a thread may take to leave the parasite by itself: it may be writing pages to a slow disk.
const LIMIT: Duration = Duration::from_secs(60);
/// How often nothing must be found, and how long apart: a thread may be on its way to make the mapping still.
const LOOKS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(2);
/// How much of the parasite must be there.
const BEGINNING: usize = 64;

/// Whether a mapping may be a parasite's code.
fn suspect(map: &Map) -> bool {
    map.prot == (libc::PROT_READ | libc::PROT_EXEC).cast_unsigned()
        && !map.shared
        && map.ino == 0
        && map.name.is_empty()
        && map.flags.any(VmFlags::NO_RESERVE)
}

/// Takes the parasite out of a process whose engine has been killed. A process that has ended needs nothing.
pub fn cure(guest: &Guest, kernel: &Kernel) -> Result<()> {
    match rid(guest, kernel) {
        Err(e) if matches!(e.kind(), Kind::TaskDied(_)) => Ok(()),
        other => other,
    }
}

fn rid(guest: &Guest, kernel: &Kernel) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    let dir = ProcDir::open(guest.pid)?;
    let mut clean = 0;
    while clean < LOOKS {
        if Stat::read(&dir)?.start_time != guest.start_time {
            return Ok(());
        }
        let ours = |m: &Map| suspect(m) && (m.start == guest.base || m.len() == guest.len);
        let live = dir.thread(live(&dir)?)?;
        match maps::smaps(&live)?.iter().find(|m| ours(m)) {
            None => clean += 1,
            Some(map) if unmap(guest.pid, map.start, guest.len, kernel)? => clean = 0,
            Some(_) if Instant::now() >= deadline => {
                return Err(Error::host(format!(
                    "the parasite in task {} could not be removed: a thread does not leave it",
                    guest.pid
                )));
            }
            Some(_) => {}
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// A thread whose folder has the process's memory: a leader that has ended has none.
fn live(dir: &ProcDir) -> Result<RealPid> {
    match Stat::read(&dir.thread(dir.pid())?)?.state {
        b'Z' | b'X' => dir
            .threads()?
            .into_iter()
            .find(|t| *t != dir.pid())
            .ok_or(Error::new(Kind::TaskDied(dir.pid().0))),
        _ => Ok(dir.pid()),
    }
}

/// Removes the range, unless a thread is in it.
fn unmap(pid: RealPid, base: u64, len: u64, kernel: &Kernel) -> Result<bool> {
    let task = StoppedTask::seize(pid, kernel, LIMIT)?;
    let inside = |at: u64| (base..base + len).contains(&at);
    if task.threads().iter().any(|t| inside(t.regs().rip) || inside(t.regs().rsp)) {
        return Ok(false);
    }
    remove(&task, base, len)?;
    task.release()?;
    Ok(true)
}

fn remove(task: &StoppedTask, base: u64, len: u64) -> Result<()> {
    let thread = task.threads().first().ok_or_else(|| Error::new(Kind::TaskDied(task.pid().0)))?;
    let args = [base, len, 0, 0, 0, 0];
    Gadget::find(thread, &task.live_dir()?, None, &mut Hints::default())?
        .call(thread, "munmap", libc::SYS_munmap as u64, args)
        .map(drop)
}

/// Removes what an engine of this build has left in a stopped process with these mappings, whose guardian was
/// killed too; says whether there was anything.
pub fn remove_from(task: &StoppedTask, maps: &[Map]) -> Result<bool> {
    let mut any = false;
    // As long as one that we would make: nothing may have been written to it yet.
    let frame_len = task.threads().iter().map(|t| SigFrame::max_len(t.xsave())).max().unwrap_or(0);
    let whole = [0, TOGETHER].map(|slots| Area::new(0, &PARASITE, frame_len as u64, slots).len);
    for (i, map) in maps.iter().enumerate().filter(|(_, m)| suspect(m)) {
        let mut code = [0; BEGINNING];
        let empty = whole.contains(&map.len()) && !map.touched;
        let mut ours =
            || vm::read(task.live(), map.start, &mut code).is_ok() && code == PARASITE.code()[..BEGINNING];
        if !empty && !ours() {
            continue;
        }
        // Its further parts follow without a gap, all without reserve and none longer than the parasite.
        let part = |m: &&Map| m.ino == 0 && m.name.is_empty() && m.flags.any(VmFlags::NO_RESERVE);
        let mut end = map.end;
        for next in maps[i + 1..].iter().take_while(part).take(4) {
            if next.start == end && !next.shared {
                end = next.end;
            }
        }
        log::warn!("Task {} has a parasite that nobody has removed: it is removed now", task.pid());
        remove(task, map.start, end - map.start)?;
        any = true;
    }
    Ok(any)
}
