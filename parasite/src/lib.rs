//! What the engine must know to speak to the parasite, the code that runs inside a process being
//! dumped, and the commands themselves.
//!
//! One call is one entry: the engine fills the [`Control`] block, sets the registers of a stopped
//! thread, lets it run to the blob's end and reads the block. Nothing stays behind between calls.
//!
//! ```text
//! base           + rx_len                                              one anonymous mapping
//! | blob code    | blob data | Control | data | signal frame | guard | stack      | guard |
//! | r-x          | rw-                                       | r-x   | rw-        | r-x   |
//! ```
//!
//! At its end the blob sends its own thread a signal that the process ignores. The engine takes it as
//! the sign that the call is over. If the engine is gone by then, nobody takes it, and the blob goes on
//! to load the registers the thread had from the signal frame: the process lives on as if it had not
//! been touched, but for the mapping.
//!
//! # Safety
//! The commands are ordinary functions over memory the engine describes in the control block; they are
//! unsafe because they trust it.
#![cfg_attr(not(test), no_std)]

pub mod aio;
pub mod copy;
pub mod fds;
pub mod pages;
pub mod policies;
pub mod rseq;
pub mod sigactions;
pub mod task;
pub mod thread;
pub mod timers;
pub mod tty;
pub mod whole;

use core::sync::atomic::{AtomicU32, Ordering};

use blobrt::{
    abi::{FINGERPRINT_SEED, fingerprint},
    syscall::{Errno, Result, syscall6_raw},
};

/// Number of this build; the engine and the blob must agree on it.
pub const BUILD: u64 = {
    let mut hash = FINGERPRINT_SEED;
    hash = fingerprint(hash, include_bytes!("lib.rs"));
    hash = fingerprint(hash, include_bytes!("aio.rs"));
    hash = fingerprint(hash, include_bytes!("copy.rs"));
    hash = fingerprint(hash, include_bytes!("fds.rs"));
    hash = fingerprint(hash, include_bytes!("policies.rs"));
    hash = fingerprint(hash, include_bytes!("pages.rs"));
    hash = fingerprint(hash, include_bytes!("rseq.rs"));
    hash = fingerprint(hash, include_bytes!("sigactions.rs"));
    hash = fingerprint(hash, include_bytes!("task.rs"));
    hash = fingerprint(hash, include_bytes!("thread.rs"));
    hash = fingerprint(hash, include_bytes!("timers.rs"));
    hash = fingerprint(hash, include_bytes!("tty.rs"));
    fingerprint(hash, include_bytes!("whole.rs"))
};

/// Bytes of the data area.
pub const DATA_LEN: usize = 16 << 10;

/// Types that may be copied between the two sides byte by byte.
///
/// # Safety
/// `repr(C)`, without padding, and every bit pattern is a value.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: integers are plain.
unsafe impl Plain for i32 {}
// SAFETY: integers are plain.
unsafe impl Plain for u8 {}
// SAFETY: integers are plain.
unsafe impl Plain for u32 {}
// SAFETY: integers are plain.
unsafe impl Plain for u64 {}

/// Declares a structure both sides use and its size in bytes.
macro_rules! plain {
    ($($(#[$meta:meta])* pub struct $name:ident[$size:literal] { $($(#[$doc:meta])* pub $field:ident: $type:ty,)* })+) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct $name { $($(#[$doc])* pub $field: $type,)* }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            // No padding: the fields fill the structure.
            assert!(0 $(+ size_of::<$type>())* == $size);
        };
        // SAFETY: repr(C), only plain fields, and their sizes add up to the whole.
        unsafe impl $crate::Plain for $name {}
    )+};
}
pub(crate) use plain;

/// What the blob is asked to do.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Nothing: to see that it answers.
    Hello = 1,
    /// Panics, so that the way a panic is reported can be tried.
    Panic = 2,
    /// One system call: `args[0]` is its number, up to five arguments follow, `ret[0]` is what the kernel
    /// gave. Addresses may point into the data area.
    Syscall = 3,
    /// [`task::TaskInfo`] into the data area.
    Task = 4,
    /// [`thread::ThreadInfo`] of the calling thread into the data area.
    Thread = 5,
    /// [`sigactions::Sigaction`] of signals 1..=64 into the data area.
    Sigactions = 6,
    /// [`timers::Itimer`] of the three interval timers into the data area.
    Itimers = 7,
    /// [`timers::PosixTimer`] for each of `args[0]` timer ids (i32) at the start of the data area, which
    /// they replace.
    PosixTimers = 8,
    /// Sends `args[0]` descriptors, numbers in the data area after the socket address of `args[1]` bytes.
    SendFds = 9,
    /// [`tty::TtyInfo`] of descriptor `args[0]` into the data area.
    Tty = 10,
    /// [`aio::AioRing`] of the ring at `args[0]` into the data area.
    Aio = 11,
    /// Where the calling thread, whose FS base is `args[0]`, has registered restartable sequences:
    /// `ret[0]`, see [`rseq::find`].
    Rseq = 12,
    /// Makes a copy of the process that only holds its memory: `ret[0]` is its pid, see [`copy::make`].
    Copy = 13,
    /// Replaces `args[0]` addresses in the data area by the modes of memory policies, see [`policies::read`].
    Policies = 14,
    /// Writes `args[0]` pieces of memory to a file of the engine's, see [`pages::write`].
    WritePages = 15,
    /// What every process and its leader are asked, see [`whole::read`].
    Whole = 16,
}

impl Command {
    /// From the number in the control block.
    pub fn from_word(word: u32) -> Option<Command> {
        use Command::*;
        let all = [
            Hello,
            Panic,
            Syscall,
            Task,
            Thread,
            Sigactions,
            Itimers,
            PosixTimers,
            SendFds,
            Tty,
            Aio,
            Rseq,
            Copy,
            Policies,
            WritePages,
            Whole,
        ];
        all.into_iter().find(|c| *c as u32 == word)
    }
}

/// [`Control::state`]: posted by the engine, not yet looked at.
pub const STATE_POSTED: u32 = 1;
/// [`Control::state`]: the command runs.
pub const STATE_RUNNING: u32 = 2;
/// [`Control::state`]: `result` and `ret` are valid.
pub const STATE_DONE: u32 = 3;

/// The block at which the two sides meet.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Control {
    /// [`BUILD`] as the engine knows it; the blob refuses another one.
    pub build: u64,
    /// A [`Command`].
    pub command: u32,
    /// `STATE_*`.
    pub state: u32,
    /// 0, or a negative error number: -EPROTO for an unknown build or command.
    pub result: i64,
    /// Signal the blob sends itself at the end, one the process ignores; 0 for none, when the engine
    /// watches system calls instead.
    pub end_signal: u64,
    /// Stack pointer for rt_sigreturn, into the signal frame.
    pub frame_sp: u64,
    /// Address of the thread's `rseq_cs` word, 0 for none; the kernel clears the word when code outside
    /// a critical section runs.
    pub rseq_cs_at: u64,
    /// What stood there.
    pub rseq_cs: u64,
    /// Address of the data area.
    pub data: u64,
    /// Its length in bytes.
    pub data_len: u64,
    /// Arguments.
    pub args: [u64; 6],
    /// Results.
    pub ret: [u64; 2],
    /// Start and length of the two ranges that the setup entry makes writable.
    pub setup: [u64; 4],
}

const _: () = assert!(size_of::<Control>() == 168);
// SAFETY: repr(C), integers only, 8 + 4 + 4 + 8 * 7 + 64 + 32 = 168 bytes without padding.
unsafe impl Plain for Control {}

impl Control {
    /// The data area, for `count` values of `T` from its start.
    ///
    /// # Safety
    /// `data` and `data_len` describe writable memory, aligned to 8 bytes, that nobody else uses during
    /// the returned borrow.
    pub unsafe fn data_mut<'a, T: Plain>(&self, count: usize) -> Result<&'a mut [T]> {
        let bytes = count.checked_mul(size_of::<T>()).ok_or(EINVAL)?;
        if bytes as u64 > self.data_len {
            return Err(EINVAL);
        }
        // SAFETY: the caller vouches for the area, and its length was checked.
        Ok(unsafe { core::slice::from_raw_parts_mut(self.data as *mut T, count) })
    }

    /// One value at the start of the data area.
    ///
    /// # Safety
    /// As [`Control::data_mut`].
    pub unsafe fn data_one<'a, T: Plain>(&self) -> Result<&'a mut T> {
        // SAFETY: as the caller says.
        unsafe { self.data_mut::<T>(1) }?.first_mut().ok_or(EINVAL)
    }
}

const EINVAL: Errno = Errno(22);
const EPROTO: Errno = Errno(71);

/// Runs the command in the control block.
///
/// # Safety
/// `control` is a control block the engine filled in, which nobody else uses meanwhile.
pub unsafe fn run(control: *mut Control) {
    // SAFETY: the caller vouches for it.
    let control = unsafe { &mut *control };
    // The engine reads the state after a crash too, so it must be written in order.
    // SAFETY: a field of the block.
    let state = unsafe { AtomicU32::from_ptr(&raw mut control.state) };
    state.store(STATE_RUNNING, Ordering::Release);
    control.result = match command(control) {
        Ok(()) => 0,
        Err(Errno(e)) => -i64::from(e),
    };
    state.store(STATE_DONE, Ordering::Release);
}

fn command(control: &mut Control) -> Result<()> {
    if control.build != BUILD {
        return Err(EPROTO);
    }
    // SAFETY: the engine filled in the block as each command wants it.
    unsafe {
        match Command::from_word(control.command).ok_or(EPROTO)? {
            Command::Hello => control.ret[0] = BUILD,
            Command::Panic => panic!("asked to"),
            Command::Syscall => {
                let [nr, a, b, c, d, e] = control.args.map(|a| a as usize);
                control.ret[0] = syscall6_raw(nr, [a, b, c, d, e, 0]) as u64;
            }
            Command::Task => *control.data_one()? = task::read(),
            Command::Thread => *control.data_one()? = thread::read(control.args[0], control.args[1] != 0),
            Command::Sigactions => sigactions::read(control.data_mut(sigactions::SIGNALS)?)?,
            Command::Itimers => timers::read_itimers(control.data_mut(timers::ITIMERS)?)?,
            Command::PosixTimers => timers::read_posix(control)?,
            Command::SendFds => fds::send(control)?,
            Command::Tty => *control.data_one()? = tty::read(control.args[0] as i32)?,
            Command::Rseq => control.ret[0] = rseq::find(control.args[0]),
            Command::Policies => policies::read(control)?,
            Command::Aio => *control.data_one()? = aio::read(control.args[0]),
            Command::Copy => control.ret[0] = copy::make()?,
            Command::WritePages => pages::write(control)?,
            Command::Whole => whole::read(control)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A control block with a data area, run in this very process.
    pub(crate) struct Bench {
        pub control: Control,
        pub data: Vec<u64>,
    }

    impl Bench {
        pub fn new(command: Command) -> Bench {
            let mut data = vec![0u64; DATA_LEN / 8];
            let control = Control {
                build: BUILD,
                command: command as u32,
                state: STATE_POSTED,
                data: data.as_mut_ptr() as u64,
                data_len: DATA_LEN as u64,
                ..Control::default()
            };
            Bench { control, data }
        }
        pub fn run(&mut self) -> i64 {
            // SAFETY: block and area are ours.
            unsafe { run(&mut self.control) };
            assert_eq!(self.control.state, STATE_DONE);
            self.control.result
        }
        pub fn read<T: Plain>(&self, index: usize) -> T {
            assert!((index + 1) * size_of::<T>() <= DATA_LEN);
            // SAFETY: inside the area; plain.
            unsafe { self.data.as_ptr().cast::<T>().add(index).read() }
        }
    }

    #[test]
    fn hello_answers_and_strangers_are_refused() {
        let mut bench = Bench::new(Command::Hello);
        assert_eq!(bench.run(), 0);
        assert_eq!(bench.control.ret[0], BUILD);
        bench.control.build ^= 1;
        assert_eq!(bench.run(), -71);
        bench.control.build = BUILD;
        bench.control.command = 4711;
        assert_eq!(bench.run(), -71);
    }

    #[test]
    fn a_system_call_gets_its_arguments() {
        let mut bench = Bench::new(Command::Syscall);
        bench.control.args[0] = blobrt::syscall::nr::GETPID as u64;
        assert_eq!(bench.run(), 0);
        assert_eq!(bench.control.ret[0], u64::from(std::process::id()));
    }

    #[test]
    fn answers_that_do_not_fit_are_refused() {
        let mut bench = Bench::new(Command::Sigactions);
        bench.control.data_len = 100;
        assert_eq!(bench.run(), -22);
    }
}
