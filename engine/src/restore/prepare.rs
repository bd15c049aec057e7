//! What is made ready before the first fork.

use std::os::fd::{AsFd, OwnedFd};

use nix::{fcntl::OFlag, sys::stat::Mode};
use rcriu_images::ImageDir;

use super::{FilesShared, Filler, Giver, Plan, Snapshot};
use crate::{
    error::{Error, Result, SysContext},
    kernel::Kernel,
    options::RestoreOptions,
};

/// Hands masters of terminals to whoever they belong to from now on.
pub(super) fn give_away(masters: Vec<OwnedFd>, opts: &RestoreOptions) -> Result<()> {
    for master in masters {
        if !opts.common.notifier.orphan_pts_master(master.as_fd())? {
            return Err(Error::host("nobody takes the tree's terminal, whose master was outside of it")
                .remedy(
                    "ask for notifications (notify_scripts), or restore with --shell-job from a terminal",
                ));
        }
    }
    Ok(())
}

/// Finds the server of memory that comes late, if any does.
pub(super) fn late_memory(
    opts: &RestoreOptions,
    snapshot: &Snapshot,
    files: &FilesShared,
) -> Result<(Option<Giver>, Option<Filler>)> {
    let (giver, filler) = match (opts.common.lazy.enabled, opts.background) {
        (false, false) => return Ok((None, None)),
        (true, true) => return Err(Error::usage("--lazy-pages and --background exclude each other")),
        (true, false) => (Giver::connect(&opts.common.work_dir)?, None),
        (false, true) => {
            let (giver, filler) = Filler::start(snapshot, |fd| files.keep(fd))?;
            return Ok((Some(giver), Some(filler)));
        }
    };
    Ok((Some(giver.moved(|fd| files.keep(fd))?), filler))
}

/// Makes room for the tasks' descriptors: what they inherit from us moves to numbers none of them has.
pub(super) fn prepare_files(
    snapshot: &mut Snapshot,
    plan: &Plan,
    opts: &RestoreOptions,
    kernel: &Kernel,
) -> Result<FilesShared> {
    crate::process::raise_descriptor_limit();
    let (limit, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .call("getrlimit(RLIMIT_NOFILE)")?;
    let limit = i32::try_from(limit).unwrap_or(i32::MAX);
    let zone = FilesShared::zone(&plan.files, limit, plan.home.descriptors(), opts, kernel)?;
    let keep = |fd: std::os::fd::RawFd| zone.keep(crate::process::duplicate_descriptor(fd)?);
    let path = snapshot.dir.path().to_owned();
    snapshot.dir = ImageDir::from_fd(keep(opts.common.images_dir.raw_fd())?, path);
    let log = &opts.common.log.fd;
    if !zone.contains(log.get()) {
        use std::os::fd::IntoRawFd;
        // The logger keeps it to the end of the process.
        log.set(keep(log.get())?.into_raw_fd());
    }
    FilesShared::prepare(&plan.files, zone, &snapshot.dir, opts, kernel)
}

/// /proc as this process sees it: tasks find themselves there wherever they are.
pub(super) fn whole_proc() -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open("/proc", flags, Mode::empty()).call("open(/proc)")
}
