//! Checked options: what every front end (command line, configuration files, RPC) must produce and the only
//! thing the engine reads.
//!
//! A value here is already parsed and plausible; what was typed stays in the front end. Nothing in this module
//! looks at processes. Paths given by the user are relative to the work folder, as in CRIU, where nothing else
//! is said.

mod cgroup;
mod dir;
mod external;
mod memory;
mod namespace;
mod security;

pub use cgroup::{CgroupOptions, CgroupRoot, ManageCgroups};
pub use dir::Dir;
pub use external::{BadOption, ExtUnixSk, External, ExternalMounts, InheritFd};
pub use memory::{Lazy, PageServer, PreDumpMode, Tls};
pub use namespace::{EnableFs, JoinNs, JoinTarget, NetworkLock, NsKind, Tcp};
pub use security::{CpuCap, LsmKind, LsmProfile};

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use crate::scripts::{NoNotifier, Notifier};

/// Content of unlinked files that still goes into the images when nothing else is asked: 1 MiB.
pub const DEFAULT_GHOST_LIMIT: u64 = 1 << 20;

/// How long the tree may resist being frozen when `--timeout` is not given.
pub const DEFAULT_FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a dump does with the tasks once the images are complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Afterwards {
    /// Kill the tree: its life continues in the images.
    #[default]
    Kill,
    /// Let it run on (`--leave-running`).
    Run,
    /// Leave it stopped, as after SIGSTOP (`--leave-stopped`).
    Stop,
}

/// How a mapped or open file is recognised on restore as the one that was dumped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileValidation {
    /// Same size only.
    Size,
    /// Same ELF build-id where there is one, else same size.
    #[default]
    BuildId,
}

/// The descriptor the log is written to, shared between the logger and the engine.
///
/// A task being rebuilt must vacate the descriptor numbers its images claim: the engine duplicates the log
/// descriptor to a free number and tells the logger by [`LogFd::set`]. Blobs get the number as an argument.
#[derive(Clone, Debug)]
pub struct LogFd(Arc<AtomicI32>);

impl LogFd {
    /// A log descriptor that is `fd` now.
    pub fn new(fd: RawFd) -> Self {
        LogFd(Arc::new(AtomicI32::new(fd)))
    }

    /// The present number.
    pub fn get(&self) -> RawFd {
        self.0.load(Ordering::Relaxed)
    }

    /// Writes `bytes` whole; false if the kernel refused. One call, one line: lines of several processes that
    /// share the file do not mix.
    pub fn write(&self, bytes: &[u8]) -> bool {
        crate::sys::fd::write_all(self.get(), bytes)
    }

    /// Puts the file behind `fd` in the place of what the number was until now, in this process only.
    ///
    /// # Errors
    /// EBADF if `fd` is not open.
    pub fn redirect(&self, fd: BorrowedFd<'_>) -> crate::Result<()> {
        crate::sys::fd::place(fd, self.get(), true)
    }

    /// The logger of this process writes to `fd` from now on.
    pub fn set(&self, fd: RawFd) {
        self.0.store(fd, Ordering::Relaxed);
    }
}

impl Default for LogFd {
    /// Standard error, where lines go when no log was set up.
    fn default() -> Self {
        LogFd::new(2)
    }
}

/// What the engine must know of the log; opening files and levels is the front end's business.
#[derive(Clone, Debug, Default)]
pub struct LogSettings {
    /// Where lines are written.
    pub fd: LogFd,
    /// 0 nothing, 1 errors, 2 warnings, 3 information and time stamps, 4 debug: what blobs are told.
    pub level: u32,
    /// `--log-pid`: each restored task logs to a file of its own (the logger does it, blobs follow the fd).
    pub per_pid: bool,
}

/// What a dump and a restore have in common.
#[derive(Clone, Debug)]
pub struct CommonOptions {
    /// `-D`: where images are.
    pub images_dir: Dir,
    /// `-W`: where logs, stats and pidfiles go; the images folder when not given.
    pub work_dir: Dir,
    /// `-r`: root of the file system that is dumped or restored into, in our mount namespace.
    pub root: Option<PathBuf>,
    /// `-j`: session and process group may lead outside the tree, the terminal comes from outside.
    pub shell_job: bool,
    /// RPC only: the master of the tree's terminal may stay outside on dump; a restore makes another and hands it to the
    /// client.
    pub orphan_pts_master: bool,
    /// `-l`: save and restore file locks; without it a held lock is refused.
    pub file_locks: bool,
    /// `--link-remap`: an unlinked file that still has other links may be given a name on the file system.
    pub link_remap: bool,
    /// `--evasive-devices`: any path to the same device will do.
    pub evasive_devices: bool,
    /// `-x`: external unix peers, legacy of `--external unix[INO]`.
    pub ext_unix_sk: ExtUnixSk,
    /// TCP connections: `--tcp-established`, `--tcp-close`, `--skip-in-flight`.
    pub tcp: Tcp,
    /// `--empty-ns net`: make the network namespace, leave its content to action scripts.
    pub empty_net_ns: bool,
    /// `--external`, and its legacy forms (`--ext-mount-map`, `--veth-pair`), in the order given.
    pub external: Vec<External>,
    /// `--external mnt[]`, `--enable-external-*`: mounts found to be external by themselves.
    pub external_mounts: ExternalMounts,
    /// `--skip-mnt`: mount points that are left out.
    pub skip_mnt: Vec<PathBuf>,
    /// `--enable-fs`: file system types that are dumped by mounting them again, known or not.
    pub enable_fs: EnableFs,
    /// Control groups.
    pub cgroup: CgroupOptions,
    /// `--cpu-cap`: which CPU features must agree.
    pub cpu_cap: CpuCap,
    /// `--force-irmap`: look up watched inodes by walking directories.
    pub force_irmap: bool,
    /// `--irmap-scan-path`: where that walk looks besides the known places.
    pub irmap_scan_paths: Vec<PathBuf>,
    /// `--auto-dedup`: on dump, punch what the parent images hold twice; on restore, punch what was restored.
    pub auto_dedup: bool,
    /// `--lazy-pages` and where the pages are fetched or served.
    pub lazy: Lazy,
    /// `--stream`: images go through an image streamer's socket in the images folder.
    pub stream: bool,
    /// `--page-server`, `--address`, `--port`, `--ps-socket`: pages travel to a page server.
    pub page_server: Option<PageServer>,
    /// `--tls*`: encryption of page server connections.
    pub tls: Tls,
    /// `--file-validation`.
    pub file_validation: FileValidation,
    /// `--weak-sysctls`: sysctls the kernel lacks are skipped.
    pub weak_sysctls: bool,
    /// `--allow-uprobes`: mappings of uprobes are no reason to refuse.
    pub allow_uprobes: bool,
    /// `--unprivileged`: accept the limits of running with CAP_CHECKPOINT_RESTORE only.
    pub unprivileged: bool,
    /// `-L`: where plugins are.
    pub libdir: Option<PathBuf>,
    /// `--lsm-profile`: profile that replaces the dumped one on restore.
    pub lsm_profile: Option<LsmProfile>,
    /// `--lsm-mount-context`: SELinux mount context that replaces the dumped ones on restore.
    pub lsm_mount_context: Option<String>,
    /// `--action-script` and RPC notifications.
    pub notifier: Arc<dyn Notifier>,
    /// `--status-fd`: a NUL byte is written to it and it is closed once we serve requests.
    pub status_fd: Option<RawFd>,
    /// The log.
    pub log: LogSettings,
}

impl CommonOptions {
    /// Defaults of CRIU for images in `images_dir`, which is the work folder too.
    pub fn new(images_dir: Dir) -> Self {
        CommonOptions {
            work_dir: images_dir.clone(),
            images_dir,
            root: None,
            shell_job: false,
            orphan_pts_master: false,
            file_locks: false,
            link_remap: false,
            evasive_devices: false,
            ext_unix_sk: ExtUnixSk::default(),
            tcp: Tcp::default(),
            empty_net_ns: false,
            external: Vec::new(),
            external_mounts: ExternalMounts::default(),
            skip_mnt: Vec::new(),
            enable_fs: EnableFs::default(),
            cgroup: CgroupOptions::default(),
            cpu_cap: CpuCap::default(),
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            auto_dedup: false,
            lazy: Lazy::default(),
            stream: false,
            page_server: None,
            tls: Tls::default(),
            file_validation: FileValidation::default(),
            weak_sysctls: false,
            allow_uprobes: false,
            unprivileged: false,
            libdir: None,
            lsm_profile: None,
            lsm_mount_context: None,
            notifier: Arc::new(NoNotifier),
            status_fd: None,
            log: LogSettings::default(),
        }
    }
}

/// Options of `dump` and `pre-dump`.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// What dump and restore share.
    pub common: CommonOptions,
    /// `-t`: real pid of the root task, in our pid namespace.
    pub pid: i32,
    /// What becomes of the tasks.
    pub afterwards: Afterwards,
    /// `--freeze-cgroup`: collect and freeze through this freezer folder (v1 or v2) instead of by ptrace alone.
    pub freeze_cgroup: Option<PathBuf>,
    /// How long freezing the tree may take.
    pub freeze_timeout: Duration,
    /// `--timeout` as given: bound of the whole operation, enforced by [`crate::interrupt::check`].
    pub timeout: Option<Duration>,
    /// `--ghost-limit`: largest content of one unlinked file that goes into the images, in bytes.
    pub ghost_limit: u64,
    /// `--ghost-fiemap`: find holes of ghost files by FIEMAP, else by SEEK_HOLE.
    pub ghost_fiemap: bool,
    /// `--track-mem`: start tracking memory changes, for a later dump on top of this one.
    pub track_mem: bool,
    /// `--background`: memory is copied when the tree runs again.
    pub background: bool,
    /// `--compress`: pages are compressed, at this level of zstd.
    pub compress: Option<i32>,
    /// `--checksum`: sums of all images go with them.
    pub checksum: bool,
    /// `--prev-images-dir`: images to build upon, relative to the images folder.
    pub prev_images_dir: Option<PathBuf>,
    /// `--pre-dump-mode`.
    pub pre_dump_mode: PreDumpMode,
    /// `--network-lock`: how packets are kept away while connections are dumped.
    pub network_lock: NetworkLock,
    /// RPC only: socket in which pidfds of earlier pre-dumps are kept, to notice reused pids.
    pub pidfd_store: Option<RawFd>,
}

impl DumpOptions {
    /// Defaults of CRIU for dumping the tree of `pid` into `images_dir`.
    pub fn new(images_dir: Dir, pid: i32) -> Self {
        DumpOptions {
            common: CommonOptions::new(images_dir),
            pid,
            afterwards: Afterwards::default(),
            freeze_cgroup: None,
            freeze_timeout: DEFAULT_FREEZE_TIMEOUT,
            timeout: None,
            ghost_limit: DEFAULT_GHOST_LIMIT,
            ghost_fiemap: true,
            track_mem: false,
            background: false,
            compress: None,
            checksum: false,
            prev_images_dir: None,
            pre_dump_mode: PreDumpMode::default(),
            network_lock: NetworkLock::default(),
            pidfd_store: None,
        }
    }
}

impl DumpOptions {
    /// The same with further external resources.
    #[must_use]
    pub fn with_external(&self, more: Vec<External>) -> Self {
        let mut options = self.clone();
        options.common.external.extend(more);
        options
    }
}

/// Options of `restore`.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// What dump and restore share.
    pub common: CommonOptions,
    /// `-d`: return once the tasks run, instead of waiting for the root task's end.
    pub detached: bool,
    /// `-S`: the root task becomes a child of our parent (needs `detached`).
    pub sibling: bool,
    /// `-s`: leave the tree stopped.
    pub leave_stopped: bool,
    /// `--exec-cmd`: program that the front end executes afterwards in our place, as parent of the root task.
    pub exec_cmd: Vec<OsString>,
    /// `--pidfile`: gets the root task's real pid in decimal; created, never overwritten; relative to work_dir.
    pub pidfile: Option<PathBuf>,
    /// `--inherit-fd`.
    pub inherit_fds: Vec<InheritFd>,
    /// `-J`: namespaces to join instead of making them.
    pub join_ns: Vec<JoinNs>,
    /// `--mntns-compat-mode`: the older mount engine.
    pub mntns_compat_mode: bool,
    /// `--skip-file-rwx-check`: permissions of files may differ from the dump's.
    pub skip_file_rwx_check: bool,
    /// `--background`: memory comes when the tasks run.
    pub background: bool,
    /// `--dry-run`: preflight only, nothing is created.
    pub dry_run: bool,
    /// `--timeout` as given: bound of the whole operation, enforced by [`crate::interrupt::check`].
    pub timeout: Option<Duration>,
}

impl RestoreOptions {
    /// Defaults of CRIU for restoring what `images_dir` holds.
    pub fn new(images_dir: Dir) -> Self {
        RestoreOptions {
            common: CommonOptions::new(images_dir),
            detached: false,
            sibling: false,
            leave_stopped: false,
            exec_cmd: Vec::new(),
            pidfile: None,
            inherit_fds: Vec::new(),
            join_ns: Vec::new(),
            mntns_compat_mode: false,
            skip_file_rwx_check: false,
            background: false,
            dry_run: false,
            timeout: None,
        }
    }
}
