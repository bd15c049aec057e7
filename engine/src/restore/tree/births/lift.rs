//! Births as high up as they can be: who needs nobody else above is born by the parent it has in the end.

use std::collections::BTreeSet;

use super::search::Found;
use super::{Birth, Births, Wanted};

/// Takes everybody out of the line but those below whom others need to be.
pub(super) fn lift(wanted: &Wanted, found: &Found) -> Births {
    let places = wanted.parent.len();
    let mut depth = vec![0; places];
    for at in &found.order {
        depth[*at] = found.under[*at].map_or(0, |under| depth[under] + 1);
    }
    // Whom something born below needs above, by depth. All of them are on one way up.
    let mut needed: Vec<BTreeSet<(usize, usize)>> = vec![BTreeSet::new(); places];
    let mut of = vec![None; places];
    for at in found.order.iter().rev().copied() {
        let mut needs = std::mem::take(&mut needed[at]);
        needs.remove(&(depth[at], at));
        // Its parent, if nobody below needs that, too.
        let own = wanted.parent[at].map(|p| (depth[p], p)).filter(|p| needs.insert(*p));
        let Some(birth) = birth(wanted, found, at, &needs) else { continue };
        let under = birth.under;
        let key = (depth[under], under);
        of[at] = Some(Birth { held: needs.contains(&key) && own != Some(key), ..birth });
        let (small, large) = match needs.len() < needed[under].len() {
            true => (needs, &mut needed[under]),
            false => (std::mem::replace(&mut needed[under], needs), &mut needed[under]),
        };
        large.extend(small);
    }
    let mut births = Births { of, order: found.order.clone() };
    births.sort();
    births
}

/// By the deepest of those who must be above, as far as the session allows.
fn birth(wanted: &Wanted, found: &Found, at: usize, needs: &BTreeSet<(usize, usize)>) -> Option<Birth> {
    let deepest = needs.last().map(|(_, under)| *under);
    let session = match found.early[at] {
        Some(early) => early,
        None if wanted.heads(at) => {
            // It leaves whatever session it is born in.
            let under = deepest?;
            return Some(Birth { under, session: wanted.session[under], held: false });
        }
        None => wanted.session[at],
    };
    let born_in = |who: &usize| wanted.session[*who] == session || found.early[*who] == Some(session);
    let under = deepest.filter(born_in).unwrap_or(wanted.sessions[session].head);
    Some(Birth { under, session, held: false })
}

impl Births {
    /// Those above before those below, by depth.
    fn sort(&mut self) {
        let mut depth = vec![0; self.of.len()];
        for at in &self.order {
            depth[*at] = self.of[*at].map_or(0, |birth| depth[birth.under] + 1);
        }
        self.order.sort_by_key(|at| (depth[*at], *at));
    }
}
