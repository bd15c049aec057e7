//! Interval timers and POSIX timers of a task.

use parasite::timers::{ITIMERS, Itimer, PosixTimer};
use rcriu_images::pb;
use restorer::args;

use crate::{
    error::{Error, Result},
    procfs::timers::Timer,
    pstree::Numbering,
};

/// The entry of a task: real, virtual and profiling timer, and the POSIX timers of `/proc/PID/timers` with the
/// time that is `left` of each, in the same order.
pub fn dump(
    intervals: [Itimer; ITIMERS],
    timers: &[Timer],
    left: &[PosixTimer],
    numbering: &Numbering,
) -> Result<pb::TaskTimersEntry> {
    let [real, virt, prof] = intervals.map(|i| pb::ItimerEntry {
        isec: i.interval_sec.cast_unsigned(),
        iusec: i.interval_usec.cast_unsigned(),
        vsec: i.value_sec.cast_unsigned(),
        vusec: i.value_usec.cast_unsigned(),
    });
    if timers.len() != left.len() {
        return Err(Error::bug(format!("{} POSIX timers, {} answers", timers.len(), left.len())));
    }
    let posix = timers
        .iter()
        .zip(left)
        .map(|(timer, left)| {
            if left.id != i64::from(timer.id) {
                return Err(Error::bug(format!("POSIX timer {} was not read", timer.id)));
            }
            Ok(pb::PosixTimerEntry {
                it_id: timer.id,
                clock_id: timer.clock.cast_unsigned(),
                si_signo: timer.signo,
                it_sigev_notify: match timer.notify_thread {
                    Some(_) => libc::SIGEV_THREAD_ID as u32,
                    None => timer.notify,
                },
                sival_ptr: timer.sival_ptr,
                overrun: u32::try_from(left.overrun).unwrap_or(u32::MAX),
                isec: left.interval_sec.cast_unsigned(),
                insec: left.interval_nsec.cast_unsigned(),
                vsec: left.value_sec.cast_unsigned(),
                vnsec: left.value_nsec.cast_unsigned(),
                notify_thread_id: timer.notify_thread.map(|tid| numbering.virt(tid)),
            })
        })
        .collect::<Result<_>>()?;
    Ok(pb::TaskTimersEntry { real, virt, prof, posix })
}

/// Without `PR_TIMER_CREATE_RESTORE_IDS` every smaller id is created and deleted on the way.
const MOST_TRIES: u32 = 1 << 20;

/// The three interval timers for the restorer.
pub fn restore_intervals(entry: &pb::TaskTimersEntry) -> Result<[args::Itimer; 3]> {
    let convert = |which: &str, e: &pb::ItimerEntry| {
        if e.iusec >= 1_000_000 || e.vusec >= 1_000_000 {
            return Err(Error::image(format!(
                "the {which} interval timer has more than 999999 microseconds"
            )));
        }
        Ok([e.isec, e.iusec, e.vsec, e.vusec])
    };
    Ok([convert("real", &entry.real)?, convert("virtual", &entry.virt)?, convert("profiling", &entry.prof)?])
}

/// The POSIX timers for the restorer, by id; `exact` says whether the kernel takes an id.
pub fn restore_posix(entry: &pb::TaskTimersEntry, exact: bool) -> Result<Vec<args::PosixTimer>> {
    let convert = |e: &pb::PosixTimerEntry| {
        let bad = |what: &str| Err(Error::image(format!("POSIX timer {}: {what}", e.it_id)));
        if e.insec >= 1_000_000_000 || e.vnsec >= 1_000_000_000 {
            return bad("more than 999999999 nanoseconds");
        }
        if e.it_id > i32::MAX as u32 {
            return bad("there can be no such id");
        }
        if !exact && e.it_id > MOST_TRIES {
            return Err(Error::host(format!("POSIX timer {} has an id this kernel cannot be told", e.it_id))
                .remedy("restore on Linux 6.15 or later"));
        }
        let tid = match (e.it_sigev_notify as i32, e.notify_thread_id) {
            (libc::SIGEV_THREAD_ID, Some(tid)) if tid > 0 => tid.cast_unsigned(),
            (libc::SIGEV_THREAD_ID, _) => return bad("it notifies a thread that is not told"),
            (libc::SIGEV_SIGNAL | libc::SIGEV_NONE, _) => 0,
            _ => return bad("its way of notification is not known"),
        };
        Ok(args::PosixTimer {
            id: e.it_id,
            clock: e.clock_id.cast_signed(),
            signal: e.si_signo,
            notify: e.it_sigev_notify,
            value: e.sival_ptr,
            tid,
            pad: 0,
            spec: [e.isec, e.insec, e.vsec, e.vnsec],
        })
    };
    let mut timers = entry.posix.iter().map(convert).collect::<Result<Vec<_>>>()?;
    timers.sort_by_key(|t| t.id);
    if let Some(pair) = timers.windows(2).find(|p| p[0].id == p[1].id) {
        return Err(Error::image(format!("POSIX timer {} stands there twice", pair[0].id)));
    }
    Ok(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_keep_whom_they_notify() {
        let timer = Timer { id: 3, signo: 34, sival_ptr: 9, notify: 0, notify_thread: Some(77), clock: -6 };
        let left = PosixTimer { id: 3, value_sec: 5, overrun: 2, ..PosixTimer::default() };
        let real = Itimer { value_usec: 1, ..Itimer::default() };
        let off = Itimer::default();
        let entry = dump([real, off, off], &[timer], &[left], &Numbering::default()).unwrap();
        assert_eq!((entry.real.vusec, entry.virt.vusec), (1, 0));
        let posix = &entry.posix[0];
        assert_eq!((posix.it_id, posix.it_sigev_notify, posix.notify_thread_id), (3, 4, Some(77)));
        assert_eq!((posix.vsec, posix.overrun, posix.clock_id), (5, 2, -6i32 as u32));
        assert!(dump([off; 3], &[timer], &[], &Numbering::default()).is_err());
        assert!(dump([off; 3], &[timer], &[PosixTimer { id: 4, ..left }], &Numbering::default()).is_err());

        assert_eq!(restore_intervals(&entry).unwrap(), [[0, 0, 0, 1], [0; 4], [0; 4]]);
        let back = restore_posix(&entry, true).unwrap();
        assert_eq!((back[0].id, back[0].tid, back[0].clock, back[0].spec), (3, 77, -6, [0, 0, 5, 0]));
    }

    #[test]
    fn timers_that_make_no_sense_are_refused() {
        let posix = |id, tid| pb::PosixTimerEntry {
            it_id: id,
            it_sigev_notify: if tid == 0 { 0 } else { 4 },
            notify_thread_id: (tid != 0).then_some(tid),
            ..Default::default()
        };
        let entry = |posix| pb::TaskTimersEntry { posix, ..Default::default() };
        let ids = |e: &pb::TaskTimersEntry, exact| {
            restore_posix(e, exact).map(|t| t.iter().map(|t| t.id).collect::<Vec<_>>()).map_err(drop)
        };
        assert_eq!(ids(&entry(vec![posix(5, 0), posix(2, 9)]), false), Ok(vec![2, 5]));
        assert_eq!(ids(&entry(vec![posix(5, 0), posix(5, 0)]), true), Err(()));
        assert_eq!(ids(&entry(vec![posix(5, -1)]), true), Err(()));
        assert_eq!(ids(&entry(vec![posix(MOST_TRIES + 1, 0)]), false), Err(()));
        assert_eq!(ids(&entry(vec![posix(MOST_TRIES + 1, 0)]), true), Ok(vec![MOST_TRIES + 1]));
        let mut late = entry(Vec::new());
        late.virt.vusec = 1_000_000;
        assert!(restore_intervals(&late).is_err());
    }
}
