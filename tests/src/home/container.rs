//! What container runtimes add to a program's namespaces: control groups and how they are shown, files and masks from
//! outside, a terminal or a pipe for its output.
//!
//! # Safety
//!
//! ioctl(2) gets numbers only.

use std::fs::{self, File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

/// A hierarchy of control groups that a container shows.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    /// Its folder below /sys/fs/cgroup.
    pub name: String,
    /// `cgroup` or `cgroup2`.
    pub kind: &'static str,
    /// What mount(2) is told besides.
    pub option: String,
    /// The container's group, outside.
    pub group: PathBuf,
}

/// A container, beside its namespaces.
#[derive(Debug, Default)]
pub struct Container {
    /// In a cgroup namespace of its own they are mounted in there, else their groups are brought.
    pub hierarchies: Vec<Hierarchy>,
    /// A file from outside, on /etc/hosts.
    pub hosts: Option<PathBuf>,
    /// A terminal of its own devpts is its input, its error output and /dev/console; the master is sent here.
    pub console: Option<OwnedFd>,
    /// Its error output, without a terminal.
    pub errors: Option<OwnedFd>,
}

/// Files of /proc of which the first that is there is hidden behind /dev/null.
const MASKED: [&str; 4] = ["timer_list", "keys", "kcore", "sysrq-trigger"];

/// The path inside of the file that is masked.
pub fn masked() -> Option<String> {
    MASKED.iter().map(|name| format!("/proc/{name}")).find(|path| Path::new(path).exists())
}

impl Container {
    /// Makes what mounts go on.
    pub(super) fn lay(&self, root: &Path) -> Result<()> {
        for folder in ["etc", "dev/mqueue"] {
            fs::create_dir(root.join(folder)).context(folder)?;
        }
        for file in ["etc/hosts", "dev/console"] {
            File::create(root.join(file)).context(file)?;
        }
        Ok(())
    }

    /// Mounts below `root`, after those every home has. `own`: in a cgroup namespace of its own.
    pub(super) fn mounts(&self, root: &Path, own: bool) -> Result<()> {
        let none: Option<&str> = None;
        let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let at = |path: &str| root.join(path.trim_start_matches('/'));
        let bind = |from: &Path, to: &Path, flags: MsFlags| {
            mount(Some(from), to, none, MsFlags::MS_BIND, none)?;
            if flags.is_empty() {
                return Ok(());
            }
            mount(none, to, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none)
        };
        mount(Some("mqueue"), &at("dev/mqueue"), Some("mqueue"), quiet, none).context("mqueue")?;
        if let Some(hosts) = &self.hosts {
            bind(hosts, &at("etc/hosts"), MsFlags::empty()).context("/etc/hosts")?;
        }
        bind(&at("proc/sys"), &at("proc/sys"), quiet | MsFlags::MS_RDONLY).context("/proc/sys")?;
        // As with LXC's proc:mixed, those of the network can be set.
        let net = at("proc/sys/net");
        bind(&net, &net, quiet).context("/proc/sys/net")?;
        if let Some(path) = masked() {
            bind(Path::new("/dev/null"), &at(&path), MsFlags::empty()).context(path)?;
        }
        if self.hierarchies.is_empty() {
            return Ok(());
        }
        let top = at("sys/fs/cgroup");
        mount(Some("tmpfs"), &top, Some("tmpfs"), quiet, Some("mode=755")).context("tmpfs for groups")?;
        for hierarchy in &self.hierarchies {
            let to = top.join(&hierarchy.name);
            fs::create_dir(&to).context("a folder of groups")?;
            if own {
                let option = Some(hierarchy.option.as_str()).filter(|option| !option.is_empty());
                mount(Some(hierarchy.kind), &to, Some(hierarchy.kind), quiet, option)
            } else {
                bind(&hierarchy.group, &to, quiet)
            }
            .with_context(|| format!("groups {}", hierarchy.name))?;
        }
        mount(none, &top, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | quiet, none)
            .context("read-only groups")
    }

    /// Input and error output of the program; called at the root of its mount namespace, in a session of its own.
    pub(super) fn stdio(&self) -> Result<(File, Option<File>)> {
        let Some(socket) = &self.console else {
            let errors = self.errors.as_ref().map(OwnedFd::try_clone).transpose()?;
            return Ok((File::open("/dev/null")?, errors.map(File::from)));
        };
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).context("a terminal")?;
        grantpt(&master).and_then(|()| unlockpt(&master)).context("a terminal")?;
        let name = ptsname_r(&master).context("a terminal")?;
        let none: Option<&str> = None;
        mount(Some(name.as_str()), "/dev/console", none, MsFlags::MS_BIND, none).context("/dev/console")?;
        let terminal = OpenOptions::new().read(true).write(true).open(&name).context("the terminal")?;
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
            .context("TIOCSCTTY")?;
        hand_over(socket.as_fd(), master.as_fd())?;
        Ok((terminal.try_clone()?, Some(terminal)))
    }
}

/// Sends a descriptor.
fn hand_over(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> Result<()> {
    let (fds, bytes) = ([fd.as_raw_fd()], [0]);
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::empty(), None)
        .map(drop)
        .context("handing the terminal over")
}
