//! Who shares what: every kernel object gets a number once, and everything else compares numbers.
//!
//! The kernel orders objects (kcmp), so a sorted list finds an object's number with `log n` questions. Open
//! files are first put into buckets by what fstat and fdinfo tell, because files that differ there need no
//! question at all: in a tree of 10,000 descriptors nearly every bucket holds a single file.

use std::{cmp::Ordering, collections::HashMap, hash::Hash};

use crate::{
    error::{Context, Error, Result},
    kernel::Kernel,
    pstree::{FileId, RealPid},
    sys::kcmp::{self, What},
};

/// Objects in the kernel's order, each with a task (and descriptor) through which it can be named again.
#[derive(Debug)]
pub(crate) struct KcmpTree<N> {
    sorted: Vec<(RealPid, i32, N)>,
}

impl<N: Copy> KcmpTree<N> {
    /// An empty tree.
    pub(crate) fn new() -> Self {
        KcmpTree { sorted: Vec::new() }
    }

    /// The number of `task`'s object, given out by `new` if it was not seen before; and whether it was new.
    /// `what` says what is compared; it gets the descriptors of the known object and of this one.
    /// Preconditions: every task ever passed is still there and cannot change the object (it is frozen).
    pub(crate) fn number(
        &mut self,
        task: RealPid,
        fd: i32,
        what: impl Fn(i32, i32) -> What,
        new: impl FnOnce() -> Result<N>,
    ) -> Result<(N, bool)> {
        self.number_by(task, fd, new, |other, other_fd| kcmp::compare(other, task, what(other_fd, fd)))
    }

    /// As [`KcmpTree::number`]; `compare` orders a known object against the one in question.
    fn number_by(
        &mut self,
        task: RealPid,
        fd: i32,
        new: impl FnOnce() -> Result<N>,
        mut compare: impl FnMut(RealPid, i32) -> Result<Ordering>,
    ) -> Result<(N, bool)> {
        let (mut low, mut high) = (0, self.sorted.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let (known, known_fd, number) = self.sorted[middle];
            match compare(known, known_fd)? {
                Ordering::Equal => return Ok((number, false)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        let number = new()?;
        self.sorted.insert(low, (task, fd, number));
        Ok((number, true))
    }
}

/// What two descriptors of one open file must agree in.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct FileKey {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) pos: u64,
    /// Without O_CLOEXEC, which is the descriptor's.
    pub(crate) flags: u32,
    pub(crate) mnt_id: i32,
    /// Anything else that tells files apart (the kernel's own number of an eventfd), else 0.
    pub(crate) more: u64,
}

/// Gives open files their numbers, from 1 on.
#[derive(Debug)]
pub(crate) struct FileIds {
    buckets: HashMap<FileKey, Bucket>,
    next: u32,
    kcmp: bool,
}

#[derive(Debug)]
enum Bucket {
    /// Not compared with anything yet.
    One(RealPid, i32, FileId),
    Tree(KcmpTree<FileId>),
}

impl FileIds {
    pub(crate) fn new(kernel: &Kernel) -> Self {
        FileIds { buckets: HashMap::new(), next: 1, kcmp: kernel.kcmp }
    }

    /// A number for a file that nothing shares: entries that exist in images only, or files known by path.
    pub(crate) fn fresh(&mut self) -> Result<FileId> {
        let id = FileId(self.next);
        self.next = self.next.checked_add(1).ok_or_else(|| Error::host("too many open files to number"))?;
        Ok(id)
    }

    /// The number of the open file behind descriptor `fd` of `task`, and whether it was not seen before.
    pub(crate) fn of_fd(&mut self, key: FileKey, task: RealPid, fd: i32) -> Result<(FileId, bool)> {
        let next = &mut self.next;
        let mut fresh = || {
            let id = FileId(*next);
            *next = next.checked_add(1).ok_or_else(|| Error::host("too many open files to number"))?;
            Ok(id)
        };
        match self.buckets.get_mut(&key) {
            None => {
                let id = fresh()?;
                self.buckets.insert(key, Bucket::One(task, fd, id));
                Ok((id, true))
            }
            Some(bucket) => {
                if !self.kcmp {
                    return Err(Error::unsupported(
                        "descriptors that look alike cannot be told apart: this kernel has no kcmp",
                    )
                    .remedy("run a kernel with CONFIG_KCMP"));
                }
                let tree = bucket.as_tree();
                tree.number(task, fd, What::File, fresh).during(|| format!("fd {fd} of task {task}"))
            }
        }
    }
}

impl Bucket {
    fn as_tree(&mut self) -> &mut KcmpTree<FileId> {
        if let Bucket::One(task, fd, id) = *self {
            let mut tree = KcmpTree::new();
            tree.sorted.push((task, fd, id));
            *self = Bucket::Tree(tree);
        }
        match self {
            Bucket::Tree(tree) => tree,
            Bucket::One(..) => unreachable!("made a tree just above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd};

    use super::*;

    #[test]
    fn objects_are_numbered_once_with_few_questions() {
        // Objects are numbers here; their order stands in for the kernel's.
        let mut tree = KcmpTree::<u32>::new();
        let (mut next, mut questions) = (0, 0);
        let objects: Vec<i32> = (0..10_000).map(|n| (n * 7919) % 5_000).collect();
        let mut given = HashMap::new();
        for &object in &objects {
            let (number, new) = tree
                .number_by(
                    RealPid(1),
                    object,
                    || {
                        next += 1;
                        Ok(next)
                    },
                    |_, other| {
                        questions += 1;
                        Ok(other.cmp(&object))
                    },
                )
                .unwrap();
            assert_eq!(new, !given.contains_key(&object));
            assert_eq!(*given.entry(object).or_insert(number), number);
        }
        assert_eq!(next, 5_000);
        assert!(questions <= objects.len() * 13, "{questions} questions");
    }

    #[test]
    fn descriptors_of_one_open_file_get_one_number() {
        let kernel = Kernel::probe().unwrap();
        if !kernel.kcmp {
            eprintln!("SKIP: no kcmp");
            return;
        }
        let me = RealPid(std::process::id().cast_signed());
        let a = File::open("/dev/null").unwrap();
        let b = File::open("/dev/null").unwrap();
        let a2 = a.try_clone().unwrap();
        let key = FileKey { dev: 1, ino: 2, pos: 0, flags: 0, mnt_id: 3, more: 0 };
        let mut ids = FileIds::new(&kernel);
        assert_eq!(ids.of_fd(key, me, a.as_raw_fd()).unwrap(), (FileId(1), true));
        assert_eq!(ids.of_fd(key, me, b.as_raw_fd()).unwrap(), (FileId(2), true));
        assert_eq!(ids.of_fd(key, me, a2.as_raw_fd()).unwrap(), (FileId(1), false));
        assert_eq!(ids.fresh().unwrap(), FileId(3));
        assert_eq!(ids.of_fd(key, me, b.as_raw_fd()).unwrap(), (FileId(2), false));
        assert_eq!(ids.of_fd(FileKey { pos: 1, ..key }, me, a.as_raw_fd()).unwrap(), (FileId(4), true));
    }

    #[test]
    fn without_kcmp_only_files_that_look_alike_are_refused() {
        let mut kernel = Kernel::probe().unwrap();
        kernel.kcmp = false;
        let key = FileKey { dev: 1, ino: 2, pos: 0, flags: 0, mnt_id: 3, more: 0 };
        let mut ids = FileIds::new(&kernel);
        ids.of_fd(key, RealPid(1), 0).unwrap();
        ids.of_fd(FileKey { more: 1, ..key }, RealPid(1), 1).unwrap();
        let e = ids.of_fd(key, RealPid(1), 2).unwrap_err().to_string();
        assert!(e.contains("no kcmp"), "{e}");
    }
}
