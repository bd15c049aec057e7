//! What an address space still lacks: ranges, each with the address that its pages have in the images. The two
//! differ once the task has moved memory.

use std::collections::BTreeMap;

/// Pages from `start` up to `end`, which are those from `image` on in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub start: u64,
    pub end: u64,
    pub image: u64,
}

impl Piece {
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// The part of it from `start` up to `end`, which must overlap it.
    fn cut(&self, start: u64, end: u64) -> Piece {
        let from = self.start.max(start);
        Piece { start: from, end: self.end.min(end), image: self.image + (from - self.start) }
    }
}

/// Pieces in order; they do not overlap.
#[derive(Debug, Clone, Default)]
pub struct Missing(BTreeMap<u64, Piece>);

impl Missing {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes in all.
    pub fn bytes(&self) -> u64 {
        self.0.values().map(Piece::len).sum()
    }

    pub fn iter(&self) -> impl Iterator<Item = Piece> {
        self.0.values().copied()
    }

    pub fn first(&self) -> Option<Piece> {
        self.0.first_key_value().map(|(_, piece)| *piece)
    }

    /// The piece that holds `address`.
    pub fn find(&self, address: u64) -> Option<Piece> {
        self.0.range(..=address).next_back().map(|(_, piece)| *piece).filter(|piece| address < piece.end)
    }

    /// Adds a piece; what is there already gives way.
    pub fn insert(&mut self, piece: Piece) {
        if piece.start >= piece.end {
            return;
        }
        self.take(piece.start, piece.end);
        self.0.insert(piece.start, piece);
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: &Missing) {
        other.iter().for_each(|piece| self.insert(piece));
    }

    /// Takes everything from `start` up to `end` out; pieces that reach beyond are cut.
    pub fn take(&mut self, start: u64, end: u64) -> Vec<Piece> {
        let mut touched: Vec<Piece> = Vec::new();
        touched.extend(self.find(start));
        touched
            .extend(self.0.range(start..end.max(start)).map(|(_, piece)| *piece).filter(|p| p.start > start));
        let mut taken = Vec::with_capacity(touched.len());
        for piece in touched {
            self.0.remove(&piece.start);
            if piece.start < start {
                self.0.insert(piece.start, piece.cut(piece.start, start));
            }
            if piece.end > end {
                self.0.insert(end, piece.cut(end, piece.end));
            }
            taken.push(piece.cut(start, end));
        }
        taken
    }

    /// Takes the pieces out whose pages are those from `image` up to `end` in the images.
    ///
    /// Precondition: no page of the images is lacking in two places.
    pub fn take_images(&mut self, image: u64, end: u64) -> Vec<Piece> {
        // Nearly always, as few tasks move memory: no need to look at all of them.
        if self.find(image).is_some_and(|p| p.image == p.start && end <= p.end) {
            return self.take(image, end);
        }
        let overlap = |p: &Piece| p.image < end && p.image + p.len() > image;
        let touched: Vec<Piece> = self.iter().filter(overlap).collect();
        let mut taken = Vec::with_capacity(touched.len());
        for piece in touched {
            let from = piece.start + image.saturating_sub(piece.image);
            let upto = piece.end - (piece.image + piece.len()).saturating_sub(end);
            taken.extend(self.take(from, upto));
        }
        taken
    }

    /// The task has moved `len` bytes.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        for piece in self.take(from, from.saturating_add(len)) {
            let moved = |address: u64| address.wrapping_sub(from).wrapping_add(to);
            self.insert(Piece { start: moved(piece.start), end: moved(piece.end), image: piece.image });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(start: u64, end: u64, image: u64) -> Piece {
        Piece { start, end, image }
    }

    #[test]
    fn taking_cuts_pieces() {
        let mut m = Missing::default();
        m.insert(piece(10, 20, 110));
        m.insert(piece(20, 30, 520));
        assert_eq!(m.take(15, 25), [piece(15, 20, 115), piece(20, 25, 520)]);
        assert_eq!(m.iter().collect::<Vec<_>>(), [piece(10, 15, 110), piece(25, 30, 525)]);
        assert_eq!(m.take(12, 13), [piece(12, 13, 112)]);
        assert_eq!(
            m.iter().collect::<Vec<_>>(),
            [piece(10, 12, 110), piece(13, 15, 113), piece(25, 30, 525)]
        );
        assert_eq!((m.find(12), m.find(13)), (None, Some(piece(13, 15, 113))));
        assert_eq!(m.bytes(), 9);
    }

    #[test]
    fn moved_pages_keep_their_place_in_the_images() {
        let mut m = Missing::default();
        m.insert(piece(10, 20, 10));
        m.remap(12, 100, 4);
        assert_eq!(m.iter().collect::<Vec<_>>(), [piece(10, 12, 10), piece(16, 20, 16), piece(100, 104, 12)]);
        assert_eq!(m.take_images(11, 14), [piece(11, 12, 11), piece(100, 102, 12)]);
        assert_eq!(m.iter().collect::<Vec<_>>(), [piece(10, 11, 10), piece(16, 20, 16), piece(102, 104, 14)]);
    }

    #[derive(Debug, Clone)]
    enum Do {
        Insert(u64, u64),
        Take(u64, u64),
        Remap(u64, u64, u64),
        Images(u64, u64),
    }

    fn any_do() -> impl Strategy<Value = Do> {
        prop_oneof![
            (0..60u64, 0..20u64).prop_map(|(a, n)| Do::Insert(a, n)),
            (0..60u64, 0..20u64).prop_map(|(a, n)| Do::Take(a, n)),
            (0..30u64, 60..90u64, 0..20u64).prop_map(|(a, b, n)| Do::Remap(a, b, n)),
            (0..60u64, 0..20u64).prop_map(|(a, n)| Do::Images(a, n)),
        ]
    }

    proptest! {
        /// Against a plain array: which image page each address lacks.
        #[test]
        fn it_does_what_an_array_does(all in prop::collection::vec(any_do(), 0..30)) {
            let mut m = Missing::default();
            let mut array = [None; 120];
            for (n, what) in all.into_iter().enumerate() {
                match what {
                    Do::Insert(a, len) => {
                        // Those that nobody has moved are where the images say.
                        let there = |lacks: &Option<u64>| lacks.is_some_and(|image| (a..a + len).contains(&image));
                        let image = if array.iter().any(there) { 1000 * n as u64 } else { a };
                        m.insert(piece(a, a + len, image));
                        (0..len).for_each(|i| array[(a + i) as usize] = Some(image + i));
                    }
                    Do::Images(a, len) => {
                        let pages = |p: &Piece| (0..p.len()).map(|i| (p.start + i, p.image + i)).collect::<Vec<_>>();
                        let taken: Vec<_> = m.take_images(a, a + len).iter().flat_map(pages).collect();
                        let of = |lacks: &Option<u64>| lacks.filter(|image| (a..a + len).contains(image));
                        let all = array.iter().enumerate();
                        let expected: Vec<_> =
                            all.filter_map(|(at, lacks)| Some((at as u64, of(lacks)?))).collect();
                        prop_assert_eq!(taken, expected);
                        array.iter_mut().filter(|lacks| of(lacks).is_some()).for_each(|lacks| *lacks = None);
                    }
                    Do::Take(a, len) => {
                        m.take(a, a + len);
                        (0..len).for_each(|i| array[(a + i) as usize] = None);
                    }
                    Do::Remap(a, b, len) => {
                        m.remap(a, b, len);
                        let old: Vec<_> = (0..len).map(|i| array[(a + i) as usize].take()).collect();
                        for (i, was) in old.into_iter().enumerate().filter(|(_, was)| was.is_some()) {
                            array[b as usize + i] = was;
                        }
                    }
                }
                for (at, lacks) in array.iter().enumerate() {
                    let at = at as u64;
                    prop_assert_eq!(m.find(at).map(|p| p.image + (at - p.start)), *lacks);
                }
            }
        }
    }
}
