//! Interval timers and POSIX timers of a task.

use std::collections::BTreeMap;

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    procfs,
};

/// `struct itimerval` of getitimer(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interval {
    pub interval_sec: u64,
    pub interval_usec: u64,
    pub value_sec: u64,
    pub value_usec: u64,
}

/// Time left of a POSIX timer, from timer_gettime(2) and timer_getoverrun(2) inside the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Left {
    pub interval_sec: u64,
    pub interval_nsec: u64,
    pub value_sec: u64,
    pub value_nsec: u64,
    pub overrun: u32,
}

/// The entry of a task: real, virtual and profiling timer, and the POSIX timers of `/proc/PID/timers` with the
/// time that is `left` of each, by id.
pub fn dump(
    intervals: [Interval; 3],
    timers: &[procfs::timers::Timer],
    left: &BTreeMap<u32, Left>,
) -> Result<pb::TaskTimersEntry> {
    let [real, virt, prof] = intervals.map(|i| pb::ItimerEntry {
        isec: i.interval_sec,
        iusec: i.interval_usec,
        vsec: i.value_sec,
        vusec: i.value_usec,
    });
    let posix = timers
        .iter()
        .map(|timer| {
            let left = left
                .get(&timer.id)
                .ok_or_else(|| Error::bug(format!("POSIX timer {} was not read", timer.id)))?;
            Ok(pb::PosixTimerEntry {
                it_id: timer.id,
                clock_id: timer.clock.cast_unsigned(),
                si_signo: timer.signo,
                it_sigev_notify: match timer.notify_thread {
                    Some(_) => libc::SIGEV_THREAD_ID as u32,
                    None => timer.notify,
                },
                sival_ptr: timer.sival_ptr,
                overrun: left.overrun,
                isec: left.interval_sec,
                insec: left.interval_nsec,
                vsec: left.value_sec,
                vnsec: left.value_nsec,
                notify_thread_id: timer.notify_thread,
            })
        })
        .collect::<Result<_>>()?;
    Ok(pb::TaskTimersEntry { real, virt, prof, posix })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs::timers::Timer;

    #[test]
    fn timers_keep_whom_they_notify() {
        let timer = Timer { id: 3, signo: 34, sival_ptr: 9, notify: 0, notify_thread: Some(77), clock: -6 };
        let left = BTreeMap::from([(3, Left { value_sec: 5, overrun: 2, ..Left::default() })]);
        let real = Interval { value_usec: 1, ..Interval::default() };
        let entry = dump([real, Interval::default(), Interval::default()], &[timer], &left).unwrap();
        assert_eq!((entry.real.vusec, entry.virt.vusec), (1, 0));
        let posix = &entry.posix[0];
        assert_eq!((posix.it_id, posix.it_sigev_notify, posix.notify_thread_id), (3, 4, Some(77)));
        assert_eq!((posix.vsec, posix.overrun, posix.clock_id), (5, 2, -6i32 as u32));
        assert!(dump([real; 3], &[timer], &BTreeMap::new()).is_err());
    }
}
