//! What belongs to the namespaces themselves comes back: content, mounts, network, objects, names; and what was brought
//! from outside, memory in pieces, and memory that comes late.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sched::CloneFlags;
use rcriu_tests::cycle::unchanged;
use rcriu_tests::{Case, Cycle, Engine, Home, Images, Program};

use super::host::Host;
use crate::chain::{Chain, step};
use crate::pages::{Server, free_port};

fn start(home: Home, args: &[&str]) -> Result<Program> {
    Program::start_inside(home, "home", args)
}

fn turns(home: Home, args: &[&str], count: usize, (dumper, restorer): (Engine, Engine)) -> Result<()> {
    let program = start(home, args)?;
    let cycle = Cycle::between(dumper, restorer).at_home(&program);
    for turn in 1..=count {
        cycle.turn(&program).with_context(|| format!("turn {turn}"))?;
    }
    program.verify()
}

/// What CRIU keeps of it: the program tar, which packs and unpacks for it, has no type for sockets.
const IN_BOTH: &[&str] = &["net", "no-socket"];

/// Tasks in several namespaces of a kind, and what messages call it.
const SEVERAL: [(&str, &str); 2] = [("mount-namespaces", "mount"), ("apart", "uts and ipc")];

fn several(program: &str, home: Home, count: usize, (dumper, restorer): (Engine, Engine)) -> Result<()> {
    let program = Program::start_inside(home, program, &[])?;
    let cycle = Cycle::between(dumper, restorer).at_home(&program);
    for turn in 1..=count {
        cycle.turn(&program).with_context(|| format!("turn {turn}"))?;
    }
    program.verify()
}

/// Cases of one program in [`SEVERAL`].
fn of_several(cases: &mut Vec<Case>, program: &'static str, kinds: &str) {
    let ours = || Ok::<_, anyhow::Error>((Engine::rcriu()?, Engine::rcriu()?));
    let what = format!("inside: tasks in several {kinds} namespaces");
    cases.extend([
        Case::new(format!("{what} (without dump)"), move || {
            Program::start_inside(Home::new(), program, &[])?.verify()
        }),
        Case::new(format!("{what} come back"), move || several(program, Home::new(), 1, ours()?)),
        Case::new(
            format!("{what} come back (three turns, with users and control groups of its own)"),
            move || several(program, Home::new().with_users().with_groups(), 3, ours()?),
        ),
        Case::new(format!("{what} come back (left running)"), move || {
            let program = Program::start_inside(Home::new(), program, &[])?;
            let before = Host::now()?;
            Cycle::new()?.at_home(&program).leave_running(&program)?;
            before.unchanged()?;
            program.verify()
        }),
    ]);
}

fn left_running(home: Home) -> Result<()> {
    let program = start(home, &["net"])?;
    let before = Host::now()?;
    Cycle::new()?.at_home(&program).leave_running(&program)?;
    before.unchanged()?;
    program.verify()
}

/// A folder from outside, which is named or found.
fn outside(named: bool) -> Result<()> {
    let program = Program::start_inside(Home::new().with_outside(), "sleeper", &[])?;
    let (images, outside) = (Images::new()?, program.outside());
    fs::write(outside.join("file"), b"outside")?;
    let cycle = Cycle::new()?.at_home(&program);
    let words = ["/outside", "--external mnt[/outside]:NAME"];
    let before = program.state()?;
    cycle.try_dump(program.pid(), &images, &[])?.refused()?.says(&words)?;
    unchanged(&before, || program.state()).context("the refused dump changed the tree")?;
    let path = outside.to_str().context("name")?;
    let (dump, restore) = match named {
        true => ("mnt[/outside]:folder", format!("mnt[folder]:{path}")),
        false => ("mnt[]", "mnt[]".into()),
    };
    let restore = ["--external", restore.as_str()];
    let cycle = cycle.with_dump(&["--external", dump]).with_restore(&restore);
    for turn in 1..=2 {
        cycle.turn(&program).with_context(|| format!("turn {turn}"))?;
        let seen = format!("/proc/{}/root/outside/file", program.pid());
        ensure!(fs::read(seen)? == b"outside", "another folder is mounted");
    }
    program.verify()
}

/// Pre-dumps, then the dump on top of them.
fn chain() -> Result<()> {
    let program = Program::start_inside(Home::new().without_init(), "changing-memory", &[])?;
    let chain = Chain::new()?;
    let options = program.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    for n in 1..=3 {
        chain.pre_dump(&program, n, &options)?;
        step(&program, n)?;
    }
    chain.dump(&program, 4, &[&["--track-mem"], &options[..]].concat())?;
    let pid = chain.dir(4).join("root.pid");
    let pidfile = ["--pidfile", pid.to_str().context("name")?];
    chain.restore(4, &[&pidfile, &options[..]].concat())?;
    program.moved(fs::read_to_string(&pid)?.trim().parse()?);
    step(&program, 4)?;
    program.verify()
}

/// Memory that is served while the tree runs; what is late can be told from outside.
fn lazily(home: Home) -> Result<()> {
    let program = Program::start_inside(home, "late-memory", &["64"])?;
    let (images, before) = (Images::new()?, program.state()?);
    let cycle = Cycle::new()?.at_home(&program);
    cycle.dump(&program, &images)?;
    let serving = Server::start(&Engine::rcriu()?, "lazy-pages", &images, &[])?;
    cycle.bring_back(&program, &images, &["--lazy-pages"])?;
    serving.ended_well()?;
    unchanged(&before, || program.state())?;
    program.verify()
}

/// Memory that goes to a page server, and is in its folder afterwards.
fn served() -> Result<()> {
    let program = Program::start_inside(Home::new(), "random-memory", &["16"])?;
    let (images, port, before) = (Images::new()?, free_port()?, program.state()?);
    let server = Server::start(&Engine::rcriu()?, "page-server", &images, &["--port", &port])?;
    let cycle = Cycle::new()?.at_home(&program);
    let tree = program.tree()?;
    let to = ["--page-server", "--address", "127.0.0.1", "--port", &port];
    cycle.try_dump(program.pid(), &images, &to)?.ok()?;
    rcriu_tests::program::wait_gone(&tree)?;
    server.ended_well()?;
    cycle.bring_back(&program, &images, &[])?;
    unchanged(&before, || program.state())?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let ours = || Ok::<_, anyhow::Error>((Engine::rcriu()?, Engine::rcriu()?));
    let name = |text: &str| format!("inside: {text}");
    let mounts = "tasks in several mount namespaces come back";
    let whole = "files, mounts, network, objects, names of the host come back";
    let mut cases = vec![
        Case::new(name("files, mounts, network, objects, names of the host (without dump)"), || {
            start(Home::new(), &["net"])?.verify()
        }),
        Case::new(name(whole), move || turns(Home::new(), &["net"], 1, ours()?)),
        Case::new(name(&format!("{whole} (three turns)")), move || turns(Home::new(), &["net"], 3, ours()?)),
        Case::new(name(&format!("{whole} (with users and control groups of its own)")), move || {
            turns(Home::new().with_users().with_groups(), &["net"], 2, ours()?)
        }),
        Case::new(name("files, mounts, objects, names come back (beside the host's network)"), move || {
            let kinds = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
            let home = Home::only(kinds | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS);
            turns(home, &[], 2, ours()?)
        }),
        Case::new(name(&format!("{whole} (left running)")), || left_running(Home::new())),
        Case::new(name(&format!("{whole} (left running, with users of its own)")), || {
            left_running(Home::new().with_users())
        }),
        Case::new(format!("interop: inside: {whole}, dumped by rcriu, restored by CRIU"), move || {
            turns(Home::new(), IN_BOTH, 1, (Engine::rcriu()?, Engine::criu()?))
        }),
        Case::new(format!("interop: inside: {whole}, dumped by CRIU, restored by rcriu"), move || {
            turns(Home::new(), IN_BOTH, 1, (Engine::criu()?, Engine::rcriu()?))
        }),
        Case::new(name(&format!("{mounts} (three turns, only mounts of its own)")), move || {
            several(SEVERAL[0].0, Home::only(CloneFlags::CLONE_NEWNS), 3, ours()?)
        }),
        Case::new(format!("interop: inside: {mounts}, dumped by rcriu, restored by CRIU"), move || {
            several(SEVERAL[0].0, Home::new(), 1, (Engine::rcriu()?, Engine::criu()?))
        }),
        Case::new(format!("interop: inside: {mounts}, dumped by CRIU, restored by rcriu"), move || {
            several(SEVERAL[0].0, Home::new(), 1, (Engine::criu()?, Engine::rcriu()?))
        }),
        Case::new(name("a folder from outside that is named comes back"), || outside(true)),
        Case::new(name("a folder from outside is found by itself"), || outside(false)),
        Case::new(name("dumps that change memory step by step are restored as one"), chain),
        Case::new(name("memory comes late"), || lazily(Home::new())),
        Case::new(name("memory comes late (with users of its own)"), || lazily(Home::new().with_users())),
        Case::new(name("memory goes to a page server"), served),
    ];
    SEVERAL.iter().for_each(|(program, kinds)| of_several(&mut cases, program, kinds));
    cases
}
