//! Namespaces of their own for a program: made by a first process that the harness clones into them, which sets up what
//! belongs to them and then becomes the program, or an init with the program below it.
//!
//! ```text
//! scratch/root            the root of its mount namespace, a bind of an ordinary folder (restored with --root)
//!   program lib lib64     the program of tests/programs, and the libraries that this process has mapped
//!   dev                   nodes; dev/pts its own devpts, dev/shm a tmpfs
//!   proc sys tmp          proc, sysfs, a tmpfs
//!   work                  its working folder: `Program::dir`
//! ```
//! Without a mount namespace of its own it runs in the scratch folder, as any other program.
//!
//! # Safety
//!
//! clone(2) is called while this process has one thread, so that the child may do what a forked child may.

mod container;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{
    Gid, Pid, Uid, chdir, pipe, pivot_root, setgroups, sethostname, setresgid, setresuid, setsid,
};

pub use container::{Container, Hierarchy, masked};

use crate::enclosure::loopback_up;
use crate::runner::skip;

/// Name of the host in a UTS namespace of its own.
pub const HOST: &str = "a-host-of-its-own";
/// Where user 0 of a user namespace stands outside of it.
pub const MAPPED: u32 = 100_000;
/// How many users and groups it has.
const USERS: u32 = 60_000;

/// Which namespaces a program has for itself.
#[derive(Clone, Copy, Debug)]
pub struct Home {
    kinds: CloneFlags,
    init: bool,
    outside: bool,
}

/// All kinds but those of users and control groups.
const USUAL: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

impl Home {
    /// Of pids, mounts, network, ipc and UTS; the program is a child of the first process.
    pub const fn new() -> Home {
        Home { kinds: USUAL, init: true, outside: false }
    }

    /// Only of these kinds. The first process is the program.
    pub const fn only(kinds: CloneFlags) -> Home {
        Home { kinds, init: false, outside: false }
    }

    /// The first process is the program.
    pub const fn without_init(self) -> Home {
        Home { init: false, ..self }
    }

    /// Also of users, user 0 being [`MAPPED`] outside.
    pub const fn with_users(self) -> Home {
        Home { kinds: self.kinds.union(CloneFlags::CLONE_NEWUSER), ..self }
    }

    /// Also of control groups.
    pub const fn with_groups(self) -> Home {
        Home { kinds: self.kinds.union(CloneFlags::CLONE_NEWCGROUP), ..self }
    }

    /// With a folder of this process's mounts, `Program::outside`, on `/outside`.
    pub const fn with_outside(self) -> Home {
        Home { outside: true, ..self }
    }

    fn has(&self, kind: CloneFlags) -> bool {
        self.kinds.contains(kind)
    }

    /// The folder that is to be the root, with all that `program` needs; `None` if it is to have this process's mounts.
    pub(crate) fn lay(
        &self,
        scratch: &Path,
        program: &Path,
        container: Option<&Container>,
    ) -> Result<Option<PathBuf>> {
        if !self.has(CloneFlags::CLONE_NEWNS) {
            return Ok(None);
        }
        let root = scratch.join("root");
        let folders = ["", "dev", "dev/pts", "dev/shm", "proc", "sys", "tmp", "scratch"];
        for folder in folders {
            let path = root.join(folder);
            fs::create_dir(&path).with_context(|| path.display().to_string())?;
            fs::set_permissions(&path, Permissions::from_mode(0o755)).context("chmod")?;
        }
        fs::set_permissions(root.join("scratch"), Permissions::from_mode(0o777)).context("chmod")?;
        same_file(program, &root.join("program"))?;
        for library in libraries()? {
            same_file(&library, &root.join(library.strip_prefix("/").unwrap_or(&library)))?;
        }
        if self.outside {
            let (outside, none) = (scratch.join("outside"), None::<&str>);
            fs::create_dir(&outside)
                .and_then(|()| fs::create_dir(root.join("outside")))
                .context("outside")?;
            mount(Some(&outside), &outside, none, MsFlags::MS_BIND, none).context("a mount to bring")?;
        }
        let mask = umask(Mode::empty());
        let nodes = nodes(&root.join("dev"));
        umask(mask);
        nodes?;
        if let Some(container) = container {
            container.lay(&root)?;
        }
        if self.has(CloneFlags::CLONE_NEWUSER) {
            for folder in folders {
                chown(root.join(folder), Some(MAPPED), Some(MAPPED)).context("chown")?;
            }
        }
        Ok(Some(root))
    }

    /// Clones the first process, which becomes `program` with these arguments; says what fails in the file `out`.
    pub(crate) fn launch(
        &self,
        scratch: &Path,
        root: Option<&Path>,
        (program, args): (&Path, &[&str]),
        container: Option<&Container>,
    ) -> Result<Pid> {
        let (go, may_go) = pipe().map(|(reader, writer)| (writer, reader)).context("pipe")?;
        let flags = libc::c_long::from(self.kinds.bits() | libc::SIGCHLD);
        // SAFETY: without an address for its stack the child goes on here, on a copy of all memory.
        let child =
            Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize) });
        match child {
            Err(e @ (Errno::EINVAL | Errno::EPERM | Errno::ENOSPC | Errno::EUSERS)) => {
                Err(skip(format!("namespaces of its own: clone: {e}")))
            }
            Err(e) => Err(e).context("clone"),
            Ok(0) => {
                drop(go);
                let out = root.map_or_else(|| scratch.join("out"), |root| root.join("scratch/out"));
                let failed = match self.become_program(may_go, scratch, root, (program, args), container) {
                    Ok(never) => match never {},
                    Err(e) => e,
                };
                // Whichever of the two leads there now.
                for out in [&out, Path::new("/scratch/out")] {
                    let _ = fs::write(out, format!("FAIL in the first process: {failed:#}\n"));
                }
                // SAFETY: ends the process; nothing of the parent's may be run here at exit.
                unsafe { libc::_exit(1) }
            }
            Ok(child) => {
                if self.has(CloneFlags::CLONE_NEWUSER) {
                    for map in ["uid_map", "gid_map"] {
                        fs::write(format!("/proc/{child}/{map}"), format!("0 {MAPPED} {USERS}"))
                            .context(map)?;
                    }
                }
                drop(go);
                Ok(Pid::from_raw(child as i32))
            }
        }
    }

    /// In the first process.
    fn become_program(
        &self,
        may_go: OwnedFd,
        scratch: &Path,
        root: Option<&Path>,
        (program, args): (&Path, &[&str]),
        container: Option<&Container>,
    ) -> Result<std::convert::Infallible> {
        File::from(may_go).read_to_end(&mut Vec::new()).context("waiting for the harness")?;
        if self.has(CloneFlags::CLONE_NEWUSER) {
            setgroups(&[]).context("setgroups")?;
            let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
            setresgid(group, group, group).context("setresgid")?;
            setresuid(user, user, user).context("setresuid")?;
        }
        setsid().context("setsid")?;
        if self.has(CloneFlags::CLONE_NEWUTS) {
            sethostname(HOST).context("sethostname")?;
        }
        if self.has(CloneFlags::CLONE_NEWNET) {
            loopback_up().context("the loopback device")?;
        }
        let program = match root {
            Some(root) => {
                self.mounts(scratch, root, container)?;
                chdir("/scratch").context("/scratch")?;
                Path::new("/program")
            }
            None => {
                chdir(scratch).context("the scratch folder")?;
                program
            }
        };
        let out = OpenOptions::new().append(true).create(true).open("out").context("out")?;
        let mut command = Command::new(program);
        if self.init {
            command.arg("init");
        }
        let (input, errors) = match container {
            Some(container) => container.stdio()?,
            None => (File::open("/dev/null")?, None),
        };
        command.args(args).stdin(input).stdout(out.try_clone()?).stderr(errors.unwrap_or(out));
        Err(command.exec()).context("exec")
    }

    /// Makes the mounts of the namespace, and `root` its root.
    fn mounts(&self, scratch: &Path, root: &Path, container: Option<&Container>) -> Result<()> {
        let none: Option<&str> = None;
        let (plain, quiet) = (MsFlags::empty(), MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("private mounts")?;
        mount(Some(root), root, none, MsFlags::MS_BIND, none).context("bind of the root")?;
        let make = |kind: &str, at: &str, flags, options: Option<&str>| {
            mount(Some(kind), &root.join(at), Some(kind), flags, options)
                .with_context(|| format!("mounting {kind} on {at}"))
        };
        let quietest = quiet | MsFlags::MS_NOEXEC;
        // Each shows the namespace that mounts it, and the kernel lets nobody show another's.
        if self.has(CloneFlags::CLONE_NEWPID) {
            make("proc", "proc", quietest, None)?;
        } else {
            mount(Some("/proc"), &root.join("proc"), none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                .context("bind of /proc")?;
        }
        if self.has(CloneFlags::CLONE_NEWNET) {
            make("sysfs", "sys", quietest | MsFlags::MS_RDONLY, None)?;
        }
        make(
            "devpts",
            "dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("newinstance,ptmxmode=0666,mode=620,gid=5"),
        )?;
        make("tmpfs", "dev/shm", quiet, Some("size=256m"))?;
        make("tmpfs", "tmp", plain, Some("size=16m,mode=1777"))?;
        if self.outside {
            mount(Some(&scratch.join("outside")), &root.join("outside"), none, MsFlags::MS_BIND, none)
                .context("bind of /outside")?;
        }
        if let Some(container) = container {
            container.mounts(root, self.has(CloneFlags::CLONE_NEWCGROUP))?;
        }
        chdir(root).context("chdir")?;
        pivot_root(".", ".").context("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).context("leaving the old root")?;
        chdir("/").context("chdir")
    }
}

impl Default for Home {
    fn default() -> Home {
        Home::new()
    }
}

/// The same file under another name, or else a copy of it.
fn same_file(file: &Path, name: &Path) -> Result<()> {
    let folder = name.parent().context("a name without a folder")?;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let file = fs::canonicalize(file).with_context(|| file.display().to_string())?;
    if fs::hard_link(&file, name).is_err() {
        fs::copy(&file, name).with_context(|| format!("copying {}", file.display()))?;
    }
    Ok(())
}

/// Shared libraries of this process, under the names by which the kernel and the linker look for them.
fn libraries() -> Result<Vec<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps").context("maps")?;
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.starts_with('/') && path.contains(".so"))
        .map(PathBuf::from)
        .collect();
    // The program names the linker itself, by a path that may lead through links.
    found.push("/lib64/ld-linux-x86-64.so.2".into());
    // Folders that are links to each other outside are not inside.
    let short: Vec<PathBuf> =
        found.iter().filter_map(|path| Some(Path::new("/").join(path.strip_prefix("/usr").ok()?))).collect();
    found.extend(short);
    found.sort();
    found.dedup();
    Ok(found.into_iter().filter(|path| path.exists()).collect())
}

fn nodes(dev: &Path) -> Result<()> {
    let all =
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    for (name, major, minor) in all {
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .map_err(|e| skip(format!("device nodes: mknod: {e}")))?;
    }
    symlink("pts/ptmx", dev.join("ptmx")).context("ptmx")?;
    symlink("/proc/self/fd", dev.join("fd")).context("fd")
}

/// Does `act` in a thread that has entered the namespaces of process `pid` that `names` calls as /proc does.
pub fn inside<T: Send>(pid: i32, names: &[&str], act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let files = names
        .iter()
        .map(|name| File::open(format!("/proc/{pid}/ns/{name}")).with_context(|| format!("{name} namespace")))
        .collect::<Result<Vec<_>>>()?;
    let enter = move || -> Result<T> {
        if names.contains(&"mnt") {
            nix::sched::unshare(CloneFlags::CLONE_FS).context("unshare")?;
        }
        for (file, name) in files.iter().zip(names) {
            nix::sched::setns(file, CloneFlags::empty())
                .with_context(|| format!("entering the {name} namespace"))?;
        }
        act()
    };
    std::thread::scope(|scope| match scope.spawn(enter).join() {
        Ok(result) => result,
        Err(_) => bail!("a thread in another namespace panicked"),
    })
}
