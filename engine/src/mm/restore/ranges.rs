//! Which addresses are taken, and where there is room.

/// `TASK_SIZE` less what programs never get: nothing is placed above.
const TOP: u64 = crate::arch::TASK_SIZE;
/// Nothing is placed below: well above `vm.mmap_min_addr` and the places programs like to ask for.
const BOTTOM: u64 = 16 << 20;
/// Room left free around what is placed, so that stacks can grow and neighbours do not merge.
const DISTANCE: u64 = 4 << 20;

/// Addresses from the first up to, not including, the second.
pub type Range = (u64, u64);

/// Sorted ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range>);

impl FromIterator<Range> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range>>(ranges: I) -> Ranges {
        let mut all: Vec<Range> = ranges.into_iter().filter(|r| r.0 < r.1).collect();
        all.sort_unstable();
        let mut merged: Vec<Range> = Vec::with_capacity(all.len());
        for (start, end) in all {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        Ranges(merged)
    }
}

impl Ranges {
    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range> {
        self.0.iter().copied()
    }

    /// Both together.
    pub fn union(&self, other: &Ranges) -> Ranges {
        self.iter().chain(other.iter()).collect()
    }

    /// Whether any address from `start` up to `end` is in it.
    pub fn touches(&self, start: u64, end: u64) -> bool {
        let at = self.0.partition_point(|r| r.1 <= start);
        self.0.get(at).is_some_and(|r| r.0 < end)
    }

    /// What of it is not in `other`.
    pub fn without(&self, other: &Ranges) -> Ranges {
        let mut left = Vec::new();
        let mut holes = other.iter().peekable();
        for (mut start, end) in self.iter() {
            while holes.next_if(|h| h.1 <= start).is_some() {}
            while let Some(&(from, to)) = holes.peek().filter(|h| h.0 < end) {
                if from > start {
                    left.push((start, from));
                }
                start = to;
                if to >= end {
                    break;
                }
                holes.next();
            }
            if start < end {
                left.push((start, end));
            }
        }
        Ranges(left)
    }

    /// A free place of `len` bytes at a multiple of `align` (a power of two), in the middle of the largest
    /// gap and with distance to everything; `None` if there is no such gap.
    pub fn room(&self, len: u64, align: u64) -> Option<u64> {
        let starts = [(0, BOTTOM)].into_iter().chain(self.iter());
        let ends = self.iter().chain([(TOP, TOP)]);
        let (start, end) = starts
            .zip(ends)
            .map(|(before, after)| (before.1.max(BOTTOM), after.0.min(TOP)))
            .max_by_key(|gap| gap.1.saturating_sub(gap.0))?;
        let free = end.checked_sub(start)?.checked_sub(len)?.checked_sub(2 * DISTANCE)?;
        let at = (start + DISTANCE + free / 2).checked_next_multiple_of(align)?;
        (at.checked_add(len)? <= end - DISTANCE).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges(list: &[Range]) -> Ranges {
        list.iter().copied().collect()
    }

    #[test]
    fn ranges_are_sorted_and_joined() {
        assert_eq!(ranges(&[(5, 7), (1, 3), (3, 4), (6, 9), (2, 2)]).0, [(1, 4), (5, 9)]);
        let r = ranges(&[(10, 20), (30, 40)]);
        assert!(r.touches(19, 25) && r.touches(0, 100) && r.touches(39, 40));
        assert!(!r.touches(20, 30) && !r.touches(40, 50) && !r.touches(0, 10));
    }

    #[test]
    fn without_takes_away() {
        let r = ranges(&[(0, 10), (20, 30), (40, 50)]);
        assert_eq!(
            r.without(&ranges(&[(2, 3), (5, 22), (25, 26), (29, 45)])).0,
            [(0, 2), (3, 5), (22, 25), (26, 29), (45, 50)]
        );
        assert_eq!(r.without(&ranges(&[])), r);
        assert_eq!(r.without(&ranges(&[(0, 100)])).0, []);
    }

    #[test]
    fn room_keeps_its_distance() {
        let stack = (0x7ff0_0000_0000, 0x7ff0_0010_0000);
        let taken = ranges(&[(0x40_0000, 0x50_0000), stack]);
        let at = taken.room(1 << 30, 1 << 21).unwrap();
        assert!(
            at.is_multiple_of(1 << 21) && at > 0x50_0000 + DISTANCE && at + (1 << 30) + DISTANCE <= stack.0
        );
        // Most of the space reserved, as some sanitizers do.
        let taken = ranges(&[(0x1000, 0x6000_0000_0000), (0x6100_0000_0000, TOP)]);
        assert!(taken.room(0xff_0000_0000, 4096).is_some());
        assert_eq!(taken.room(0x100_0000_0000, 4096), None);
        assert_eq!(ranges(&[(0, TOP)]).room(4096, 4096), None);
        assert_eq!(ranges(&[]).room(u64::MAX, 4096), None);
    }

    proptest! {
        #[test]
        fn room_is_free(list in prop::collection::vec((0u64..TOP, 0u64..1 << 44), 0..20), len in 1u64..1 << 45) {
            let taken: Ranges = list.iter().map(|&(at, len)| (at, at + len)).collect();
            if let Some(at) = taken.room(len, 1 << 21) {
                prop_assert!(!taken.touches(at, at + len));
                prop_assert!(at >= BOTTOM && at + len <= TOP);
            }
        }

        #[test]
        fn difference_and_union_agree(a in prop::collection::vec((0u64..60, 0u64..60), 0..9),
                                      b in prop::collection::vec((0u64..60, 0u64..60), 0..9)) {
            let (a, b): (Ranges, Ranges) = (a.into_iter().collect(), b.into_iter().collect());
            let (both, less) = (a.union(&b), a.without(&b));
            for n in 0..60 {
                let (in_a, in_b) = (a.touches(n, n + 1), b.touches(n, n + 1));
                prop_assert_eq!(both.touches(n, n + 1), in_a || in_b);
                prop_assert_eq!(less.touches(n, n + 1), in_a && !in_b);
            }
        }
    }
}
