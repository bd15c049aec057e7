//! A chain of dumps of a program that changes its memory step by step, and how much each of them holds.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::events::PidFd;
use rcriu_tests::program::wait_gone;
use rcriu_tests::{Engine, Finished, Program, Scratch, skip};

/// Folders `1`, `2`, ... side by side, for the dumps of a chain.
pub struct Chain {
    pub scratch: Scratch,
    pub engine: Engine,
}

impl Chain {
    pub fn new() -> Result<Chain> {
        let engine = Engine::rcriu()?;
        if engine.run(&["check", "--feature", "mem_dirty_track"])?.code != Some(0) {
            return Err(skip("this kernel cannot tell which pages changed"));
        }
        Ok(Chain { scratch: Scratch::new()?, engine })
    }

    pub fn dir(&self, n: usize) -> PathBuf {
        self.scratch.path().join(n.to_string())
    }

    /// `verb` of the program into folder `n`, on top of `on`, with `more` arguments and environment.
    pub fn run(
        &self,
        verb: &str,
        program: &Program,
        (n, on): (usize, Option<usize>),
        more: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Finished> {
        fs::create_dir_all(self.dir(n))?;
        let (dir, pid) = (self.dir(n), program.pid().to_string());
        let mut args = vec![verb, "-t", &pid, "-D", dir.to_str().context("name")?, "-v4", "-o", "dump.log"];
        let parent = on.map(|on| format!("../{on}"));
        if let Some(parent) = &parent {
            args.extend(["--prev-images-dir", parent]);
        }
        args.extend(more);
        let mut command = self.engine.command(&args);
        command.envs(env.iter().copied());
        self.engine.finish(command)
    }

    pub fn pre_dump(&self, program: &Program, n: usize, more: &[&str]) -> Result<Finished> {
        self.run("pre-dump", program, (n, (n > 1).then_some(n - 1)), more, &[])?.ok()
    }

    /// The dump that ends the chain; waits until the tree is gone.
    pub fn dump(&self, program: &Program, n: usize, more: &[&str]) -> Result<Finished> {
        let tree = program.tree()?;
        let finished = self.run("dump", program, (n, (n > 1).then_some(n - 1)), more, &[])?.ok()?;
        wait_gone(&tree)?;
        Ok(finished)
    }

    pub fn restore(&self, n: usize, more: &[&str]) -> Result<()> {
        let dir = self.dir(n);
        let mut args = vec!["restore", "-d", "-D", dir.to_str().context("name")?, "-v4", "-o", "restore.log"];
        args.extend(more);
        self.engine.run(&args)?.ok().map(drop)
    }

    /// Bytes of all page files of a folder: their length, and the space they take.
    pub fn pages(&self, n: usize) -> Result<(u64, u64)> {
        let mut sum = (0, 0);
        for entry in fs::read_dir(self.dir(n))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("pages-") {
                let meta = entry.metadata()?;
                sum = (sum.0 + meta.len(), sum.1 + meta.blocks() * 512);
            }
        }
        Ok(sum)
    }

    /// Bytes of the root task's pages.
    fn of_root(&self, n: usize) -> Result<u64> {
        Ok(fs::metadata(self.dir(n).join("pages-1.img")).context("pages-1.img")?.len())
    }

    /// Fails unless folder `n` holds less than a tenth of what folder 1 does.
    pub fn is_small(&self, n: usize) -> Result<()> {
        let (first, this) = (self.of_root(1)?, self.of_root(n)?);
        ensure!(this < first / 10, "dump {n} holds {this} bytes of pages, dump 1 {first}");
        Ok(())
    }

    /// Fails if folder `n` is small: everything was to be written again.
    pub fn is_whole(&self, n: usize) -> Result<()> {
        let (first, this) = (self.of_root(1)?, self.of_root(n)?);
        ensure!(this > first / 10 * 9, "dump {n} holds {this} bytes of pages, dump 1 {first}");
        Ok(())
    }
}

pub fn step(program: &Program, n: usize) -> Result<()> {
    PidFd::open(Pid::from_raw(program.pid())).context("the program")?.kill(Signal::SIGUSR1);
    program.wait_line(&format!("STEP {n}"))
}
