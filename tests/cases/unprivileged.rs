//! Programs of a user who is not root, dumped and restored by that user with CAP_CHECKPOINT_RESTORE alone.

use anyhow::Result;
use rcriu_tests::{Case, Cycle, Images, User};

use crate::kinds::Kind;
use crate::{files, memory, sockets, special_memory, tasks};

/// Programs that are refused, and words that say why.
const REFUSED: [(&str, &[&str]); 8] = [
    ("seccomp-filters", &["PTRACE_SEIZE", "CAP_SYS_ADMIN"]),
    ("seccomp-strict", &["PTRACE_SEIZE", "CAP_SYS_ADMIN"]),
    ("blocked-filtered", &["PTRACE_SEIZE", "CAP_SYS_ADMIN"]),
    ("blocked-files", &["watch", "handle"]),
    ("inotify", &["watch", "handle"]),
    ("blocked-connecting", &["CAP_NET_ADMIN", "full path"]),
    ("blocked-sockets", &["CAP_NET_ADMIN", "full path"]),
    ("tcp", &["CAP_NET_ADMIN", "--network-lock skip"]),
];

/// Programs that set up what only root may, with their arguments.
const OF_ROOT: [(&str, &[&str]); 3] =
    [("identity", &["chroot"]), ("shared-memory-as-file", &[]), ("unlinked", &[])];

fn all() -> impl Iterator<Item = Kind> {
    let all = [tasks::KINDS, memory::KINDS, special_memory::KINDS, files::KINDS, sockets::KINDS];
    all.concat().into_iter().filter(|kind| !OF_ROOT.contains(&(kind.program, kind.args)))
}

fn turn(kind: &Kind) -> Result<()> {
    let user = User::new()?;
    let program = user.start(kind.program, kind.args)?;
    let cycle = Cycle::between(user.engine()?, user.engine()?).with(kind.options).with(&["--unprivileged"]);
    if let Some((_, words)) = REFUSED.iter().find(|(refused, _)| *refused == kind.program) {
        let images = Images::new()?;
        cycle.try_dump(program.pid(), &images, &[])?.refused()?.says(words)?;
        return program.verify();
    }
    cycle.turn(&program)?;
    program.verify()
}

/// Without the option nothing is begun.
fn unaccepted() -> Result<()> {
    let user = User::new()?;
    let program = user.start("sleeper", &[])?;
    let (images, cycle) = (Images::new()?, Cycle::between(user.engine()?, user.engine()?));
    let refused = cycle.try_dump(program.pid(), &images, &[])?.refused()?;
    refused.says(&["not running as root", "--unprivileged"])?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let turns = all().map(|kind| Case::new(format!("unprivileged: {}", kind.sentence), move || turn(&kind)));
    let mut cases: Vec<Case> = turns.collect();
    cases.push(Case::new("unprivileged: limits have to be accepted", unaccepted));
    cases
}
