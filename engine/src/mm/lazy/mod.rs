//! Memory that comes after the tasks run again: on the first touch of a page, and behind their backs.
//!
//! ```text
//! restored task                       server (lazy-pages, or a child of restore --background)
//!   userfaultfd over its late mappings
//!   ------ pid, descriptor ---------------->   one space for each address space
//!   touches a page: the kernel tells it --->   reads the page, places it, the thread goes on
//!   forks, moves, unmaps, drops memory ---->   follows
//!                                              in between: fills the rest, piece by piece
//! ```
//!
//! late     which pages come late: both sides must agree
//! missing  what an address space still lacks
//! space    one address space: its userfaultfd and what it lacks
//! source   where pages come from: images here, or a page server
//! serve    the server's loop
//! background  a server that is a child of the restore
//! spare    second descriptors, should that child be killed
//! giver    the restore's side of the conversation
//! sponsor  asks for descriptors of tasks that have no right to

pub mod background;
mod giver;
mod late;
mod missing;
mod serve;
mod source;
mod space;
mod spare;
mod sponsor;

pub use giver::{Giver, Offer};
pub use late::{Late, OfVma};
pub use serve::{Count, serve};
pub use source::Source;
pub use sponsor::Sponsor;

/// Name of the server's socket in the work folder.
pub const SOCKET: &str = "lazy-pages.socket";

/// What the restore says when the tasks run.
const FINISHED: u32 = 0x5253_5446;
/// What it says to a child of its own before that.
const ARM: u32 = 0x4d52_4141;
