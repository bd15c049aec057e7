//! Logs, closing lines, exit codes and messages in the form that tools parse.

use anyhow::{Context, Result, bail, ensure};
use rcriu_tests::{Case, Cycle, Engine, Images, Program};

/// Whether a line starts with `(SS.UUUUUU) ` as CRIU's do: seconds padded to two digits.
fn stamped(line: &str) -> bool {
    let Some((time, _)) = line.strip_prefix('(').and_then(|l| l.split_once(") ")) else { return false };
    let Some((seconds, micros)) = time.split_once('.') else { return false };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    seconds.len() >= 2 && micros.len() == 6 && digits(seconds) && digits(micros)
}

/// Lines that the restorer and the parasite write carry no time of their own.
fn from_blob(line: &str) -> bool {
    line.starts_with("pie: ")
}

fn well_formed(log: &str) -> Result<()> {
    ensure!(!log.is_empty(), "the log is empty");
    match log.lines().find(|l| !stamped(l) && !from_blob(l) && !l.is_empty()) {
        None => Ok(()),
        Some(line) => bail!("a line without time: {line:?}"),
    }
}

fn closing_lines() -> Result<()> {
    let program = Program::start("tree", &["2", "2"])?;
    let (images, cycle) = (Images::new()?, Cycle::new()?);
    let tree = program.tree()?;
    let dump = cycle.try_dump(program.pid(), &images, &[])?.ok()?;
    well_formed(&dump.log)?;
    ensure!(dump.log.contains("Dumping finished successfully"), "dump.log does not say that it finished");
    ensure!(dump.stderr.is_empty() && dump.stdout.is_empty(), "a dump that succeeds talks: {}", dump.stderr);
    rcriu_tests::program::wait_gone(&tree)?;
    let restore = cycle.try_restore(&images, &[])?.ok()?;
    well_formed(&restore.log)?;
    let done = "Restore finished successfully. Tasks resumed.";
    ensure!(restore.log.contains(done), "restore.log does not say that it finished");
    // What a restored task writes carries its pid: `%6d: ` after the time.
    let by_task = |l: &str| l.split_once(") ").is_some_and(|(_, rest)| rest.get(6..8) == Some(": "));
    ensure!(restore.log.lines().any(by_task), "no line of restore.log tells which task wrote it");
    ensure!(images.file("stats-dump").exists() && images.file("stats-restore").exists(), "no statistics");
    program.verify()
}

fn failing_lines() -> Result<()> {
    let program = Program::start("unsupported", &["landlock"])?;
    let images = Images::new()?;
    let dump = Cycle::new()?.try_dump(program.pid(), &images, &[])?.refused()?;
    well_formed(&dump.log)?;
    ensure!(dump.code == Some(1), "exit code of a failed dump: {:?}", dump.code);
    let error = dump.log.lines().find(|l| l.contains("Error (")).context("no Error in the log")?;
    let text = error
        .split_once("Error (")
        .and_then(|(_, r)| r.split_once("): "))
        .context("form of the Error line")?;
    let (file, line) = text.0.rsplit_once(':').context("no line number")?;
    ensure!(
        file.ends_with(".rs") && line.parse::<u32>().is_ok(),
        "an Error that does not name its place: {error}"
    );
    ensure!(
        dump.stderr.trim().contains(text.1.trim()),
        "stderr {:?} is not the first Error {:?}",
        dump.stderr,
        text.1
    );
    ensure!(dump.log.contains("Dumping FAILED."), "dump.log does not say that it failed");
    program.verify()?;
    let empty = Images::new()?;
    let restore = Cycle::new()?.try_restore(&empty, &[])?.refused()?;
    ensure!(restore.code == Some(1), "exit code of a failed restore: {:?}", restore.code);
    ensure!(restore.log.contains("Restoring FAILED."), "restore.log does not say that it failed");
    Ok(())
}

fn levels() -> Result<()> {
    let program = Program::start("sleeper", &[])?;
    let pid = program.pid().to_string();
    let engine = Engine::rcriu()?;
    let mut sizes = Vec::new();
    for level in ["-v0", "-v1", "-v2", "-v3", "-v4"] {
        let images = Images::new()?;
        let args = ["dump", "-t", &pid, "-D", images.as_str()?, "-R", level, "-o", "dump.log"];
        sizes.push(engine.run(&args)?.ok()?.log.len());
    }
    ensure!(sizes[..2] == [0, 0], "-v0 and -v1 log a dump without errors: {sizes:?}");
    ensure!(sizes[3] > sizes[2] && sizes[4] >= sizes[3], "higher levels do not log more: {sizes:?}");
    let (one, four) = (Images::new()?, Images::new()?);
    let args = |dir| ["dump", "-t", &pid, "-D", dir, "-R", "-vvvv", "-o", "dump.log"];
    let again = engine.run(&args(four.as_str()?))?.ok()?.log;
    ensure!(again.contains("Dumping finished"), "-vvvv is not -v4");
    // Without -o everything goes to stderr.
    let bare = engine.run(&["dump", "-t", &pid, "-D", one.as_str()?, "-R", "-v4"])?.ok()?;
    ensure!(bare.stderr.contains("Dumping finished successfully"), "without -o the log is not on stderr");
    program.verify()
}

fn version() -> Result<()> {
    let finished = Engine::rcriu()?.run(&["--version"])?.ok()?;
    let first = finished.stdout.lines().next().unwrap_or("");
    let number = first.strip_prefix("Version: ").with_context(|| format!("first line is {first:?}"))?;
    let numeric = number.split('.').all(|part| part.parse::<u32>().is_ok());
    ensure!(numeric && number.contains('.') && number >= "2.0", "tools cannot parse the version {number:?}");
    Ok(())
}

fn help_fits() -> Result<()> {
    let finished = Engine::rcriu()?.run(&["--help"])?.ok()?;
    let wide: Vec<&str> = finished.stdout.lines().filter(|l| l.chars().count() > 80).collect();
    ensure!(
        wide.is_empty() && finished.stdout.lines().count() > 40,
        "--help: lines over 80 columns: {wide:#?}"
    );
    Ok(())
}

fn check() -> Result<()> {
    let finished = Engine::rcriu()?.run(&["check"])?;
    ensure!(finished.code == Some(0), "check fails here: {}{}", finished.stdout, finished.stderr);
    ensure!(finished.stdout.contains("Looks good"), "check says {:?}", finished.stdout);
    Ok(())
}

fn unserved_options() -> Result<()> {
    let engine = Engine::rcriu()?;
    engine.run(&["dump", "--no-such-option"])?.refused()?.says(&["no-such-option"])?;
    engine.run(&["no-such-command"])?.refused()?.says(&["no-such-command"])?;
    engine.run(&["dump"])?.refused()?.says(&["-t"])
}

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("log: lines carry the time, closing lines are CRIU's", closing_lines),
        Case::new("log: an error names its place and is the line on stderr", failing_lines),
        Case::new("log: the levels 0 to 4 log more and more", levels),
        Case::new("command line: --version is what tools parse", version).for_anyone(),
        Case::new("command line: --help fits 80 columns", help_fits).for_anyone(),
        Case::new("command line: check looks good", check),
        Case::new("command line: what is unknown or missing is named", unserved_options).for_anyone(),
    ]
}
