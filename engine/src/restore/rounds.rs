//! Orphans made one after the other: what each task does in the plan's rounds.
//!
//! ```text
//! turn 3n      the reaper of round n becomes one
//!      3n + 1  the helper's parent has it end, and reaps it: its children have come to the reaper by then
//!      3n + 2  the reaper is none any more
//! ```
//!
//! Whoever has had a turn wakes the next one only, so a round costs the same in a tree of any size.

use crate::error::{Context, Result};
use crate::restore::fork;
use crate::restore::stages::Area;
use crate::restore::task::{self, TaskCx};
use crate::restore::tree::Round;

/// Takes the task's turns, and waits until nobody has one left. A helper of a round ends here.
///
/// Precondition: everybody exists, and no task is a reaper; descendants of those who will be were forked while
/// they were, as kernels before 4.12 look for reapers only then.
pub fn take_turns(cx: &TaskCx<'_>) -> Result<()> {
    let rounds = &cx.plan.tree.rounds;
    let Some(last) = rounds.len().checked_sub(1) else { return Ok(()) };
    let (me, area) = (cx.task, cx.area);
    for (at, round) in rounds.iter().enumerate() {
        let turn = at as u32 * 3;
        if round.helper == me {
            area.wait_turn(me, turn + 1)?;
            fork::leave(0);
        }
        if round.reaper == me {
            if turn > 0 {
                area.wait_turn(me, turn)?;
            }
            task::adopt_orphans(true)?;
            area.give_turn(round.parent, turn + 1)?;
            area.wait_turn(me, turn + 2)?;
            task::adopt_orphans(false)?;
            match rounds.get(at + 1) {
                Some(next) => area.give_turn(next.reaper, turn + 3)?,
                None => area.turns_over()?,
            }
        }
        if round.parent == me {
            area.wait_turn(me, turn + 1)?;
            orphan(cx, area, round, turn)?;
        }
    }
    log::debug!("Waiting for the last of {} rounds", last + 1);
    area.wait_turned()
}

fn orphan(cx: &TaskCx<'_>, area: &Area, round: &Round, turn: u32) -> Result<()> {
    let pid = cx.plan.node(round.helper).pid;
    area.give_turn(round.helper, turn + 1)?;
    fork::reap(crate::pstree::RealPid(pid.0)).during(|| format!("helper {pid}"))?;
    area.give_turn(round.reaper, turn + 2)
}
