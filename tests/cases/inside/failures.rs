//! Dumps and restores of trees in namespaces of their own that fail, are interrupted or killed: the tree with its mounts
//! and network is as it was, and outside of it nothing is left.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use rcriu_engine::faults::{FAULT, POINTS};
use rcriu_tests::cycle::{compare, unchanged};
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Case, Cycle, Engine, Finished, Home, Images, Program};

use super::host::Host;
use super::kinds::EACH;
use crate::failures::{Running, nothing_left, settled};

/// Starts the tree that a case is about.
type Start = fn() -> Result<Program>;

fn home() -> Result<Program> {
    Program::start_inside(Home::new(), "home", &["net"])
}

fn with_users() -> Result<Program> {
    Program::start_inside(Home::new().with_users(), "home", &["net"])
}

fn several_mounts() -> Result<Program> {
    Program::start_inside(Home::new(), "mount-namespaces", &[])
}

fn several_with_users() -> Result<Program> {
    Program::start_inside(Home::new().with_users(), "mount-namespaces", &[])
}

fn with_fault(verb: &[&str], program: &Program, images: &Images, fault: &str) -> Result<Finished> {
    let mut args = verb.to_vec();
    args.extend(["-D", images.as_str()?, "-v4"]);
    let options = program.options();
    args.extend(options.iter().map(String::as_str));
    let mut command = Engine::rcriu()?.command(&args);
    command.env(FAULT, fault);
    Engine::rcriu()?.finish(command)
}

/// Whether the command ended as a fault must end it.
fn ended(finished: &Finished, point: &str, fault: &str) -> Result<()> {
    match finished.code {
        None if fault.ends_with(":kill") => Ok(()),
        Some(code) if code != 0 && fault.ends_with(":kill") => Ok(()),
        Some(code) if code != 0 => finished.says(&[point]),
        other => bail!("with {FAULT}={fault} the command ended with {other:?}: {}", finished.stderr),
    }
}

fn fault_in_dump(start: Start, point: &str, fault: &str) -> Result<()> {
    let program = start()?;
    let (images, before, host) = (Images::new()?, program.state()?, Host::now()?);
    let pid = program.pid().to_string();
    ended(&with_fault(&["dump", "-t", &pid, "-o", "dump.log"], &program, &images, fault)?, point, fault)?;
    compare(&before, &settled(&program, &before)?).context("the failed dump changed the tree")?;
    host.settles()?;
    Cycle::new()?.at_home(&program).turn(&program)?;
    program.verify()
}

/// A program that was dumped and is gone; the host without it.
fn dumped(start: Start) -> Result<(Program, Images, Host)> {
    let program = start()?;
    let images = Images::new()?;
    Cycle::new()?.at_home(&program).dump(&program, &images)?;
    Ok((program, images, Host::now()?))
}

fn fault_in_restore(start: Start, point: &str, fault: &str) -> Result<()> {
    let (program, images, host) = dumped(start)?;
    ended(&with_fault(&["restore", "-d", "-o", "restore.log"], &program, &images, fault)?, point, fault)?;
    nothing_left("the failed restore")?;
    host.unchanged()?;
    Cycle::new()?.at_home(&program).bring_back(&program, &images, &[])?;
    program.verify()
}

/// Dumps that a signal ends at moments spread over their duration.
fn interrupted_dumps(start: Start, signal: Signal) -> Result<()> {
    let program = start()?;
    let (before, host, mut whole) = (program.state()?, Host::now()?, None);
    let options = program.options();
    let options: Vec<&str> =
        ["--leave-running"].into_iter().chain(options.iter().map(String::as_str)).collect();
    for turn in 0..=12 {
        let (images, begun) = (Images::new()?, Instant::now());
        let dump = Running::dump(&program, &images, &options)?;
        match whole {
            None => {
                ensure!(dump.end()? == Some(0), "a dump that nobody disturbs fails");
                whole = Some(begun.elapsed().as_micros() as u64);
            }
            Some(whole) => {
                dump.for_a_while(whole * turn / 12)?;
                dump.kill(signal);
                dump.end()?;
            }
        }
        compare(&before, &settled(&program, &before)?).with_context(|| format!("after dump {turn}"))?;
        host.settles().with_context(|| format!("after dump {turn}"))?;
    }
    program.verify()
}

/// Restores that a signal ends at moments spread over their duration.
fn interrupted_restores(start: Start, signal: Signal) -> Result<()> {
    let (program, images, host) = dumped(start)?;
    let options = program.options();
    let pidfile = images.file("root.pid");
    let name = pidfile.to_str().context("name")?;
    let mut args = vec!["--pidfile", name];
    args.extend(options.iter().map(String::as_str));
    let mut whole = 0;
    for turn in 0..=15 {
        let _ = fs::remove_file(&pidfile);
        let begun = Instant::now();
        let restore = Running::restore_with(&images, &args)?;
        if turn > 0 {
            restore.for_a_while(whole * turn / 15)?;
            restore.kill(signal);
        }
        let code = restore.end()?;
        ensure!(turn > 0 || code == Some(0), "a restore that nobody disturbs fails");
        whole = if turn == 0 { begun.elapsed().as_micros() as u64 } else { whole };
        // One that was killed may have had done its work.
        let pid = fs::read_to_string(&pidfile).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.filter(|_| code.is_none_or(|code| code == 0)) {
            program.moved(pid);
            let tree = program.tree()?;
            tree.iter().for_each(|task| task.kill(Signal::SIGKILL));
            wait_gone(&tree)?;
        }
        nothing_left(&format!("restore {turn}"))?;
        host.unchanged().with_context(|| format!("after restore {turn}"))?;
    }
    Cycle::new()?.at_home(&program).bring_back(&program, &images, &[])?;
    program.verify()
}

/// Images of namespaces that a restore cannot do without.
const NEEDED: [&str; 6] = ["utsns-", "ipcns-var-", "netdev-", "ifaddr-", "mountpoints-", "userns-"];
/// Those and others, whose every byte counts.
const WHOLE: [&str; 11] = [
    "utsns-",
    "ipcns-var-",
    "ipcns-msg-",
    "ipcns-sem-",
    "ipcns-shm-",
    "netdev-",
    "ifaddr-",
    "route-",
    "mountpoints-",
    "tmpfs-dev-",
    "userns-",
];

/// Those of mounts.
const MOUNTS: [&str; 2] = ["mountpoints-", "tmpfs-dev-"];

/// A restore with one image spoilt names it, and leaves nothing.
fn spoilt(start: Start, prefix: &str, spoil: fn(&Images, &str) -> Result<()>) -> Result<()> {
    let (program, images, host) = dumped(start)?;
    let names = fs::read_dir(images.path())?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    ensure!(!names.is_empty(), "there is no {prefix}*");
    for name in names {
        let whole = fs::read(images.file(&name))?;
        spoil(&images, &name)?;
        let finished =
            Cycle::new()?.at_home(&program).try_restore(&images, &[])?.refused().context(name.clone())?;
        finished.says(&[prefix])?;
        nothing_left("the failed restore")?;
        host.unchanged()?;
        fs::write(images.file(&name), whole)?;
    }
    Cycle::new()?.at_home(&program).bring_back(&program, &images, &[])?;
    program.verify()
}

fn remove(images: &Images, name: &str) -> Result<()> {
    fs::remove_file(images.file(name)).context("removing an image")
}

fn truncate(images: &Images, name: &str) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(images.file(name))?;
    file.set_len(file.metadata()?.len() - 3).context("truncating an image")
}

/// A dump that must be refused in one line, and changes nothing.
pub(super) fn refused(program: &Program, pid: i32, words: &[&str]) -> Result<()> {
    let (images, before, host) = (Images::new()?, program.state()?, Host::now()?);
    let finished = Cycle::new()?.at_home(program).try_dump(pid, &images, &[])?.refused()?;
    finished.says(words)?;
    let lines = finished.stderr.lines().filter(|line| !line.trim().is_empty()).count();
    ensure!(lines == 1, "a refusal is one line on stderr, not {lines}: {}", finished.stderr);
    unchanged(&before, || program.state()).context("the refused dump changed the tree")?;
    host.unchanged()?;
    program.verify()
}

/// Files that the root lacks at restore.
fn without_root() -> Result<()> {
    let (program, images, host) = dumped(home)?;
    let cycle = Cycle::new()?;
    let nowhere = images.file("nowhere");
    let nowhere = nowhere.to_str().context("name")?;
    cycle.try_restore(&images, &["--root", nowhere])?.refused()?.says(&[nowhere])?;
    nothing_left("the failed restore")?;
    host.unchanged()?;
    cycle.at_home(&program).bring_back(&program, &images, &[])?;
    program.verify()
}

/// Failures at named points, signals, and images that are spoilt: those without which there is no restore, and those
/// whose every byte counts.
pub(super) fn failing(
    cases: &mut Vec<Case>,
    which: &str,
    with_users: Start,
    home: Start,
    needed: &'static [&str],
    whole: &'static [&str],
) {
    for point in POINTS {
        for (how, words) in [("", "an error"), (":kill", "a kill")] {
            let fault = format!("{point}{how}");
            let name = format!("inside: {words} at {point} does no harm{which}");
            cases.push(Case::new(name, move || match point.starts_with("restore") {
                true => fault_in_restore(with_users, point, &fault),
                false => fault_in_dump(with_users, point, &fault),
            }));
        }
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let name = format!("inside: {signal} during a dump changes nothing{which}");
        cases.push(Case::new(name, move || interrupted_dumps(home, signal)));
        let name = format!("inside: {signal} during a restore leaves nothing{which}");
        cases.push(Case::new(name, move || interrupted_restores(home, signal)));
    }
    for prefix in needed {
        let name = format!("inside: a restore without its image {prefix} fails by name{which}");
        cases.push(Case::new(name, move || spoilt(with_users, prefix, remove)));
    }
    for prefix in whole {
        let name = format!("inside: a truncated image {prefix} fails the restore by name{which}");
        cases.push(Case::new(name, move || spoilt(with_users, prefix, truncate)));
    }
}

/// Kinds of which a tree may have several.
const SEVERAL: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    failing(&mut cases, "", with_users, home, &NEEDED, &WHOLE);
    let several = " (several mount namespaces)";
    failing(&mut cases, several, several_with_users, several_mounts, &MOUNTS[..1], &MOUNTS);
    for (kind, flag) in EACH {
        let several = SEVERAL.contains(flag);
        let nested = move |home: Home| -> Result<()> {
            let program = Program::start_inside(home, "nested", &[kind])?;
            let why = if several { "the root task is in that of this process" } else { "another than" };
            refused(&program, program.pid(), &[kind, "namespace", why])
        };
        if !several {
            let name = format!("inside: a member in another {kind} namespace is refused by name");
            cases.push(Case::new(name, move || nested(Home::new())));
        }
        let name = format!("inside: a member in a {kind} namespace of its own is refused by name");
        cases.push(Case::new(name, move || nested(Home::only(CloneFlags::empty()))));
    }
    for (kind, flag) in EACH.into_iter().filter(|(_, flag)| *flag != CloneFlags::CLONE_NEWUSER) {
        for (home, whose) in [(Home::new(), ""), (Home::only(CloneFlags::empty()), " of a tree without")] {
            let name = format!("inside: a thread in a {kind} namespace of its own is refused by name{whose}");
            cases.push(Case::new(name, move || {
                let program = Program::start_inside(home, "nested", &[kind, "thread"])?;
                let why = match flag {
                    // The first of that namespace would be a child.
                    CloneFlags::CLONE_NEWPID => "(of its children) namespace than",
                    _ => "namespace than thread",
                };
                refused(&program, program.pid(), &["thread", kind, why])
            }));
        }
    }
    cases.push(Case::new("inside: a root that is not the first of its pid namespace is refused", || {
        let program = Program::start_inside(Home::new(), "sleeper", &[])?;
        let child = program.tree()?.get(1).context("no child")?.pid().as_raw();
        refused(&program, child, &["pid namespace", "not its first process"])
    }));
    cases.push(Case::new(
        "inside: shared memory of an ipc namespace that its user left is refused by name",
        || {
            let program = Program::start_inside(Home::new(), "apart", &["keeps"])?;
            refused(&program, program.pid(), &["System V shared memory 0", "in its ipc namespace"])
        },
    ));
    cases.push(Case::new("inside: folders shared by CLONE_FS are refused by name", || {
        let program = Program::start_inside(Home::new(), "shared-folders", &[])?;
        refused(&program, program.pid(), &["CLONE_FS", "unshare(CLONE_FS)"])
    }));
    for (home, whose) in [(Home::new(), ""), (Home::new().with_users(), " (with users of its own)")] {
        cases.push(Case::new(format!("inside: Landlock is refused by name{whose}"), move || {
            let program = Program::start_inside(home, "kept-refused", &["landlock-root"])?;
            refused(&program, program.pid(), &["Landlock"])
        }));
    }
    cases.push(Case::new("inside: a restore below a root that is not there leaves nothing", without_root));
    cases
}
