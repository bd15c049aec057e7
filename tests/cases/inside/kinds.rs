//! What is asked of every program, asked of it in namespaces of its own.

use anyhow::{Context, Result};
use nix::sched::CloneFlags;
use rcriu_tests::{Case, Cycle, Engine, Home, Program};

use crate::kinds::Kind;
use crate::{files, memory, silent, sockets, special_memory, tasks};

/// Of pids, mounts, network, ipc and UTS, under an init.
const HOME: Home = Home::new();

/// Kinds of namespaces, with a name for cases.
pub const EACH: [(&str, CloneFlags); 7] = [
    ("pid", CloneFlags::CLONE_NEWPID),
    ("network", CloneFlags::CLONE_NEWNET),
    ("mount", CloneFlags::CLONE_NEWNS),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("user", CloneFlags::CLONE_NEWUSER),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
];

/// Programs that are also left running, taken through three turns, and be the first process of their namespace.
const OFTEN: [&str; 9] =
    ["sleeper", "sessions", "zombies", "threads", "shared-memory", "unlinked", "fifos", "tcp", "sysv"];

/// Programs that also run with users of their own, whose capabilities end there.
const WITH_USERS: [&str; 29] = [
    "sleeper",
    "kept-session",
    "tree",
    "sessions",
    "zombies",
    "threads",
    "registers",
    "pending-signals",
    "timers",
    "robust-futex",
    "identity",
    "private-memory",
    "file-memory",
    "cow",
    "shared-memory",
    "regular-files",
    "unlinked",
    "directories",
    "pipes",
    "fifos",
    "sharing",
    "epoll",
    "inotify",
    "socketpair",
    "message-senders",
    "socket-owners",
    "sockets",
    "tcp",
    "sysv",
];

fn all() -> Vec<Kind> {
    let all = [tasks::KINDS, memory::KINDS, special_memory::KINDS, files::KINDS, sockets::KINDS];
    let sessions = silent::KINDS.iter().filter(|kind| kind.program == "kept-session");
    // Nobody can enter a mount namespace whose folders are shared: a case of failures.
    let all = all.concat().into_iter().filter(|kind| kind.program != "shared-folders");
    all.chain(sessions.copied()).collect()
}

/// One turn in namespaces of its own.
pub fn turn(home: Home, kind: &Kind, between: (Engine, Engine)) -> Result<()> {
    let program = Program::start_inside(home, kind.program, kind.args)?;
    Cycle::between(between.0, between.1).with(kind.options).at_home(&program).turn(&program)?;
    program.verify()
}

fn ours() -> Result<(Engine, Engine)> {
    Ok((Engine::rcriu()?, Engine::rcriu()?))
}

fn of(kind: Kind) -> Vec<Case> {
    let name = |how: &str| format!("inside: {}{how}", kind.sentence);
    let start = move || Program::start_inside(HOME, kind.program, kind.args);
    let cycle =
        move |program: &Program| Ok::<_, anyhow::Error>(Cycle::new()?.with(kind.options).at_home(program));
    let mut cases = vec![
        Case::new(name(" (without dump)"), move || start()?.verify()),
        Case::new(name(""), move || turn(HOME, &kind, ours()?)),
    ];
    if OFTEN.contains(&kind.program) {
        cases.extend([
            Case::new(name(" (left running)"), move || {
                let program = start()?;
                cycle(&program)?.leave_running(&program)?;
                program.verify()
            }),
            Case::new(name(" (three turns)"), move || {
                let program = start()?;
                for turn in 1..=3 {
                    cycle(&program)?.turn(&program).with_context(|| format!("turn {turn}"))?;
                }
                program.verify()
            }),
            Case::new(name(" (as the first process)"), move || turn(HOME.without_init(), &kind, ours()?)),
        ]);
    }
    if WITH_USERS.contains(&kind.program) {
        let home = HOME.with_users();
        cases.push(Case::new(name(" (with users of its own, without dump)"), move || {
            Program::start_inside(home, kind.program, kind.args)?.verify()
        }));
        cases.push(Case::new(name(" (with users of its own)"), move || turn(home, &kind, ours()?)));
    }
    cases
}

/// Programs with only one kind of namespace of its own each.
fn alone() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, flag) in EACH {
        for kind in
            // Numbers cannot be chosen by the root of a user namespace in a pid namespace that it does not own; and
            // programs that look at their threads need a /proc of their pid namespace.
            all().into_iter().filter(|k| match name {
                "user" => ["sleeper", "sockets"].contains(&k.program),
                "pid" => ["sleeper", "pipes", "sockets"].contains(&k.program),
                _ => ["sleeper", "threads", "pipes", "sockets"].contains(&k.program),
            })
        {
            let name = format!("inside: {} (only a {name} namespace)", kind.sentence);
            cases.push(Case::new(name, move || turn(Home::only(flag), &kind, ours()?)));
        }
    }
    cases
}

/// Dumped by one binary, restored by the other.
fn interchange(kind: Kind) -> Vec<Case> {
    let name = |how: &str| format!("interop: inside: {}, {how}", kind.sentence);
    vec![
        Case::new(name("dumped by rcriu, restored by CRIU"), move || {
            turn(HOME, &kind, (Engine::rcriu()?, Engine::criu()?))
        }),
        Case::new(name("dumped by CRIU, restored by rcriu"), move || {
            turn(HOME, &kind, (Engine::criu()?, Engine::rcriu()?))
        }),
    ]
}

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = all().into_iter().flat_map(of).collect();
    cases.extend(alone());
    let exchanged = all().into_iter().filter(|k| k.in_criu && OFTEN.contains(&k.program));
    cases.extend(exchanged.flat_map(interchange));
    // CRIU restores neither segments that are to go with their last user nor attachments that are only to be read.
    let segments = all().into_iter().filter(|k| k.program == "sysv");
    cases.extend(segments.filter_map(|kind| interchange(kind).pop()));
    cases
}
