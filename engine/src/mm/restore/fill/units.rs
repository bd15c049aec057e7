//! What is read at a time, and into which memory.

use std::collections::VecDeque;

use super::huge;
use crate::sys::map::MAX_PIECES;

/// Bytes of a unit at most.
pub const UNIT: u64 = 16 << 20;

/// What one thread reads at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unit {
    pub offset: u64,
    pub len: u64,
    pub pieces: Vec<(u64, u64)>,
}

impl Unit {
    /// Its length up to where `size` bytes of memory end, in the piece that it begins with if that is long.
    pub fn until(&self, size: u64) -> u64 {
        self.pieces.first().map_or(size, |(at, _)| size - at % size).min(self.len)
    }

    /// Its first `len` bytes, which it loses.
    pub fn cut(&mut self, len: u64) -> Unit {
        let mut first = Unit { offset: self.offset, len, pieces: Vec::new() };
        let mut left = len;
        for (at, len) in std::mem::take(&mut self.pieces) {
            let part = len.min(left);
            left -= part;
            first.pieces.extend((part > 0).then_some((at, part)));
            self.pieces.extend((part < len).then_some((at + part, len - part)));
        }
        self.offset += len;
        self.len -= len;
        first
    }
}

/// Cuts pieces into units. Long pieces are cut where a block of memory begins.
pub(super) fn units(mut offset: u64, pieces: &[(u64, u64)]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut left: VecDeque<(u64, u64)> = pieces.iter().copied().collect();
    while let Some((at, len)) = left.pop_front() {
        let part = len.min(UNIT - at % UNIT);
        if part < len {
            left.push_front((at + part, len - part));
        }
        match units.last_mut() {
            Some(unit) if unit.len + part <= UNIT && unit.pieces.len() < MAX_PIECES => {
                unit.pieces.push((at, part));
                unit.len += part;
            }
            _ => units.push(Unit { offset, len: part, pieces: vec![(at, part)] }),
        }
        offset += part;
    }
    units
}

/// Blocks of a mapping that are full in the images, by their addresses, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Blocks(Vec<(u64, u64)>);

impl Blocks {
    /// All blocks of `size` bytes, a power of two, inside `ranges`, which ascend; ranges that touch are one.
    pub fn inside(ranges: impl Iterator<Item = (u64, u64)>, size: u64) -> Blocks {
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        let mut add = |start: u64, end: u64| {
            let (start, end) = (start.next_multiple_of(size), end - end % size);
            if start < end {
                blocks.push((start, end));
            }
        };
        let mut open = (0, 0);
        for (start, end) in ranges {
            if start == open.1 {
                open.1 = end;
            } else {
                add(open.0, open.1);
                open = (start, end);
            }
        }
        add(open.0, open.1);
        Blocks(blocks)
    }

    /// Those that start in `[from, to)`: in one range for each that they were made of.
    pub(super) fn starting_in(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.0.partition_point(|b| b.1 <= from);
        let here = self.0[first..].iter().take_while(move |b| b.0 < to);
        here.filter_map(move |&(start, end)| {
            let start = start.max(from.next_multiple_of(huge::SIZE));
            let end = end.min(to.next_multiple_of(huge::SIZE));
            (start < end && start < to).then_some((start, end))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    #[test]
    fn units_are_cut_at_blocks() {
        let pieces = [(3 * MB, 30 * MB), (100 * MB, 4096), (200 * MB, MB)];
        let units = units(7, &pieces);
        let seen: Vec<_> = units.iter().map(|u| (u.offset - 7, u.len, u.pieces.len())).collect();
        assert_eq!(seen, [(0, 13 * MB, 1), (13 * MB, 16 * MB, 1), (29 * MB, 2 * MB + 4096, 3)]);
        assert_eq!(units[1].pieces, [(16 * MB, 16 * MB)]);
        assert_eq!(units[2].pieces, [(32 * MB, MB), (100 * MB, 4096), (200 * MB, MB)]);
        let many: Vec<(u64, u64)> = (0..MAX_PIECES as u64 + 1).map(|n| (n * 8192, 4096)).collect();
        assert_eq!(super::units(0, &many).len(), 2);
    }

    #[test]
    fn blocks_are_full() {
        let ranges = [(MB, 3 * MB), (3 * MB, 5 * MB), (6 * MB, 9 * MB), (10 * MB, 12 * MB)];
        let blocks = Blocks::inside(ranges.into_iter(), 2 * MB);
        assert_eq!(blocks.0, [(2 * MB, 4 * MB), (6 * MB, 8 * MB), (10 * MB, 12 * MB)]);
        let of = |from, to| blocks.starting_in(from, to).collect::<Vec<_>>();
        assert_eq!(of(0, 3 * MB), [(2 * MB, 4 * MB)]);
        assert_eq!(of(3 * MB, 6 * MB), []);
        assert_eq!(of(6 * MB, 64 * MB), [(6 * MB, 8 * MB), (10 * MB, 12 * MB)]);
        assert_eq!(of(11 * MB, 64 * MB), []);
    }

    #[test]
    fn units_are_cut() {
        let mut unit = Unit { offset: 100, len: 30, pieces: vec![(1000, 10), (2000, 10), (3000, 10)] };
        let first = unit.cut(15);
        assert_eq!(first, Unit { offset: 100, len: 15, pieces: vec![(1000, 10), (2000, 5)] });
        assert_eq!(unit, Unit { offset: 115, len: 15, pieces: vec![(2005, 5), (3000, 10)] });
        assert_eq!(
            (unit.cut(5), unit.cut(10).len, unit.len),
            (Unit { offset: 115, len: 5, pieces: vec![(2005, 5)] }, 10, 0)
        );
    }
}
