//! Trees: `tree DEPTH WIDTH` forks WIDTH members, the first of which goes on down to DEPTH.

use nix::unistd::{Pid, getpgid, getsid, setsid};

use crate::kit::crew::{Member, member};
use crate::kit::{Check, mem, number, rest, same};

fn level(depth: usize, width: usize, seed: u64) -> Check {
    let memory = mem::anon(8 * mem::PAGE)?;
    memory.fill(seed);
    let mut crew = Vec::new();
    for i in 0..if depth > 0 { width } else { 0 } {
        let below = if i == 0 { depth - 1 } else { 0 };
        let seed = seed.wrapping_mul(31).wrapping_add(i as u64 + 1);
        crew.push(member(move || {
            // Every fifth starts a session of its own.
            if seed.is_multiple_of(5) {
                setsid()?;
            }
            level(below, width, seed)
        })?);
    }
    let me = || -> anyhow::Result<_> { Ok((Pid::this(), Pid::parent(), getpgid(None)?, getsid(None)?)) };
    let before = me()?;
    rest()?;
    same("(pid, parent, group, session)", me()?, before)?;
    memory.check("memory of a member", seed)?;
    crew.iter().try_for_each(Member::ask)?;
    crew.iter().try_for_each(Member::wait)
}

/// See the module.
pub fn run(args: &[String]) -> Check {
    level(number(args, 0, 3)?, number(args, 1, 3)?, 1)
}
