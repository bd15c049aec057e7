//! Births: below whom, and in whose session, every task must have been born.
//!
//! A task gets its session from the one that forks it, and its parent can only become one that was further up
//! all along: when a parent ends, its children go to a subreaper above it. So a tree can be made if, and only if,
//! there is a tree of births in which
//!
//! 1. every task is born below the parent it has in the end, however far below;
//! 2. every member of a session is born by its head or a member, or by the leader of another session that was
//!    itself born in this one and has not yet called setsid ("early"). The head is the leader, or a helper in
//!    its place if that is gone.
//!
//! Nothing forbids being born below somebody: who is too deep moves up. Every history gives such births, with
//! all that ended meanwhile left out; and from births the tree comes about by [`super::Round`]s. What is looked for
//! here is therefore an order in which sessions begin one below the other:
//!
//! ```text
//!   wanted      68 leads a session            born      68
//!               +- 70 in session 69                     +- 72
//!               72 leads a session, beside 68              +- 69 (gone by then, a helper)
//!               +- 73 in session 69                           +- 70
//!                                                             +- 73
//! ```
//!
//! [`needs`] says which session cannot begin before which, [`search`] finds the order, with all members of a
//! session in one line below each other, and [`lift`] takes everybody out of the line who need not be in it.

mod lift;
mod line;
mod missing;
mod needs;
mod search;

use crate::error::Result;

/// The tree in the end, as far as births depend on it. Places number tasks, and behind them heads of sessions
/// that are no tasks; sessions have numbers of their own, 0 for the one that lies outside.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Parent of each place. The root's is the head of session 0; heads that are no tasks have none.
    pub parent: Vec<Option<usize>>,
    /// Session each is in.
    pub session: Vec<usize>,
    /// All sessions.
    pub sessions: Vec<Session>,
}

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    /// Its leader, or who stands for it.
    pub head: usize,
    /// All others in it.
    pub members: Vec<usize>,
}

/// Where one is born.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Birth {
    /// By whom.
    pub under: usize,
    /// In which session.
    pub session: usize,
    /// Whether somebody born below needs `under` above, too.
    pub held: bool,
}

/// All births.
#[derive(Debug)]
pub(super) struct Births {
    /// By place; none for the head of session 0.
    pub of: Vec<Option<Birth>>,
    /// All places, those above before those below.
    pub order: Vec<usize>,
}

impl Wanted {
    /// Whether a place heads its session.
    fn heads(&self, at: usize) -> bool {
        self.sessions[self.session[at]].head == at
    }
}

/// Why there are no births: `child` can be born in no way below its parent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Impossible {
    /// Whose parent.
    pub child: usize,
    /// Whether the search was given up, as it took too long.
    pub gave_up: bool,
}

impl Births {
    /// Finds births for all.
    ///
    /// # Errors
    /// A tree that no history of forks, setsid and ends of parents leads to.
    pub(super) fn find(wanted: &Wanted) -> Result<Births, Impossible> {
        let needs = needs::all(wanted);
        let found = search::Search::new(wanted, &needs).run()?;
        Ok(lift::lift(wanted, &found))
    }
}
