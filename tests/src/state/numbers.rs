//! Pids as a tree itself counts them: a pid namespace of its own has other numbers for its tasks than /proc shows, which
//! a restore keeps while those outside change.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result};

/// What /proc shows, with what the tree calls it.
pub(super) struct Numbers {
    inside: HashMap<i32, i32>,
    /// The tree has a pid namespace of its own.
    own: bool,
}

impl Numbers {
    /// For the tree of `root`, whose processes are `pids`.
    pub(super) fn of(root: i32, pids: &[i32]) -> Result<Numbers> {
        let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/pid"));
        let own =
            matches!((namespace("self"), namespace(&root.to_string())), (Ok(ours), Ok(its)) if ours != its);
        let mut inside = HashMap::new();
        for pid in pids.iter().filter(|_| own) {
            for thread in super::sorted_numbers(&format!("/proc/{pid}/task"))? {
                let status = fs::read(format!("/proc/{pid}/task/{thread}/status")).context("status")?;
                let status = String::from_utf8_lossy(&status);
                let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                let number = line.and_then(|line| line.split_whitespace().last()?.parse().ok());
                inside.insert(thread, number.context("no NSpid in status")?);
            }
        }
        Ok(Numbers { inside, own })
    }

    /// The number inside; 0 for who is not there.
    pub(super) fn within(&self, pid: i32) -> i32 {
        if self.own { self.inside.get(&pid).copied().unwrap_or(0) } else { pid }
    }

    /// The same of a number that is text.
    pub(super) fn in_text(&self, number: &str) -> String {
        number.parse().map_or_else(|_| number.to_string(), |pid| self.within(pid).to_string())
    }

    /// Of a list of numbers, from the outermost namespace inwards, those that a restore keeps.
    pub(super) fn innermost(&self, numbers: &str) -> String {
        match numbers.split_whitespace().last() {
            Some(last) if self.own => last.into(),
            _ => numbers.trim().into(),
        }
    }

    /// A line of fdinfo; one of a lock has its owner in the fifth word: `lock: 1: POSIX ADVISORY WRITE 1234 ...`.
    pub(super) fn in_lock(&self, line: &str) -> String {
        if !self.own || !line.starts_with("lock:") {
            return line.into();
        }
        let words = line.split_whitespace().enumerate();
        let words = words.map(|(at, word)| if at == 5 { self.in_text(word) } else { word.into() });
        words.collect::<Vec<String>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::Numbers;

    #[test]
    fn numbers_are_those_inside() {
        let numbers = Numbers { inside: [(70, 1), (71, 2)].into(), own: true };
        assert_eq!(numbers.in_text("71"), "2");
        assert_eq!(numbers.in_text("5"), "0");
        assert_eq!(numbers.innermost("71\t2"), "2");
        assert_eq!(
            numbers.in_lock("lock:\t1: POSIX  ADVISORY  WRITE 71 fe:00:3 0 EOF"),
            "lock: 1: POSIX ADVISORY WRITE 2 fe:00:3 0 EOF"
        );
        let numbers = Numbers { inside: [].into(), own: false };
        assert_eq!(numbers.in_text("71"), "71");
    }
}
