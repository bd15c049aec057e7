//! The order in which sessions begin.
//!
//! A session of which nothing is missing begins at once, below all that is there: that can only help the others.
//! Otherwise one begins that misses nothing but leaders whom its members have above them; those are born in it,
//! early, and the sessions left are dealt out: some must go on below one of these leaders, all others below the
//! whole line. Which session that is, among those that miss each other all around, is the only choice; where it
//! leads nowhere the next one is tried.

use super::line::{self, Line};
use super::missing::Missing;
use super::needs::Need;
use super::{Impossible, Wanted};

/// How often a choice may be taken back before the search is given up.
const PATIENCE: u32 = 20_000;

/// Sessions to begin one below the other.
#[derive(Clone, Debug)]
struct Part {
    /// Below whom.
    tip: Option<usize>,
    /// The one that begins first, if that is settled. Not in `todo`.
    first: Option<usize>,
    todo: Vec<usize>,
    /// The last choice that led here.
    choice: Option<usize>,
}

#[derive(Debug)]
struct Choice {
    part: Part,
    /// Those not tried yet, the best last.
    left: Vec<usize>,
    /// What there was when it was made.
    placed: usize,
    parts: Vec<Part>,
}

/// What [`Search::run`] finds.
#[derive(Debug)]
pub(super) struct Found {
    /// Below whom each is born; none for the head of session 0.
    pub under: Vec<Option<usize>>,
    /// Session that a leader is born in early.
    pub early: Vec<Option<usize>>,
    /// All, those above before those below.
    pub order: Vec<usize>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Search<'a> {
    wanted: &'a Wanted,
    needs: &'a [Vec<Need>],
    found: Found,
    parts: Vec<Part>,
    choices: Vec<Choice>,
    /// The part that led nowhere first.
    stuck: Option<usize>,
}

/// What became of a part.
enum Outcome {
    /// It is done, or split into others.
    Done,
    /// One of these must begin first.
    Choose(Part, Vec<usize>),
    /// There is no way from the choice that led to it.
    Dead(Option<usize>),
}

impl<'a> Search<'a> {
    pub fn new(wanted: &'a Wanted, needs: &'a [Vec<Need>]) -> Search<'a> {
        let places = wanted.parent.len();
        let todo = (1..wanted.sessions.len()).collect();
        Search {
            wanted,
            needs,
            found: Found { under: vec![None; places], early: vec![None; places], order: Vec::new() },
            parts: vec![Part { tip: None, first: Some(0), todo, choice: None }],
            choices: Vec::new(),
            stuck: None,
        }
    }

    /// # Errors
    /// There is no order; or none was found in the time allowed.
    pub fn run(mut self) -> Result<Found, Impossible> {
        let mut patience = PATIENCE;
        while let Some(part) = self.parts.pop() {
            let dead = match self.work(part) {
                Outcome::Done => continue,
                Outcome::Dead(choice) => choice,
                Outcome::Choose(part, left) => {
                    let (placed, parts) = (self.found.order.len(), self.parts.clone());
                    self.choices.push(Choice { part, left, placed, parts });
                    Some(self.choices.len() - 1)
                }
            };
            if patience == 0 || !self.next_of(dead) {
                let child = self.stuck.unwrap_or(0);
                return Err(Impossible { child, gave_up: patience == 0 });
            }
            patience -= 1;
        }
        Ok(self.found)
    }

    /// Goes on with the next possibility of a choice, or of the one before. Whatever was done after it is undone.
    fn next_of(&mut self, mut choice: Option<usize>) -> bool {
        while let Some(at) = choice {
            self.choices.truncate(at + 1);
            let Some(made) = self.choices.last_mut() else { return false };
            for at in self.found.order.drain(made.placed..) {
                (self.found.under[at], self.found.early[at]) = (None, None);
            }
            self.parts.clone_from(&made.parts);
            if let Some(first) = made.left.pop() {
                let mut part = made.part.clone();
                part.todo.retain(|s| *s != first);
                part.first = Some(first);
                part.choice = Some(at);
                self.parts.push(part);
                return true;
            }
            choice = made.part.choice;
        }
        false
    }

    fn work(&mut self, mut part: Part) -> Outcome {
        if let Some(first) = part.first.take() {
            let Some(line) = line::begin(self.wanted, self.needs, first, &part.todo) else {
                return self.dead(&part, first);
            };
            if !self.begin(&mut part, first, line) {
                return Outcome::Done;
            }
        }
        let mut missing = Missing::of(self.needs, &part.todo);
        while let Some(free) = missing.free.pop_first() {
            let Some(order) = line::alone(self.wanted, free) else { return self.dead(&part, free) };
            self.place(&mut part, free, &order);
            missing.has_begun(free);
        }
        part.todo.retain(|s| missing.count.contains_key(s));
        if part.todo.is_empty() {
            return Outcome::Done;
        }
        let mut left = missing.candidates(self.needs, &part.todo);
        if left.is_empty() {
            return self.dead(&part, part.todo[0]);
        }
        left.reverse();
        Outcome::Choose(part, left)
    }

    fn dead(&mut self, part: &Part, session: usize) -> Outcome {
        let missing = self.needs[session].iter().find(|n| part.todo.contains(&n.of));
        self.stuck = self.stuck.or(missing.map(|n| n.child));
        Outcome::Dead(part.choice)
    }

    /// Places the session that a part begins with. Gives whether the part goes on: not where it was split.
    fn begin(&mut self, part: &mut Part, session: usize, line: Line) -> bool {
        self.place(part, session, &line.order);
        if line.branches.is_empty() {
            return true;
        }
        self.parts.push(Part { tip: part.tip, first: None, todo: line.rest, choice: part.choice });
        for (branch, todo) in line.branches {
            let head = self.wanted.sessions[branch].head;
            self.found.early[head] = Some(session);
            self.parts.push(Part { tip: Some(head), first: Some(branch), todo, choice: part.choice });
        }
        false
    }

    fn place(&mut self, part: &mut Part, session: usize, order: &[usize]) {
        let head = self.wanted.sessions[session].head;
        // That of an early leader is there already.
        let head = Some(head).filter(|h| part.tip != Some(*h));
        for at in head.iter().chain(order) {
            self.found.under[*at] = part.tip;
            self.found.order.push(*at);
            part.tip = Some(*at);
        }
    }
}
