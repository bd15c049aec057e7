//! The time namespace: clocks that go on from where they were (time_namespaces(7), Linux 5.6).
//!
//! The monotonic clock and that since boot differ between machines and boots, and they ran on while the tree was
//! images. Programs keep points in time of these clocks in their memory, so a restored tree gets a time namespace
//! in which both go on from the moment of the dump. `timens-0.img` has their values for a tree that lived in the
//! time namespace of whoever dumped it, `timens-ID.img` for one that had one of its own.

use std::fs::File;
use std::io::Write;

use nix::sched::{CloneFlags, setns, unshare};
use nix::time::{ClockId, clock_gettime};
use rcriu_images::{ImageDir, ImageKind, pb};

use crate::error::{Error, Result, SysContext};
use crate::interrupt;
use crate::procfs::{ProcDir, timens};
use crate::pstree::RealPid;

/// The file that moves the clocks of a namespace in which nobody lives yet.
const OFFSETS: &str = "/proc/self/timens_offsets";
/// Numbers of the clocks, as the file takes them on all kernels.
const CLOCKS: [(ClockId, &str); 2] = [(ClockId::CLOCK_MONOTONIC, "1"), (ClockId::CLOCK_BOOTTIME, "7")];
/// Nanoseconds of a second.
const NANOS: i64 = 1_000_000_000;

/// Values of the monotonic clock and of that since boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clocks {
    /// Nanoseconds, in the order of [`CLOCKS`].
    values: [i64; 2],
    /// The tree had a time namespace of its own, so that it must get one.
    own: bool,
}

impl Clocks {
    /// Reads the clocks of a tree whose root has `ids`, dumped by a process that had `host`; `None` if images have
    /// none, as those that were made on kernels without time namespaces.
    ///
    /// # Errors
    /// A time out of range; a namespace of its own without an image.
    pub fn read(
        dir: &ImageDir,
        ids: &pb::TaskKobjIdsEntry,
        host: Option<&pb::TaskKobjIdsEntry>,
    ) -> Result<Option<Clocks>> {
        let own = ids.time_ns_id.filter(|id| host.and_then(|h| h.time_ns_id).is_some_and(|h| h != *id));
        let number = own.unwrap_or(0);
        let entry = match own {
            Some(_) => Some(dir.read_one::<pb::TimensEntry>(ImageKind::Timens, number.into())?),
            None => dir.read_opt::<pb::TimensEntry>(ImageKind::Timens, 0)?,
        };
        let Some(entry) = entry else { return Ok(None) };
        let value = |t: pb::Timespec| nanos(t.tv_sec.cast_signed(), t.tv_nsec.cast_signed());
        let values = value(entry.monotonic).zip(value(entry.boottime)).ok_or_else(|| {
            Error::image(format!("timens-{number}.img: a time that no clock shows: {entry:?}"))
        })?;
        Ok(Some(Clocks { values: values.into(), own: own.is_some() }))
    }

    /// Gives this process, and all it forks, clocks that go on from these values.
    ///
    /// Where the kernel has no time namespaces, or does not let us make one, a tree that had none goes on with the
    /// clocks of the host.
    ///
    /// Precondition: this process has one thread.
    pub fn apply(&self) -> Result<()> {
        let flag = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
        let me = ProcDir::open(RealPid(std::process::id().cast_signed()))?;
        let ours = timens::offsets(&me)?;
        match unshare(flag).call("unshare(CLONE_NEWTIME)") {
            Err(e) if !self.own && matches!(e.errno(), Some(libc::EINVAL | libc::EPERM | libc::ENOSPC)) => {
                log::warn!("Clocks go on from the host's instead of the dump's: {e}");
                return Ok(());
            }
            other => other?,
        }
        let mut text = String::new();
        for (((clock, number), value), our) in CLOCKS.iter().zip(self.values).zip(ours) {
            let now = clock_gettime(*clock).call("clock_gettime")?;
            let host = nanos(now.tv_sec(), now.tv_nsec()).and_then(|now| now.checked_sub(our));
            let offset = host.and_then(|host| value.checked_sub(host)).ok_or_else(|| {
                Error::image(format!("timens.img: clock {number} cannot be moved to {value} ns"))
            })?;
            let (sec, nsec) = (offset.div_euclid(NANOS), offset.rem_euclid(NANOS));
            log::debug!("Clock {number} is moved by {sec} s and {nsec} ns");
            text += &format!("{number} {sec} {nsec}\n");
        }
        let mut file = File::options().write(true).open(OFFSETS).call(format!("open({OFFSETS})"))?;
        // Both at once: each write is taken as a whole.
        file.write_all(text.as_bytes()).call(format!("write({OFFSETS})"))?;
        let children = "/proc/self/ns/time_for_children";
        // A point in time of the old clock; whoever forked us watches it.
        interrupt::set_deadline(None);
        let namespace = File::open(children).call(format!("open({children})"))?;
        setns(namespace, flag).call("setns(CLONE_NEWTIME)")
    }
}

/// Seconds and nanoseconds in one; `None` if that is no time.
fn nanos(sec: i64, nsec: i64) -> Option<i64> {
    if !(0..NANOS).contains(&nsec) {
        return None;
    }
    sec.checked_mul(NANOS)?.checked_add(nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(sec: u64, nsec: u64) -> pb::TimensEntry {
        let time = pb::Timespec { tv_sec: sec, tv_nsec: nsec };
        pb::TimensEntry { monotonic: time, boottime: time }
    }

    fn written(number: u64, entry: &pb::TimensEntry) -> (tempfile::TempDir, ImageDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        let mut out = dir.writer(ImageKind::Timens, number);
        out.write(entry).unwrap();
        out.finish().unwrap();
        (folder, dir)
    }

    #[test]
    fn times_that_cannot_be_are_errors() {
        let ids = pb::TaskKobjIdsEntry { time_ns_id: Some(7), ..Default::default() };
        let host = pb::TaskKobjIdsEntry { time_ns_id: Some(3), ..Default::default() };
        for bad in [entry(u64::MAX / 2, 0), entry(1, 1_000_000_000), entry(1, u64::MAX)] {
            let (_folder, dir) = written(0, &bad);
            assert!(Clocks::read(&dir, &ids, Some(&ids)).is_err(), "{bad:?}");
            // One of its own has an image of its own.
            assert!(Clocks::read(&dir, &ids, Some(&host)).is_err());
        }
        let (_folder, dir) = written(7, &entry(5, 6));
        let clocks = Clocks::read(&dir, &ids, Some(&host)).unwrap().unwrap();
        assert_eq!(clocks, Clocks { values: [5 * NANOS + 6; 2], own: true });
        assert_eq!(Clocks::read(&dir, &ids, None).unwrap(), None);
    }
}
