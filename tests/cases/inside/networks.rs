//! Trees whose tasks are in several network namespaces, with devices and connections between them.

use std::{
    fs::File,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::CloneFlags;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Home, Images, Program};

use super::failures::{failing, refused};
use super::host::Host;

const ESTABLISHED: &[&str] = &["--tcp-established"];

/// Images of the network without which there is no restore, and those whose every byte counts.
const NETWORK: [&str; 3] = ["netdev-", "ifaddr-", "route-"];

fn start(home: Home, args: &[&str]) -> Result<Program> {
    Program::start_inside(home, "network-namespaces", args)
}

/// Without connections, for which a dump would want an option.
fn quiet() -> Result<Program> {
    start(Home::new(), &["quiet"])
}

fn quiet_with_users() -> Result<Program> {
    start(Home::new().with_users(), &["quiet"])
}

fn turns(
    home: Home,
    args: &[&str],
    count: usize,
    (dumper, restorer): (Engine, Engine),
    more: &[&str],
) -> Result<()> {
    let program = start(home, args)?;
    let cycle = Cycle::between(dumper, restorer).with(ESTABLISHED).with_dump(more).at_home(&program);
    for turn in 1..=count {
        cycle.turn(&program).with_context(|| format!("turn {turn}"))?;
    }
    program.verify()
}

fn left_running(home: Home) -> Result<()> {
    let program = start(home, &[])?;
    let before = Host::now()?;
    Cycle::new()?.with(ESTABLISHED).at_home(&program).leave_running(&program)?;
    before.unchanged()?;
    program.verify()
}

/// The network namespace of a process.
fn network(pid: i32) -> Result<OwnedFd> {
    Ok(File::open(format!("/proc/{pid}/ns/net")).context("ns/net")?.into())
}

fn number(file: OwnedFd) -> Result<u64> {
    Ok(File::from(file).metadata().context("fstat")?.ino())
}

/// The namespace of a member, or of the root, stays outside, and is entered again.
fn outer(of_root: bool) -> Result<()> {
    let program = Program::start_inside(Home::new(), "nested", &["network"])?;
    let member = || -> Result<OwnedFd> {
        let root = number(network(program.pid())?)?;
        let others = program.tree()?.into_iter().map(|task| network(task.pid().as_raw()));
        let mut others = others.collect::<Result<Vec<_>>>()?.into_iter();
        let other =
            others.find(|file| file.try_clone().is_ok_and(|file| number(file).is_ok_and(|n| n != root)));
        other.context("nobody is in another network namespace")
    };
    let outer = || if of_root { network(program.pid()) } else { member() };
    let net = outer()?;
    fcntl(&net, FcntlArg::F_SETFD(FdFlag::empty())).context("F_SETFD")?;
    let ino = number(net.try_clone()?)?;
    let (cycle, images, tree) = (Cycle::new()?.at_home(&program), Images::new()?, program.tree()?);
    cycle.try_dump(program.pid(), &images, &["--external", &format!("net[{ino}]:outer")])?.ok()?;
    wait_gone(&tree)?;
    let without = cycle.try_restore(&images, &[])?.refused()?;
    without.says(&["outer must be given from outside", "--inherit-fd fd[N]:outer"])?;
    let inherit = format!("fd[{}]:outer", net.as_raw_fd());
    cycle.bring_back(&program, &images, &["--inherit-fd", &inherit])?;
    ensure!(number(outer()?)? == ino, "it is somewhere else");
    ensure!(number(network(program.pid())?)? != number(member()?)?, "all are in one namespace");
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let ours = || Ok::<_, anyhow::Error>((Engine::rcriu()?, Engine::rcriu()?));
    let name = |text: &str| format!("inside: tasks in several network namespaces {text}");
    let mut cases = vec![
        Case::new(name("(without dump)"), || start(Home::new(), &[])?.verify()),
        Case::new(name("come back"), move || turns(Home::new(), &[], 1, ours()?, &[])),
        Case::new(name("come back (three turns, with users and control groups of its own)"), move || {
            turns(Home::new().with_users().with_groups(), &[], 3, ours()?, &[])
        }),
        Case::new(name("come back (three turns, only networks of its own)"), move || {
            turns(Home::only(CloneFlags::CLONE_NEWNET), &[], 3, ours()?, &[])
        }),
        Case::new(name("come back (left running)"), || left_running(Home::new())),
        Case::new(name("come back (left running, with users of its own)"), || {
            left_running(Home::new().with_users())
        }),
        Case::new(name("come back, of which one stays outside"), || outer(false)),
        Case::new(name("come back, of which that of the root stays outside"), || outer(true)),
        Case::new(
            "interop: inside: several network namespaces, dumped by rcriu, restored by CRIU",
            move || turns(Home::new(), &["plain"], 1, (Engine::rcriu()?, Engine::criu()?), &[]),
        ),
        Case::new(
            "interop: inside: several network namespaces, dumped by CRIU, restored by rcriu",
            move || turns(Home::new(), &["plain"], 1, (Engine::criu()?, Engine::rcriu()?), &[]),
        ),
    ];
    for method in ["nftables", "iptables", "skip"] {
        cases.push(Case::new(name(&format!("come back (--network-lock {method})")), move || {
            turns(Home::new(), &[], 1, ours()?, &["--network-lock", method])
        }));
    }
    for (what, words) in [("socket", "another network namespace"), ("file", "that its task is not in")] {
        cases.push(Case::new(
            format!("inside: a {what} of a network namespace that nobody is in is refused by name"),
            move || {
                let program = Program::start_inside(Home::new(), "network-elsewhere", &[what])?;
                refused(&program, program.pid(), &[words, "close it"])
            },
        ));
    }
    let several = " (several network namespaces)";
    failing(&mut cases, several, quiet_with_users, quiet, &NETWORK[..2], &NETWORK);
    cases
}
