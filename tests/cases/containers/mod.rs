//! Containers as runc, crun, podman and LXC make them, with the requests that these send: what is left of a container
//! after them is what it was.
//!
//! # Safety
//!
//! Descriptors that came with a message belong to nobody else yet.

mod lxc;
mod order;
mod runtimes;
mod siblings;

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::cmsg_space;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use rcriu_tests::home::{Container, Hierarchy};
use rcriu_tests::{Case, Home, Program, Scratch, skip};

use crate::cgroups::{Group, group_of, hierarchy};

/// Controllers of version 1 in which containers get groups, where they are mounted.
const CONTROLLERS: [&str; 4] = ["pids", "freezer", "devices", "name=systemd"];

/// Groups of one container, one in each hierarchy there is.
struct Groups {
    all: Vec<(Hierarchy, Group, PathBuf)>,
}

impl Groups {
    fn new() -> Result<Groups> {
        let mut all = Vec::new();
        let wanted = CONTROLLERS.map(|option| ("cgroup", option));
        for (kind, option) in wanted.into_iter().chain([("cgroup2", "")]) {
            let Ok(top) = hierarchy(kind, option) else { continue };
            let group = Group::new(&top)?;
            let name = if option.is_empty() { "unified" } else { option.trim_start_matches("name=") };
            let shown =
                Hierarchy { name: name.into(), kind, option: option.into(), group: group.path.clone() };
            all.push((shown, group, top));
        }
        if all.is_empty() { Err(skip("no control groups are mounted")) } else { Ok(Groups { all }) }
    }

    fn hierarchies(&self) -> Vec<Hierarchy> {
        self.all.iter().map(|(hierarchy, ..)| hierarchy.clone()).collect()
    }

    /// Controllers as clients name them, and the group's path.
    fn roots(&self) -> impl Iterator<Item = (&str, String)> {
        self.all.iter().map(|(hierarchy, group, top)| (&hierarchy.option[..], group.name(top)))
    }

    /// The group that is frozen for a dump.
    fn freezer(&self) -> Result<&Path> {
        let freezes = |h: &&(Hierarchy, Group, PathBuf)| ["freezer", ""].contains(&&h.0.option[..]);
        let found = self.all.iter().find(freezes).ok_or_else(|| skip("no group can be frozen"))?;
        Ok(&found.1.path)
    }

    /// Starts something in these groups: what is born meanwhile stays in them.
    fn within<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut before = Vec::new();
        for (hierarchy, group, top) in &self.all {
            let ours = group_of("self", &hierarchy.option)?;
            before.push(top.join(ours.trim_start_matches('/')).join("cgroup.procs"));
            group.set("cgroup.procs", 0)?;
        }
        let started = start();
        for procs in before {
            fs::write(&procs, "0").with_context(|| procs.display().to_string())?;
        }
        started
    }
}

/// What a container's output goes to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    Pipe,
    Terminal,
}

/// A container that runs.
struct Running {
    program: Program,
    groups: Groups,
    scratch: Scratch,
    /// Where its output comes out.
    output: File,
}

impl Running {
    fn start(home: Home, output: Output, program: &[&str]) -> Result<Running> {
        let (groups, scratch) = (Groups::new()?, Scratch::new()?);
        let hosts = scratch.path().join("hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n")?;
        let hierarchies = groups.hierarchies();
        let mut container = Container { hierarchies, hosts: Some(hosts), ..Container::default() };
        let reader = match output {
            Output::Pipe => {
                let (reader, writer) = std::io::pipe()?;
                container.errors = Some(writer.into());
                OwnedFd::from(reader)
            }
            Output::Terminal => {
                let kind = SockType::Stream;
                let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
                container.console = Some(theirs);
                ours
            }
        };
        let (kind, args) = program.split_first().context("a program")?;
        let program = groups.within(|| Program::start_container(home, &container, kind, args))?;
        let output = if output == Output::Terminal { received(&reader)? } else { reader };
        Ok(Running { program, groups, scratch, output: output.into() })
    }

    fn hosts(&self) -> String {
        self.scratch.path().join("hosts").display().to_string()
    }

    /// The root of the container as a mount of its own, which runtimes restore into.
    fn bound_root(&self, name: &str) -> Result<String> {
        let at = self.scratch.path().join(name);
        let (root, none) = (self.program.root().context("no root")?, None::<&str>);
        fs::create_dir(&at)?;
        mount(Some(root), &at, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
            .context("a mount of the root")?;
        Ok(at.display().to_string())
    }

    /// A fresh folder for images or logs.
    fn folder(&self, name: &str) -> Result<File> {
        let path = self.scratch.path().join(name);
        fs::create_dir(&path)?;
        Ok(File::open(path)?)
    }
}

/// The descriptor that a container has sent.
fn received(socket: &OwnedFd) -> Result<OwnedFd> {
    let (mut byte, mut room) = ([0], cmsg_space!([RawFd; 1]));
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut room), flags)?;
    let fd = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made it for us.
    fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).context("no terminal was sent")
}

/// Whether a terminal lives: its line discipline answers what is typed.
fn echoes(master: &mut File) -> Result<()> {
    master.write_all(b"typed")?;
    let mut back = [0; 5];
    master.read_exact(&mut back)?;
    ensure!(&back == b"typed", "the terminal answers {back:?}");
    Ok(())
}

pub fn cases() -> Vec<Case> {
    [order::cases(), siblings::cases(), runtimes::cases(), lxc::cases()].into_iter().flatten().collect()
}
