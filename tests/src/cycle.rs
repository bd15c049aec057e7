//! Dump, reap, restore: with the tree compared from outside, before and after.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::engine::{Engine, Finished};
use crate::program::{Program, Scratch, wait_gone};
use crate::state::State;

/// How long a tree that CRIU restored may take to come to rest.
const SETTLING: Duration = Duration::from_secs(5);

/// A folder of images, removed with the case.
pub struct Images {
    scratch: Scratch,
}

impl Images {
    pub fn new() -> Result<Images> {
        Ok(Images { scratch: Scratch::new()? })
    }

    /// The same in memory, where there is such a place: what a file system on a disk does with thousands of new files
    /// depends on how many others were removed before (ext4 looks at every inode that was freed in the last minutes).
    pub fn in_memory() -> Result<Images> {
        Ok(Images { scratch: Scratch::in_memory()? })
    }

    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    pub fn as_str(&self) -> Result<&str> {
        self.path().to_str().context("the scratch folder's name is not text")
    }

    /// Names of the images, sorted.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = std::fs::read_dir(self.path())?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.ends_with(".img"))
            .collect();
        names.sort();
        Ok(names)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// Who dumps, who restores, with which further arguments.
pub struct Cycle {
    pub dumper: Engine,
    pub restorer: Engine,
    pub dump_args: Vec<String>,
    pub restore_args: Vec<String>,
    /// Looks at the images of each dump.
    pub check: Option<fn(&Images) -> Result<()>>,
}

impl Cycle {
    /// The binary under test in both places.
    pub fn new() -> Result<Cycle> {
        let engine = Engine::rcriu()?;
        Ok(Cycle::between(engine.clone(), engine))
    }

    /// One binary dumps, another restores.
    pub fn between(dumper: Engine, restorer: Engine) -> Cycle {
        Cycle { dumper, restorer, dump_args: vec![], restore_args: vec![], check: None }
    }

    /// Arguments for both commands.
    pub fn with(mut self, args: &[&str]) -> Cycle {
        self.dump_args.extend(args.iter().map(|a| a.to_string()));
        self.restore_args.extend(args.iter().map(|a| a.to_string()));
        self
    }

    /// Arguments for the dump alone.
    pub fn with_dump(mut self, args: &[&str]) -> Cycle {
        self.dump_args.extend(args.iter().map(|a| a.to_string()));
        self
    }

    /// Arguments for the restore alone.
    pub fn with_restore(mut self, args: &[&str]) -> Cycle {
        self.restore_args.extend(args.iter().map(|a| a.to_string()));
        self
    }

    /// Has `check` look at the images of each dump.
    pub fn checking(mut self, check: fn(&Images) -> Result<()>) -> Cycle {
        self.check = Some(check);
        self
    }

    /// Dumps the tree; how it ended is the caller's to judge.
    pub fn try_dump(&self, pid: i32, images: &Images, more: &[&str]) -> Result<Finished> {
        let pid = pid.to_string();
        let mut args = vec!["dump", "-t", &pid, "-D", images.as_str()?, "-v4", "-o", "dump.log"];
        args.extend(self.dump_args.iter().map(String::as_str));
        args.extend(more);
        self.dumper.run(&args)
    }

    /// Restores detached; how it ended is the caller's to judge.
    pub fn try_restore(&self, images: &Images, more: &[&str]) -> Result<Finished> {
        let mut args = vec!["restore", "-d", "-D", images.as_str()?, "-v4", "-o", "restore.log"];
        args.extend(self.restore_args.iter().map(String::as_str));
        args.extend(more);
        self.restorer.run(&args)
    }

    /// Dumps and waits until the whole tree is gone.
    pub fn dump(&self, program: &Program, images: &Images) -> Result<()> {
        let tree = program.tree()?;
        self.try_dump(program.pid(), images, &[])?.ok()?;
        wait_gone(&tree)?;
        self.check.map_or(Ok(()), |check| check(images))
    }

    /// Restores what was dumped, under the same pids.
    pub fn restore(&self, images: &Images) -> Result<()> {
        self.try_restore(images, &[])?.ok().map(drop)
    }

    /// Restores what was dumped from `program`, which may have pids of its own.
    pub fn bring_back(&self, program: &Program, images: &Images, more: &[&str]) -> Result<()> {
        if !program.is_at_home() {
            return self.try_restore(images, more)?.ok().map(drop);
        }
        let file = images.file("root.pid");
        let _ = std::fs::remove_file(&file);
        let name = file.to_str().context("the scratch folder's name is not text")?;
        self.try_restore(images, &[&["--pidfile", name], more].concat())?.ok()?;
        let pid = std::fs::read_to_string(&file).context("--pidfile")?;
        program.moved(pid.trim().parse().context("--pidfile")?);
        Ok(())
    }

    /// With what a program in namespaces of its own needs.
    pub fn at_home(self, program: &Program) -> Cycle {
        let options = program.options();
        self.with(&options.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// One whole turn; the tree must look the same from outside before and after.
    pub fn turn(&self, program: &Program) -> Result<()> {
        let images = Images::new()?;
        let before = program.state()?;
        self.dump(program, &images)?;
        self.bring_back(program, &images, &[])?;
        if !self.restorer.is_criu() {
            return unchanged(&before, || program.state());
        }
        // CRIU does not wait until the tasks that it stops stand still.
        let deadline = Instant::now() + SETTLING;
        loop {
            let result = compare(&before, &program.state()?.restored_by_criu());
            if result.is_ok() || Instant::now() > deadline {
                return result;
            }
            std::thread::yield_now();
        }
    }

    /// Dumps and leaves the tree running, which must be as it was.
    pub fn leave_running(&self, program: &Program) -> Result<()> {
        let images = Images::new()?;
        let before = program.state()?;
        self.try_dump(program.pid(), &images, &["--leave-running"])?.ok()?;
        ensure!(images.names()?.iter().any(|n| n == "inventory.img"), "a dump without inventory.img");
        unchanged(&before, || program.state()).context("the dump changed the tree that it left running")
    }
}

/// The state of a tree once all threads are back in the calls they were in, or what is still different then: while
/// it waits, a call may have a signal mask of its own.
fn settled(state: impl Fn() -> Result<State>, before: &State) -> Result<State> {
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(2);
    loop {
        let now = state()?;
        if before.differences(&now).is_empty() || std::time::Instant::now() >= patience {
            return Ok(now);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Fails with the differences that are still there when all threads must be back in the calls they were in. `now` tells
/// the state of the tree.
pub fn unchanged(before: &State, now: impl Fn() -> Result<State>) -> Result<()> {
    compare(before, &settled(now, before)?)
}

/// Fails with the differences, if there are any.
pub fn compare(before: &State, after: &State) -> Result<()> {
    let differences = before.differences(after);
    let lines: Vec<&str> = differences.lines().collect();
    match lines.len() {
        0 => Ok(()),
        n @ ..60 => bail!("the tree differs in {n} lines:\n{differences}"),
        n => bail!("the tree differs in {n} lines, of which the first are:\n{}", lines[..60].join("\n")),
    }
}
