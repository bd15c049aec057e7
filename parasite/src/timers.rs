//! Interval timers and POSIX timers.
//!
//! # Safety
//! Calls that only read, into structures of the kernel's layout.

use blobrt::syscall::{Result, nr, syscall1, syscall2};

use crate::{Control, plain};

/// Number of interval timers: real, virtual, profiling.
pub const ITIMERS: usize = 3;
/// Most POSIX timers one call can ask for.
pub const MAX_POSIX: usize = crate::DATA_LEN / size_of::<PosixTimer>();

plain! {
    /// `struct itimerval`.
    pub struct Itimer[32] {
        /// Period, seconds.
        pub interval_sec: i64,
        /// Period, microseconds.
        pub interval_usec: i64,
        /// Time left, seconds.
        pub value_sec: i64,
        /// Time left, microseconds; 0 and 0 when off.
        pub value_usec: i64,
    }

    /// A POSIX timer's `struct itimerspec` and overrun count.
    pub struct PosixTimer[48] {
        /// Period, seconds.
        pub interval_sec: i64,
        /// Period, nanoseconds.
        pub interval_nsec: i64,
        /// Time left, seconds.
        pub value_sec: i64,
        /// Time left, nanoseconds; 0 and 0 when off.
        pub value_nsec: i64,
        /// Expirations missed since its last signal.
        pub overrun: i64,
        /// Its id.
        pub id: i64,
    }
}

/// Asks for all interval timers.
pub fn read_itimers(to: &mut [Itimer]) -> Result<()> {
    for (which, timer) in to.iter_mut().enumerate() {
        // SAFETY: stores one struct itimerval.
        unsafe { syscall2(nr::GETITIMER, which, &raw mut *timer as usize) }?;
    }
    Ok(())
}

/// Replaces the `args[0]` timer ids at the start of the data area by their timers.
///
/// # Safety
/// As [`Control::data_mut`].
pub unsafe fn read_posix(control: &Control) -> Result<()> {
    let count = control.args[0] as usize;
    // SAFETY: the caller vouches for the area.
    let timers: &mut [PosixTimer] = unsafe { control.data_mut(count) }?;
    // From the end: a timer is larger than an id, so the ids still to be read are not overwritten.
    for i in (0..count).rev() {
        // SAFETY: the ids end before the timers do; i32 has any alignment the area has.
        let id = unsafe { (control.data as *const i32).add(i).read() };
        let mut timer = PosixTimer { id: i64::from(id), ..PosixTimer::default() };
        // SAFETY: stores one struct itimerspec, the first four words.
        unsafe {
            syscall2(nr::TIMER_GETTIME, id as usize, &raw mut timer as usize)?;
            timer.overrun = syscall1(nr::TIMER_GETOVERRUN, id as usize)? as i64;
        }
        if let Some(to) = timers.get_mut(i) {
            *to = timer;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, tests::Bench};
    use blobrt::syscall::{syscall3, syscall4};

    #[test]
    fn interval_timers_are_off_by_default() {
        let mut bench = Bench::new(Command::Itimers);
        assert_eq!(bench.run(), 0);
        for i in 0..ITIMERS {
            assert_eq!(bench.read::<Itimer>(i), Itimer::default());
        }
    }

    #[test]
    fn posix_timers_keep_their_order() {
        let mut ids = [0i32; 3];
        for (i, id) in ids.iter_mut().enumerate() {
            // SIGEV_NONE on the monotonic clock.
            let event = [0u64, 0x1_0000_0000, 0, 0, 0, 0, 0, 0];
            let spec = [1u64, 0, 1000 * (i as u64 + 1), 0];
            // SAFETY: locals of the kernel's layout.
            unsafe {
                syscall3(nr::TIMER_CREATE, 1, event.as_ptr() as usize, &raw mut *id as usize).unwrap();
                syscall4(nr::TIMER_SETTIME, *id as usize, 0, spec.as_ptr() as usize, 0).unwrap();
            }
        }
        let mut bench = Bench::new(Command::PosixTimers);
        for (i, id) in ids.iter().enumerate() {
            // SAFETY: inside the area.
            unsafe { bench.data.as_mut_ptr().cast::<i32>().add(i).write(*id) };
        }
        bench.control.args[0] = 3;
        assert_eq!(bench.run(), 0);
        for (i, id) in ids.iter().enumerate() {
            let timer: PosixTimer = bench.read(i);
            assert_eq!(timer.id, i64::from(*id));
            assert_eq!((timer.interval_sec, timer.overrun), (1, 0));
            assert_eq!(timer.value_sec, 1000 * (i as i64 + 1) - 1);
        }
        for id in ids {
            // SAFETY: our own timers.
            unsafe { syscall1(nr::TIMER_DELETE, id as usize).unwrap() };
        }
        bench.control.args[0] = 1;
        assert_eq!(bench.run(), -22, "a timer that is gone");
        bench.control.args[0] = MAX_POSIX as u64 + 1;
        assert_eq!(bench.run(), -22, "more than fit");
    }
}
