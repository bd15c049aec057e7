//! timerfd: a timer with the time left, and expirations nobody has read yet.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::time::{ClockId, clock_gettime};
use rcriu_images::pb;

use super::{DrainedFd, FdProbe, FdType, FileKind, FilesOut, FilesTask, PlanFiles, RestoredFile, pipe};
use crate::{
    error::{Error, Result, SysContext},
    procfs::{self, fdinfo::FdInfo},
    pstree::FileId,
    sys::anon,
};

/// The kind.
#[derive(Debug)]
pub(super) struct Timerfd;

impl FileKind for Timerfd {
    fn fd_type(&self) -> FdType {
        FdType::Timerfd
    }

    fn claims(&self, fd: &FdProbe) -> bool {
        fd.anonymous("[timerfd]")
    }

    fn dump(&self, fd: &DrainedFd, id: FileId, _: &mut FilesOut<'_>) -> Result<pb::FileEntry> {
        let timer = parse(&fd.probe.info).ok_or_else(|| fd.probe.strange())?;
        let timer = pb::TimerfdEntry { id: id.0, flags: fd.probe.info.flags, fown: fd.fown, ..timer };
        Ok(pb::FileEntry {
            r#type: FdType::Timerfd as i32,
            id: id.0,
            tfd: Some(timer.into()),
            ..Default::default()
        })
    }

    fn collect(&self, entry: &pb::FileEntry, _: &mut PlanFiles<'_>) -> Result<Box<dyn RestoredFile>> {
        let timer = entry
            .tfd
            .as_deref()
            .copied()
            .ok_or_else(|| Error::image("files.img: a timerfd entry without tfd"))?;
        let second = 1_000_000_000;
        let most = i64::MAX.cast_unsigned();
        if timer.vnsec >= second || timer.insec >= second || timer.vsec > most || timer.isec > most {
            return Err(Error::image(format!(
                "files.img: times of timerfd {:#x} are out of range",
                timer.id
            )));
        }
        Ok(Box::new(TimerfdFile(timer)))
    }
}

fn parse(info: &FdInfo) -> Option<pb::TimerfdEntry> {
    let flags = info.value("settime flags")?;
    let time = |label| {
        let text = std::str::from_utf8(info.value(label)?).ok()?;
        let (sec, nsec) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
        Some((sec.parse().ok()?, nsec.parse().ok()?))
    };
    let ((vsec, vnsec), (isec, insec)) = (time("it_value")?, time("it_interval")?);
    Some(pb::TimerfdEntry {
        clockid: procfs::number(info.value("clockid")?)?,
        ticks: procfs::number(info.value("ticks")?)?,
        // Octal, with a 0 in front.
        settime_flags: u32::from_str_radix(std::str::from_utf8(flags).ok()?, 8).ok()?,
        vsec,
        vnsec,
        isec,
        insec,
        ..Default::default()
    })
}

/// A timerfd to be restored.
#[derive(Debug)]
struct TimerfdFile(pb::TimerfdEntry);

impl RestoredFile for TimerfdFile {
    fn name(&self) -> String {
        "timerfd".into()
    }

    fn fown(&self) -> Option<&pb::FownEntry> {
        Some(&self.0.fown)
    }

    fn open(&self, _: &mut FilesTask<'_>) -> Result<OwnedFd> {
        let made = anon::timerfd(self.0.clockid.cast_signed())?;
        pipe::set_flags(&made, self.0.flags.cast_signed())?;
        Ok(made)
    }

    /// Timers start when everything else is done, or a long restore would use them up.
    fn finish(&self, fd: BorrowedFd<'_>, cx: &mut FilesTask<'_>) -> Result<()> {
        let entry = &self.0;
        let (mut sec, mut nsec) = (entry.vsec.cast_signed(), entry.vnsec.cast_signed());
        let interval = (entry.isec.cast_signed(), entry.insec.cast_signed());
        let flags = entry.settime_flags.cast_signed();
        if (sec, nsec) == (0, 0) {
            // A periodic timer that has expired goes on when it is read: it must expire here, too.
            if entry.ticks > 0 && interval != (0, 0) {
                nsec = 1;
            }
        } else if flags & libc::TFD_TIMER_ABSTIME != 0 {
            // The image has the time that was left, whatever way it was set.
            let clock = match entry.clockid.cast_signed() {
                libc::CLOCK_REALTIME_ALARM => ClockId::CLOCK_REALTIME,
                libc::CLOCK_BOOTTIME_ALARM => ClockId::CLOCK_BOOTTIME,
                clock => ClockId::from_raw(clock),
            };
            let now = clock_gettime(clock).call("clock_gettime")?;
            nsec += now.tv_nsec();
            sec = sec.saturating_add(now.tv_sec()).saturating_add(nsec / 1_000_000_000);
            nsec %= 1_000_000_000;
        }
        if (sec, nsec) != (0, 0) || interval != (0, 0) {
            cx.late(anon::set_timer_later(fd.as_raw_fd(), flags, (sec, nsec), interval));
        }
        if entry.ticks > 0 {
            cx.late(anon::set_ticks_later(fd.as_raw_fd(), entry.ticks));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::unistd::read;

    use super::*;
    use crate::files::roundtrip::{FREE, Trip, at, get};

    fn set(timer: &OwnedFd, flags: i32, value: anon::Time, interval: anon::Time) {
        let late = anon::set_timer_later(timer.as_raw_fd(), flags, value, interval);
        crate::sys::flock::late(&late).unwrap();
    }

    fn left(number: i32) -> pb::TimerfdEntry {
        let proc = procfs::ProcDir::open(crate::pstree::RealPid(std::process::id().cast_signed())).unwrap();
        parse(&FdInfo::read(&proc, number).unwrap()).unwrap()
    }

    #[test]
    fn times_intervals_and_expirations_come_back() {
        Trip::new(
            concat!(module_path!(), "::times_intervals_and_expirations_come_back"),
            |_| {
                let relative = anon::timerfd(libc::CLOCK_MONOTONIC).unwrap();
                set(&relative, 0, (5000, 0), (7, 8));
                at(relative, FREE, false);
                let absolute = anon::timerfd(libc::CLOCK_BOOTTIME).unwrap();
                let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap().tv_sec();
                let flags = libc::TFD_TIMER_ABSTIME;
                set(&absolute, flags, (now + 900, 0), (0, 0));
                at(absolute, FREE + 1, false);
                // Expired, and not read.
                let over = anon::timerfd(libc::CLOCK_MONOTONIC).unwrap();
                set(&over, 0, (0, 1), (0, 0));
                let mut ready = [nix::poll::PollFd::new(over.as_fd(), nix::poll::PollFlags::POLLIN)];
                nix::poll::poll(&mut ready, 1000u16).unwrap();
                at(over, FREE + 2, false);
                at(anon::timerfd(libc::CLOCK_REALTIME).unwrap(), FREE + 3, false);
                // Expired once, and due to go on when it is read.
                let periodic = anon::timerfd(libc::CLOCK_MONOTONIC).unwrap();
                set(&periodic, 0, (0, 1), (800, 0));
                let mut ready = [nix::poll::PollFd::new(periodic.as_fd(), nix::poll::PollFlags::POLLIN)];
                nix::poll::poll(&mut ready, 1000u16).unwrap();
                at(periodic, FREE + 4, false);
            },
            |_| {
                let relative = left(FREE);
                assert!((4980..5000).contains(&relative.vsec), "{relative:?}");
                assert_eq!((relative.isec, relative.insec, relative.settime_flags), (7, 8, 0));
                let absolute = left(FREE + 1);
                assert!((880..900).contains(&absolute.vsec), "{absolute:?}");
                assert_eq!((absolute.clockid, absolute.settime_flags), (7, 1));
                let mut ticks = [0; 8];
                read(get(FREE + 2), &mut ticks).unwrap();
                assert_eq!(u64::from_ne_bytes(ticks), 1);
                assert_eq!((left(FREE + 3).vsec, left(FREE + 3).clockid), (0, 0));
                assert_eq!((left(FREE + 4).ticks, left(FREE + 4).isec), (1, 800));
                read(get(FREE + 4), &mut ticks).unwrap();
                assert_eq!(u64::from_ne_bytes(ticks), 1);
                assert!((780..=800).contains(&left(FREE + 4).vsec));
            },
        )
        .run();
    }
}
