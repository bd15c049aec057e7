//! Test support and tests: mounts of one namespace dumped and built again in another.
//!
//! Each role is this test binary started again for the one test: the first pivots into a root of its own, mounts and
//! waits; the second reads the images outside, goes into a new namespace, builds, and compares what it sees there
//! with the images field by field, and the content with what the first had noted.

/// The path of a test of the module it is used in, as the harness knows it.
macro_rules! name {
    ($name:literal) => {
        concat!(module_path!(), "::", $name)
    };
}

mod acts;
mod cases;
pub(super) mod compare;
mod images;
mod propagation;
mod refusals;
mod several;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    fcntl::OFlag,
    mount::{MntFlags, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, chdir, pivot_root},
};
use rcriu_images::ImageDir;

use super::{DumpMounts, Mount, Prepared, Table, Tree, dump, flags, prepare::Given};
use crate::{
    error::Result,
    options::{Dir, DumpOptions, RestoreOptions},
    pstree::RealPid,
    sys::mount::{self as calls, Mounting},
    sys::{fd, xattr},
};

pub(super) use self::acts::{bind, change, mount, text};
use self::compare::{assert_like, listed};

const ROLE: &str = "RCRIU_TEST_ROLE";
const FOLDER: &str = "RCRIU_TEST_FOLDER";
/// Number of the namespace in the images.
const ID: u32 = 7;

/// One round trip. The root of the namespace is the folder `root` of the test's own.
pub(super) struct Trip {
    /// The test's path, as the harness knows it.
    pub(super) test: &'static str,
    /// Mounts what is on the host; gets the test's folder.
    pub(super) outside: fn(&Path),
    /// Mounts the rest, inside.
    pub(super) inside: fn(),
    /// Folders whose content is compared.
    pub(super) content: &'static [&'static str],
    pub(super) dump: fn(&mut DumpOptions, &Path),
    pub(super) restore: fn(&mut RestoreOptions, &Path),
    /// Looks at what was built, beyond what is compared anyway.
    pub(super) check: fn(),
    /// In a user namespace of its own.
    pub(super) users: bool,
    /// Mounts on the host, which is a namespace of its own then.
    pub(super) host: Option<fn(&Path)>,
    /// Calls to build with, in the place of those the kernel has.
    pub(super) calls: Option<calls::Calls>,
    /// The process becomes another program, of the namespace alone, which CRIU can dump.
    pub(super) program: bool,
    /// What threads mount that have copies of the namespace.
    pub(super) others: &'static [fn()],
}

impl Trip {
    pub(super) fn new(test: &'static str, inside: fn()) -> Trip {
        Trip {
            test,
            outside: |_| {},
            inside,
            content: &[],
            dump: |_, _| {},
            restore: |_, _| {},
            check: || {},
            users: false,
            host: None,
            calls: None,
            program: false,
            others: &[],
        }
    }

    /// Plays the role asked for; without one, the whole trip.
    pub(super) fn run(&self) {
        if let Some(folder) = self.role() {
            return self.play(&folder);
        }
        let folder = tempfile::tempdir().unwrap();
        if self.host.is_some() {
            let mut command = self.command("host", folder.path(), &["--mount", "--propagation", "private"]);
            let out = command.output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        } else {
            self.there_and_back(folder.path());
        }
    }

    fn there_and_back(&self, folder: &Path) {
        let Some(mut first) = First::start(self, folder) else { return };
        self.dumped(folder, &first.pids).unwrap();
        first.end();
        self.built(folder);
    }

    /// The dump alone, whose error is wanted.
    pub(super) fn refusal(&self) -> Option<String> {
        if let Some(folder) = self.role() {
            self.play(&folder);
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let first = First::start(self, folder.path())?;
        Some(self.dumped(folder.path(), &first.pids).unwrap_err().to_string())
    }

    fn role(&self) -> Option<PathBuf> {
        std::env::var(ROLE).ok()?;
        Some(std::env::var_os(FOLDER)?.into())
    }

    fn play(&self, folder: &Path) {
        match std::env::var(ROLE).as_deref() {
            Ok("first") => self.first(folder),
            Ok("host") => {
                self.host.unwrap()(folder);
                self.there_and_back(folder);
            }
            Ok("third") => self.third(folder),
            _ => self.second(folder),
        }
    }

    /// Builds what the images in `folder` hold, in a process of its own.
    pub(super) fn built(&self, folder: &Path) {
        let mut command = self.command("second", folder, &["--pid", "--net", "--ipc", "--fork"]);
        let status = command.stdout(Stdio::null()).status().unwrap();
        let said = fs::read_to_string(folder.join("said")).unwrap_or_default();
        assert!(status.success() && said == "fine", "{status}: {said}");
    }

    fn command(&self, role: &str, folder: &Path, namespaces: &[&str]) -> Command {
        let name = self.test.split_once("::").unwrap().1;
        let mut command = Command::new("unshare");
        command.arg("--kill-child").args(namespaces).arg(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(FOLDER, folder).stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    pub(super) fn dumped(&self, folder: &Path, pids: &[RealPid]) -> Result<Table> {
        let place = folder.join("images");
        fs::create_dir_all(&place).unwrap();
        let images = ImageDir::open(&place)?;
        let mut opts = DumpOptions::new(Dir::open(place).unwrap(), pids[0].0);
        (self.dump)(&mut opts, folder);
        let spaces: Vec<_> = pids.iter().copied().zip(ID..).collect();
        dump(&DumpMounts { spaces: &spaces, opts: &opts, images: &images, masters: &[] })
    }

    fn first(&self, folder: &Path) {
        let pid = fs::read_link("/proc/self").unwrap();
        let proc = folder_of(Path::new("/proc"));
        let here = folder_of(folder);
        if self.host.is_none() {
            change("/", flags::REC | flags::PRIVATE);
        }
        let root = folder.join("root");
        fs::create_dir_all(&root).unwrap();
        bind(&root, &root);
        (self.outside)(folder);
        chdir(&root).unwrap();
        pivot_root(".", ".").unwrap();
        umount2(".", MntFlags::MNT_DETACH).unwrap();
        chdir("/").unwrap();
        (self.inside)();
        let others: Vec<String> = self.others.iter().map(|other| copy(*other, &proc)).collect();
        put(&here, "wanted", &self.listed());
        println!("\nready {} {}", pid.display(), others.join(" "));
        std::io::stdout().flush().unwrap();
        if self.program {
            use std::os::unix::process::CommandExt;
            nix::unistd::setsid().unwrap();
            // Whatever was inherited is of the host.
            for number in (0..64).filter(|number| fd::is_open(*number)) {
                fd::close(number).unwrap();
            }
            panic!("{}", Command::new("/usr/bin/sleep").arg("1000").env_clear().exec());
        }
        loop {
            std::thread::park();
        }
    }

    fn ids(&self) -> Vec<u32> {
        (ID..).take(1 + self.others.len()).collect()
    }

    fn listed(&self) -> String {
        self.content.iter().map(|place| listed(Path::new(place))).collect()
    }

    fn second(&self, folder: &Path) {
        let here = folder_of(folder);
        let wanted = fs::read_to_string(folder.join("wanted")).unwrap();
        // A panic's message must get out of the namespace.
        let for_hook = here.try_clone().unwrap();
        std::panic::set_hook(Box::new(move |info| put(&for_hook, "said", &info.to_string())));
        let place = folder.join("images");
        let images = ImageDir::open(&place).unwrap();
        let mut opts = RestoreOptions::new(Dir::open(place).unwrap());
        opts.common.root = Some(folder.join("root"));
        (self.restore)(&mut opts, folder);
        let said = (|| {
            let tree = super::read(&images, &self.ids(), &opts)?;
            let mut prepared = tree.prepare(&opts)?;
            prepared.calls = self.calls.unwrap_or(prepared.calls);
            if self.users {
                self.in_user_namespace(folder, &prepared);
                return Ok(());
            }
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let tables = built(&tree, &prepared, &images)?;
            drop(prepared);
            assert_like(&tree, &tables);
            assert_eq!(self.listed(), wanted);
            (self.check)();
            Ok::<(), crate::Error>(())
        })();
        put(&here, "said", &said.map_or_else(|e: crate::Error| e.to_string(), |()| "fine".into()));
    }

    /// Hands what was prepared to a process in another user namespace.
    fn in_user_namespace(&self, folder: &Path, prepared: &Prepared) {
        let mut numbers = String::new();
        for (at, given) in &prepared.given {
            let Given::Clone(clone) = given else { panic!("no clones here") };
            fd::set_cloexec(clone.as_raw_fd(), false).unwrap();
            numbers += &format!("{at} {} ", clone.as_raw_fd());
        }
        let kinds = ["--user", "--map-root-user", "--pid", "--net", "--ipc", "--fork"];
        let mut command = self.command("third", folder, &kinds);
        let status = command.env("RCRIU_TEST_GIVEN", numbers).stdout(Stdio::null()).status().unwrap();
        assert!(status.success(), "{}", fs::read_to_string(folder.join("said")).unwrap_or_default());
    }

    fn third(&self, folder: &Path) {
        let here = folder_of(folder);
        let wanted = fs::read_to_string(folder.join("wanted")).unwrap();
        let place = folder.join("images");
        let images = ImageDir::open(&place).unwrap();
        let mut opts = RestoreOptions::new(Dir::open(place).unwrap());
        opts.common.root = Some(folder.join("root"));
        (self.restore)(&mut opts, folder);
        let tree = super::read(&images, &self.ids(), &opts).unwrap();
        // Where it has rights over mounts, to be told what there is.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let mut prepared =
            Prepared { calls: calls::Calls::probe(), given: Default::default(), sources: Default::default() };
        let numbers = std::env::var("RCRIU_TEST_GIVEN").unwrap();
        let numbers: Vec<i32> = numbers.split_whitespace().map(|n| n.parse().unwrap()).collect();
        for pair in numbers.chunks(2) {
            prepared.given.insert(pair[0] as usize, Given::Clone(fd::take(pair[1]).unwrap()));
        }
        let said = built(&tree, &prepared, &images);
        put(&here, "said", &format!("{:?}", said.as_ref().map(drop)));
        assert_like(&tree, &said.unwrap());
        assert_eq!(self.listed(), wanted);
        (self.check)();
    }
}

/// Builds, and gives the table of each namespace.
fn built(tree: &Tree, prepared: &Prepared, images: &ImageDir) -> Result<Vec<Vec<u8>>> {
    let me = folder_of(Path::new("/proc/thread-self"));
    let mut files = Vec::new();
    super::build(tree, (prepared, super::Beside::default()), images, |space| {
        files.push((space, nix::fcntl::openat(&me, "mountinfo", OFlag::O_RDONLY, Mode::empty()).unwrap()));
        Ok(())
    })?;
    files.sort_by_key(|(space, _)| *space);
    let read = |(_, file): (usize, OwnedFd)| {
        let mut text = Vec::new();
        fs::File::from(file).read_to_end(&mut text).unwrap();
        text
    };
    Ok(files.into_iter().map(read).collect())
}

/// A thread that goes into a copy of the namespace, mounts there, and stays: its number in `proc`.
fn copy(mounts: fn(), proc: &OwnedFd) -> String {
    let proc = proc.try_clone().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mounts();
        let link = nix::fcntl::readlinkat(&proc, "thread-self").unwrap().into_string().unwrap();
        tell.send(link.rsplit('/').next().unwrap().to_owned()).unwrap();
        loop {
            std::thread::park();
        }
    });
    told.recv().unwrap()
}

/// The processes whose mounts are dumped.
pub(super) struct First {
    child: Child,
    pub(super) pids: Vec<RealPid>,
}

impl First {
    pub(super) fn start(trip: &Trip, folder: &Path) -> Option<First> {
        let kinds: &[&str] = &["--mount", "--propagation", "slave", "--pid", "--net", "--ipc", "--fork"];
        let users: &[&str] = &["--mount", "--pid", "--net", "--ipc", "--user", "--map-root-user", "--fork"];
        let criu: &[&str] = &["--mount", "--pid", "--fork"];
        let kinds = match (trip.users, trip.program) {
            (true, _) => users,
            (_, true) => criu,
            _ => kinds,
        };
        let mut command = trip.command("first", folder, kinds);
        let Ok(mut child) = command.stdout(Stdio::piped()).spawn() else {
            eprintln!("skipped: no unshare program");
            return None;
        };
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.map_while(|l| l.ok()).find_map(|l| l.strip_prefix("ready ").map(str::to_owned));
        let numbers = |line: &str| line.split_whitespace().map(|n| RealPid(n.parse().unwrap())).collect();
        let Some(pids) = ready.as_deref().map(numbers) else {
            child.wait().unwrap();
            if calls::Calls::probe().detached {
                panic!("the first process failed");
            }
            eprintln!("skipped: namespaces cannot be made here");
            return None;
        };
        Some(First { child, pids })
    }

    pub(super) fn end(&mut self) {
        let _ = kill(Pid::from_raw(self.pids[0].0), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Drop for First {
    fn drop(&mut self) {
        self.end();
    }
}

fn folder_of(path: &Path) -> OwnedFd {
    nix::fcntl::open(path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
}

fn put(folder: &OwnedFd, name: &str, text: &str) {
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_TRUNC;
    let file = nix::fcntl::openat(folder, name, flags, Mode::from_bits_truncate(0o644)).unwrap();
    fs::File::from(file).write_all(text.as_bytes()).unwrap();
}
