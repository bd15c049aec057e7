//! Something for each open file, in the order of their numbers. There may be very many: two vectors, no tree.

use std::ops::Index;

use crate::pstree::FileId;

/// A map of open files, made at once.
#[derive(Clone, Debug)]
pub struct ById<T> {
    ids: Vec<FileId>,
    values: Vec<T>,
}

/// Place of `id` among sorted numbers, each of which is there once.
pub(super) fn place(ids: &[FileId], id: FileId) -> Option<usize> {
    // Most sets number them one after the other.
    let guess = id.0.checked_sub(ids.first()?.0)? as usize;
    if ids.get(guess) == Some(&id) { Some(guess) } else { ids.binary_search(&id).ok() }
}

impl<T> ById<T> {
    /// Of values that know their numbers, in any order.
    ///
    /// # Errors
    /// A number that stands there twice.
    pub fn new(mut values: Vec<T>, id: impl Fn(&T) -> FileId) -> Result<ById<T>, FileId> {
        values.sort_by_key(&id);
        let ids = values.iter().map(id).collect();
        Self::of_sorted(ids, values)
    }

    /// Of as many numbers, which are sorted, as values.
    ///
    /// # Errors
    /// A number that stands there twice.
    pub fn of_sorted(ids: Vec<FileId>, values: Vec<T>) -> Result<ById<T>, FileId> {
        match ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            Some(pair) => Err(pair[0]),
            None => Ok(ById { ids, values }),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// That of file `id`.
    pub fn get(&self, id: FileId) -> Option<&T> {
        self.values.get(self.place(id)?)
    }

    /// Place of file `id` among all.
    pub fn place(&self, id: FileId) -> Option<usize> {
        place(&self.ids, id)
    }

    /// All with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (FileId, &T)> {
        self.ids.iter().copied().zip(&self.values)
    }

    /// All numbers.
    pub fn ids(&self) -> &[FileId] {
        &self.ids
    }

    /// All values, in the order of their numbers.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// Something else for the same files.
    pub(super) fn map<U>(self, to: impl FnOnce(Vec<T>) -> Vec<U>) -> ById<U> {
        ById { values: to(self.values), ids: self.ids }
    }
}

impl<T> Index<FileId> for ById<T> {
    type Output = T;

    fn index(&self, id: FileId) -> &T {
        self.get(id).unwrap_or_else(|| panic!("there is no file {id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(ids: &[u32]) -> Result<ById<u32>, FileId> {
        ById::new(ids.to_vec(), |id| FileId(*id))
    }

    #[test]
    fn all_are_found_whatever_their_numbers_are() {
        for ids in [&[][..], &[1], &[5, 6, 7, 8], &[9, 7, 8], &[3, 4, 10, 11, 900, 12], &[0, u32::MAX]] {
            let map = map(ids).unwrap();
            for id in 0..1000 {
                assert_eq!(map.get(FileId(id)).copied(), ids.contains(&id).then_some(id));
            }
            let got: Vec<u32> = map.iter().map(|(id, value)| id.0.min(*value)).collect();
            assert!(got.is_sorted() && got.len() == ids.len() && map.len() == got.len());
        }
        assert_eq!(map(&[4, 2, 3, 2]).unwrap_err(), FileId(2));
    }
}
