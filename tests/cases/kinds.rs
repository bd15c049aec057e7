//! What is asked of every program: it holds as it is, across a dump and restore, when it is left running,
//! and across three turns.

use anyhow::{Context, Result};
use rcriu_tests::{Case, Cycle, Engine, Program};

/// A program and what it shows.
#[derive(Clone, Copy)]
pub struct Kind {
    pub sentence: &'static str,
    pub program: &'static str,
    pub args: &'static [&'static str],
    /// Arguments for both dump and restore.
    pub options: &'static [&'static str],
    /// Whether CRIU 4.2 keeps this state (without CAP_SYS_RESOURCE), so that it can be interchanged.
    pub in_criu: bool,
}

pub const fn kind(sentence: &'static str, program: &'static str, args: &'static [&'static str]) -> Kind {
    Kind { sentence, program, args, options: &[], in_criu: true }
}

impl Kind {
    /// CRIU refuses this state or loses it.
    pub const fn beyond_criu(mut self) -> Kind {
        self.in_criu = false;
        self
    }

    fn start(&self) -> Result<Program> {
        Program::start(self.program, self.args)
    }

    /// The four cases of a program.
    pub fn cases(self, family: &str) -> Vec<Case> {
        let name = |how: &str| format!("{family}: {}{how}", self.sentence);
        let cycle = move || Ok::<_, anyhow::Error>(Cycle::new()?.with(self.options));
        vec![
            Case::new(name(" (without dump)"), move || self.start()?.verify()),
            Case::new(name(""), move || {
                let program = self.start()?;
                cycle()?.turn(&program)?;
                program.verify()
            }),
            Case::new(name(" (left running)"), move || {
                let program = self.start()?;
                cycle()?.leave_running(&program)?;
                program.verify()
            }),
            Case::new(name(" (three turns)"), move || {
                let program = self.start()?;
                for turn in 1..=3 {
                    cycle()?.turn(&program).with_context(|| format!("turn {turn}"))?;
                }
                program.verify()
            }),
        ]
    }

    /// Dumped by one binary, restored by the other, both ways.
    pub fn interchange(self) -> Vec<Case> {
        let run = move |ours_dumps: bool| {
            let (ours, criu) = (Engine::rcriu()?, Engine::criu()?);
            let (dumper, restorer) = if ours_dumps { (ours, criu) } else { (criu, ours) };
            let program = self.start()?;
            Cycle::between(dumper, restorer).with(self.options).turn(&program)?;
            program.verify()
        };
        let name = |how: &str| format!("interop: {}, {how}", self.sentence);
        vec![
            Case::new(name("dumped by rcriu, restored by CRIU"), move || run(true)),
            Case::new(name("dumped by CRIU, restored by rcriu"), move || run(false)),
        ]
    }
}

/// The cases of a family of programs.
pub fn all(family: &str, kinds: &[Kind]) -> Vec<Case> {
    kinds.iter().flat_map(|k| k.cases(family)).collect()
}
