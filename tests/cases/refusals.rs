//! What cannot be dumped is refused by name, and the program goes on as if nothing had been asked.

use anyhow::{Context, Result};
use rcriu_tests::cycle::unchanged;
use rcriu_tests::state::{descendants, processes};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

/// What the program holds, and a word the message must say besides the task and the descriptor.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("perf_event", "perf"),
    ("userfaultfd", "userfaultfd"),
    ("landlock", "landlock"),
    ("alg", "AF_ALG"),
    ("vsock", "AF_VSOCK"),
];

/// What is registered with an io_uring or on its way, and a word the message must say.
const HELD: &[(&str, &str)] = &[
    ("polling", "SQPOLL"),
    ("files", "files"),
    ("buffers", "buffers"),
    ("eventfd", "eventfd"),
    ("personality", "personalities"),
    ("provided", "group 7"),
    ("provided-before", "group 9"),
    ("poll", "POLL_ADD"),
    ("timeout", "on their way"),
    ("silent", "on their way"),
    ("overflow", "room"),
    ("single", "SINGLE_ISSUER"),
    ("disabled", "R_DISABLED"),
    ("restricted", "restrictions"),
    ("iopoll", "IOPOLL"),
    ("own-memory", "NO_MMAP"),
    ("unopened", "descriptor"),
    ("number", "registered with it"),
    ("part", "part"),
];

/// A dump that must be refused: the message says `words`, no snapshot is there, the tree is unharmed.
pub fn refused(program: &Program, options: &[&str], words: &[&str]) -> Result<()> {
    let images = Images::new()?;
    let before = program.state()?;
    let finished = Cycle::new()?.try_dump(program.pid(), &images, options)?.refused()?;
    finished.says(words)?;
    let lines = finished.stderr.lines().filter(|l| !l.trim().is_empty()).count();
    anyhow::ensure!(lines == 1, "a refusal is one line on stderr, not {lines}: {}", finished.stderr);
    anyhow::ensure!(!images.file("inventory.img").exists(), "a refused dump left an inventory.img");
    unchanged(&before, || program.state()).context("the refused dump changed the tree")?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let kinds = UNSUPPORTED.iter().map(|(what, word)| {
        Case::new(format!("refusals: {what} is refused by name and left alone"), move || {
            let program = Program::start("unsupported", &[what])?;
            refused(&program, &[], &[word, &format!("{}", program.pid())])
        })
    });
    let mut cases: Vec<Case> = kinds.collect();
    cases.extend(HELD.iter().map(|(what, word)| {
        Case::new(format!("refusals: an io_uring with {what} is refused by name and left alone"), move || {
            let program = Program::start("io-uring-held", &[what])?;
            refused(&program, &[], &["io_uring", word, &format!("{}", program.pid())])
        })
    }));
    cases.push(Case::new("refusals: CRIU refuses images with an io_uring", not_for_criu));
    cases.push(Case::new("refusals: a task in a session from outside of the tree", led_outside));
    cases.push(Case::new("refusals: a table of descriptors that nobody can pass on again", || {
        let program = Program::start("shared-with-grandchild", &[])?;
        refused(&program, &[], &["CLONE_FILES", &format!("{}", program.pid())])
    }));
    cases
}

/// Its leader lives, so no restore could have the number. With `--shell-job` the dump is made all the same.
fn led_outside() -> Result<()> {
    let program = Program::start("history", &["above"])?;
    let below = descendants(&processes()?, program.pid());
    let (root, member) = (below[0], below[1]);
    let before = program.state()?;
    let images = Images::new()?;
    let words = ["session", &program.pid().to_string(), &member.to_string(), "--shell-job"];
    Cycle::new()?.try_dump(root, &images, &[])?.refused()?.says(&words)?;
    unchanged(&before, || program.state()).context("the refused dump changed the tree")?;
    let images = Images::new()?;
    Cycle::new()?.try_dump(root, &images, &["--shell-job", "--leave-running"])?.ok()?;
    program.verify()
}

/// An older reader must not make another file of what it does not know.
fn not_for_criu() -> Result<()> {
    let (ours, criu) = (Engine::rcriu()?, Engine::criu()?);
    let (program, images) = (Program::start("io-uring", &[])?, Images::new()?);
    Cycle::new()?.dump(&program, &images)?;
    Cycle::between(ours, criu).try_restore(&images, &[])?.refused()?;
    Cycle::new()?.restore(&images)?;
    program.verify()
}
