//! Getting into a running process and out again without a trace.
//!
//! ```text
//! Running --StoppedTask::seize--> Stopped --Infected::new--> Infected
//!         <------- drop ---------         <------ drop ------
//! ```
//!
//! Dropping undoes: an [`Infected`] is cured (its mapping goes away), a [`StoppedTask`] is let go as it
//! was found, running or stopped by job control. So every error on the way leaves the process alone.
//!
//! # Visits
//!
//! A thread runs foreign code only in *visits* of some microseconds (`visit.rs`): its registers are
//! replaced, it runs to an end the engine can see, its registers are put back, and it is brought to a
//! stop in which nothing of a system call or signal is half done. Between visits every thread has its
//! own registers, mask and processor state, so if the engine is killed there the kernel lets all threads
//! go on as if nothing had been. The mapping stays behind; the guardian of a dump takes it away
//! (`ledger.rs`, `leftover.rs`).
//!
//! If it is killed during a visit of the parasite, the parasite itself loads the thread's registers
//! from a signal frame the engine left beside it. The two system calls that make and remove the mapping
//! have such a net too where the thread is on its process's first stack (`gadget.rs`).
//!
//! All of this has to be done by one operating system thread: ptrace(2) belongs to the thread that
//! attached.

mod area;
mod batch;
pub mod blob;
mod calls;
mod enter;
mod fault;
mod fds;
mod gadget;
mod give;
mod infected;
mod ledger;
mod leftover;
mod limits;
pub mod pages;
mod plain;
mod restart;
mod seccomp;
mod syscall;
mod task;
mod thread;
mod visit;
mod whole;

pub use batch::Asked;
pub use infected::Infected;
pub use ledger::{Guest, Ledger};
pub use leftover::{cure as cure_leftover, remove_from as remove_leftover};
pub use parasite::{
    aio::AioRing,
    sigactions::Sigaction,
    task::TaskInfo,
    thread::ThreadInfo,
    timers::{Itimer, PosixTimer},
    tty::TtyInfo,
};
pub use restart::let_go;
pub use syscall::{Gadget, Hints};
pub use task::StoppedTask;
pub use thread::{Rseq, StopKind, StoppedThread};
pub use whole::Question;
