//! Memory of tasks: mappings, pages, and what the kernel keeps with them.
//!
//! ```text
//! vma      smaps line -> vma_entry (kind, protection, madvise bits); files go through `files`
//! aio      rings of asynchronous I/O
//! hugetlb  huge pages: sizes and pools
//! pagemap  which pages of a range have content of their own
//! pages    content -> pages-N.img with pagemap-M.img
//! sink     files or a page server, where pages go
//! xfer     the page server protocol
//! track    which pages changed since the dump before
//! dedup    freeing pages of parent images
//! lazy     memory that comes after the tasks run again
//! sysv     System V shared memory of the host
//! shmem    content of shared memory files, once each
//! ```

pub mod aio;
pub mod dedup;
pub mod hugetlb;
pub mod keys;
pub mod lazy;
pub mod more;
pub mod pagemap;
pub mod pages;
pub mod restore;
pub mod shmem;
pub mod sink;
pub mod status;
pub(crate) mod stored;
pub mod sysv;
pub mod track;
pub mod vma;
pub mod xfer;
