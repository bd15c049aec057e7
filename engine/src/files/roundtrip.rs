//! Test support: descriptors of one process dumped and restored in another, without the rest of the engine.
//!
//! Each role is this test binary started again for the one test: the first sets descriptors up and waits, the
//! second restores them from images and compares. Numbers below [`FREE`] belong to the test harness.

use std::{
    io::{BufRead, BufReader, Write},
    os::fd::{AsFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use rcriu_images::{ImageDir, ImageKind, pb};

use super::{
    ById, FilesOut, FilesPlan, FilesShared, FilesTask, PlanFiles, Preflight, Roots, Table, join_tuns,
};
use crate::{
    error::Result,
    kernel::Kernel,
    options::{Dir, DumpOptions, RestoreOptions},
    procfs::{ProcDir, stat::Stat},
    pstree::{FileId, RealPid, VirtPid},
    sys::{fd, pidfd},
};

/// First number tests may use.
pub(super) const FREE: RawFd = 20;

const ROLE: &str = "RCRIU_TEST_ROLE";
const FOLDER: &str = "RCRIU_TEST_FOLDER";
const TASK: VirtPid = VirtPid(1);

/// One round trip.
pub(super) struct Trip {
    /// The test's path, as the harness knows it: `concat!(module_path!(), "::name")`.
    pub(super) test: &'static str,
    /// Puts descriptors at numbers from [`FREE`] on; the folder is the test's own.
    pub(super) setup: fn(&Path),
    /// Looks at the restored descriptors.
    pub(super) check: fn(&Path),
    /// Changes options of the dump.
    pub(super) dump: fn(&mut DumpOptions),
    /// Changes options of the restore.
    pub(super) restore: fn(&mut RestoreOptions),
    /// Between dump and restore, when the first process is gone.
    pub(super) between: fn(&Path),
}

impl Trip {
    pub(super) fn new(test: &'static str, setup: fn(&Path), check: fn(&Path)) -> Self {
        Trip { test, setup, check, dump: |_| {}, restore: |_| {}, between: |_| {} }
    }

    /// Plays the role asked for; without one, the whole trip.
    pub(super) fn run(&self) {
        let role = std::env::var(ROLE);
        let folder = std::env::var_os(FOLDER).map(PathBuf::from);
        match (role.as_deref(), folder) {
            (Ok("setup"), Some(folder)) => {
                (self.setup)(&folder);
                println!("ready");
                std::io::stdout().flush().unwrap();
                loop {
                    std::thread::park();
                }
            }
            (Ok("restore"), Some(folder)) => self.restored(&folder),
            _ => {
                let folder = tempfile::tempdir().unwrap();
                self.dumped(folder.path()).unwrap();
                (self.between)(folder.path());
                let status = self.start("restore", folder.path()).status().unwrap();
                let said = std::fs::read_to_string(folder.path().join("said")).unwrap_or_default();
                assert!(status.success() && said == "fine", "{status}: {said}");
            }
        }
    }

    /// The dump alone, whose error is wanted.
    pub(super) fn refusal(&self) -> Option<String> {
        match std::env::var(ROLE) {
            Ok(_) => {
                self.run();
                None
            }
            Err(_) => {
                let folder = tempfile::tempdir().unwrap();
                Some(self.dumped(folder.path()).unwrap_err().to_string())
            }
        }
    }

    fn start(&self, role: &str, folder: &Path) -> Command {
        let name = self.test.split_once("::").unwrap().1;
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(FOLDER, folder).stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn dumped(&self, folder: &Path) -> Result<()> {
        let mut child = self.start("setup", folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap().ends_with("ready"));
        let pid = RealPid(child.id().cast_signed());
        let result = if ready { self.dump(folder, pid) } else { panic!("the setup failed") };
        child.kill().unwrap();
        child.wait().unwrap();
        result
    }

    fn dump(&self, folder: &Path, pid: RealPid) -> Result<()> {
        let kernel = Kernel::probe()?;
        let images_folder = folder.join("images");
        std::fs::create_dir_all(&images_folder).unwrap();
        let images = ImageDir::open(&images_folder)?;
        let mut opts = DumpOptions::new(Dir::open(images_folder).unwrap(), pid.0);
        (self.dump)(&mut opts);
        let target = pidfd::open(pid, 0)?;
        let mut out = FilesOut::new(
            &opts,
            &kernel,
            &images,
            (crate::mm::pages::PageStore::new(images.clone()), crate::dump::shmem_dev()?),
            Default::default(),
        );
        let proc = ProcDir::open(pid)?;
        let ids = pb::TaskKobjIdsEntry { files_id: 1, net_ns_id: Some(7), ..Default::default() };
        let stat = Stat::read(&proc)?;
        out.task_fds((pid, &ids, &stat), &proc, Some(target.as_fd()), &mut |fd| {
            pidfd::getfd(target.as_fd(), fd)
        })?;
        out.finish(false).map(drop)
    }

    fn restored(&self, folder: &Path) -> ! {
        let say = |what: &str| std::fs::write(folder.join("said"), what).unwrap();
        // A panic's message must get out although standard error belongs to the images.
        std::panic::set_hook(Box::new({
            let folder = folder.to_owned();
            move |info| drop(std::fs::write(folder.join("said"), info.to_string()))
        }));
        if let Err(e) = self.restore(folder) {
            say(&e.to_string());
            std::process::exit(1);
        }
        (self.check)(folder);
        say("fine");
        std::process::exit(0);
    }

    fn restore(&self, folder: &Path) -> Result<()> {
        let kernel = Kernel::probe()?;
        let images = std::mem::ManuallyDrop::new(ImageDir::open(folder.join("images"))?);
        let mut opts = RestoreOptions::new(Dir::open(folder.join("images")).unwrap());
        (self.restore)(&mut opts);
        let entries = images.read_all::<pb::FileEntry>(ImageKind::Files, 0)?;
        let mut entries = entries.into_iter().map(Arc::new).collect();
        join_tuns(&mut entries);
        let entries = ById::new(entries, |entry| FileId(entry.id)).unwrap();
        let fds: Vec<pb::FdinfoEntry> = images.read_all(ImageKind::Fdinfo, 1)?;
        let cx = PlanFiles::new(&images, &opts, &kernel, &entries)?;
        // Locks are of the task that was dumped.
        let locks: Vec<pb::FileLockEntry> = images.read_all(ImageKind::FileLocks, 0)?;
        let task = locks.first().map_or(TASK, |lock| VirtPid(lock.pid));
        let plan = FilesPlan::build(cx, &[Table { task, sharers: Vec::new(), fds: &fds }])?;
        let wrong = plan.preflight(&Preflight::new(&images, &opts, false), []);
        if let Some(e) = wrong.into_iter().next() {
            return Err(e.during("preflight"));
        }
        let zone = FilesShared::zone(&plan, 1024, 0, &opts, &kernel)?;
        // The engine's own descriptors live in the zone.
        let kept = zone.keep(images.as_fd().try_clone_to_owned().unwrap())?;
        let images = ImageDir::from_fd(kept, "images");
        // What the options hold open is closed like everything else outside the zone.
        let opts = std::mem::ManuallyDrop::new(opts);
        let shared = FilesShared::prepare(&plan, zone, &images, &opts, &kernel)?;
        shared.make(&plan, &images, &opts, Roots::default(), Default::default())?;
        let mut files = FilesTask::new(&plan, &shared, &images, &opts, &kernel, (task, None))?;
        files.restore()?;
        // What the restorer would do.
        files.into_late().iter().try_for_each(crate::sys::flock::late)?;
        shared.mapped()?;
        shared.finished();
        // Everything below the zone is in the images.
        let open: Vec<RawFd> = ProcDir::open(RealPid(std::process::id().cast_signed()))?.numbers("fd")?;
        let listed = |n: &RawFd| fds.iter().any(|fd| fd.fd.cast_signed() == *n);
        let lost: Vec<_> = fds.iter().filter(|fd| !open.contains(&fd.fd.cast_signed())).collect();
        assert!(lost.is_empty(), "not restored: {lost:?}");
        // Two are the listing itself.
        let strays = open.iter().filter(|n| !zone.contains(**n) && !listed(n)).count();
        assert!(strays <= 2, "left open: {open:?}");
        std::mem::forget((shared, images));
        Ok(())
    }
}

/// Moves a descriptor to a number that tests know.
pub(super) fn at(fd: impl Into<OwnedFd>, number: RawFd, cloexec: bool) {
    assert!(number >= FREE);
    fd::place(fd.into().as_fd(), number, cloexec).unwrap();
}

/// An open descriptor by number.
pub(super) fn get(number: RawFd) -> std::os::fd::BorrowedFd<'static> {
    fd::borrow(number).unwrap()
}

/// What /proc says the descriptor is.
pub(super) fn link(number: RawFd) -> String {
    std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap().to_string_lossy().into_owned()
}

/// `pos` and `flags` (with O_CLOEXEC of the descriptor).
pub(super) fn pos_and_flags(number: RawFd) -> (u64, u32) {
    let proc = ProcDir::open(RealPid(std::process::id().cast_signed())).unwrap();
    let info = crate::procfs::fdinfo::FdInfo::read(&proc, number).unwrap();
    (info.pos, info.flags)
}

/// Whether two numbers are one open file.
pub(super) fn same(a: RawFd, b: RawFd) -> bool {
    let me = RealPid(std::process::id().cast_signed());
    crate::sys::kcmp::compare(me, me, crate::sys::kcmp::What::File(a, b)).unwrap().is_eq()
}
