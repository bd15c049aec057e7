//! Rows of plain data inside the arena, found by their offset.
//!
//! # Safety
//!
//! Unsafe code here only turns offsets that were checked against the arena into views.

use core::marker::PhantomData;

use super::TaskArgs;

/// A row of `T` inside the arena.
#[repr(C)]
#[derive(Debug)]
pub struct Table<T> {
    /// Bytes from the start of the arena, a multiple of 8.
    pub offset: u64,
    /// Number of elements.
    pub count: u64,
    of: PhantomData<T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Table<T> {}
impl<T> PartialEq for Table<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.offset, self.count) == (other.offset, other.count)
    }
}
impl<T> Eq for Table<T> {}
impl<T> Default for Table<T> {
    fn default() -> Self {
        Table::new(0, 0)
    }
}

impl<T> Table<T> {
    /// The row of `count` elements at `offset`.
    pub const fn new(offset: u64, count: u64) -> Self {
        Table { offset, count, of: PhantomData }
    }

    /// The elements.
    ///
    /// # Safety
    /// `args` heads an arena in which this table was laid out; nobody writes to it during `'a`.
    pub unsafe fn get<'a>(self, args: *const TaskArgs) -> &'a [T] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the engine laid the table out inside the arena, aligned to 8.
        unsafe {
            let first = args.cast::<u8>().add(self.offset as usize).cast::<T>();
            core::slice::from_raw_parts(first, self.count as usize)
        }
    }
}

const _: () = assert!(size_of::<Table<u8>>() == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Span;

    #[test]
    fn a_table_finds_its_elements_from_the_start_of_the_arena() {
        let mut words = vec![0u64; size_of::<TaskArgs>() / 8 + 4];
        let at = size_of::<TaskArgs>() / 8;
        words[at..].copy_from_slice(&[1, 2, 3, 4]);
        let args = words.as_ptr().cast::<TaskArgs>();
        let table: Table<Span> = Table::new(size_of::<TaskArgs>() as u64, 2);
        // SAFETY: both spans lie inside the vector.
        let spans = unsafe { table.get(args) };
        assert_eq!(spans, [Span { start: 1, end: 2 }, Span { start: 3, end: 4 }]);
        // SAFETY: an empty table reads nothing.
        assert!(unsafe { Table::<Span>::new(u64::MAX, 0).get(args) }.is_empty());
    }
}
