//! Images that are damaged anywhere: a restore refuses them in words, or restores what it can still read; it
//! never panics, dies, hangs or leaves anything behind.
//!
//! The places are drawn from a fixed sequence; RCRIU_DAMAGE_SEED draws another, RCRIU_DAMAGES sets how many.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rcriu_tests::events::PidFd;
use rcriu_tests::{Case, Cycle, Images, Program};

use crate::failures::{below, nothing_left};

/// splitmix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % below.max(1) as u64) as usize
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

/// Damages `bytes` and says how.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) -> String {
    let at = dice.roll(bytes.len());
    match dice.roll(6) {
        0 => {
            bytes.truncate(at);
            format!("cut to {at} bytes")
        }
        1 => {
            let len = (1 + dice.roll(16)).min(bytes.len() - at);
            bytes.drain(at..at + len);
            format!("{len} bytes taken out at {at}")
        }
        2 => {
            let more: Vec<u8> = (0..1 + dice.roll(16)).map(|_| dice.roll(256) as u8).collect();
            bytes.splice(at..at, more.iter().copied());
            format!("{more:x?} put in at {at}")
        }
        3 => {
            bytes[at] = 0xff;
            format!("0xff at {at}")
        }
        _ => {
            let bit = dice.roll(8);
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} turned")
        }
    }
}

/// Restores `images` as they are, whatever may come of it.
fn survives(images: &Images) -> Result<()> {
    let finished = Cycle::new()?.try_restore(images, &[])?;
    let Some(code) = finished.code else { bail!("it died of a signal; stderr: {}", finished.stderr) };
    let said = format!("{}{}", finished.stderr, finished.log);
    ensure!(
        !said.contains("panicked") && !said.contains("internal error"),
        "it is a mistake of ours: {said}"
    );
    if code == 0 {
        // What was damaged does not matter to a restore; perhaps to the program, whose first process may be gone
        // already and its children be ours.
        for pid in below()? {
            if let Ok(task) = PidFd::open(Pid::from_raw(pid)) {
                task.kill(Signal::SIGKILL);
            }
        }
        return nothing_left("the killed program");
    }
    let lines: Vec<&str> = finished.stderr.lines().collect();
    ensure!(
        lines.len() == 1 && lines[0].starts_with("rcriu: "),
        "stderr is not one line: {}",
        finished.stderr
    );
    ensure!(finished.log.contains("Error ("), "there is no Error in the log");
    nothing_left("the failed restore")
}

fn damaged(kind: &str, args: &[&str]) -> Result<()> {
    let program = Program::start(kind, args)?;
    let images = Images::new()?;
    Cycle::new()?.dump(&program, &images)?;
    let mut names = images.names()?;
    // Pages are the program's own affair.
    names.retain(|n| !n.starts_with("pages-") && !n.starts_with("stats-"));
    let mut dice = Dice(number("RCRIU_DAMAGE_SEED", 1) ^ kind.len() as u64);
    for turn in 0..number("RCRIU_DAMAGES", 60) {
        let name = &names[dice.roll(names.len())];
        let path = images.file(name);
        let whole = fs::read(&path).with_context(|| name.clone())?;
        let mut bytes = whole.clone();
        let how = damage(&mut bytes, &mut dice);
        fs::write(&path, bytes).context("writing the damaged image")?;
        survives(&images).with_context(|| format!("turn {turn}, {name}: {how}"))?;
        fs::write(&path, whole).context("mending the image")?;
    }
    Cycle::new()?.restore(&images)?;
    program.verify()
}

pub fn cases() -> Vec<Case> {
    let kinds: [(&str, &[&str]); 5] = [
        ("tree", &["2", "2"]),
        ("threads", &["3"]),
        ("pipes", &[]),
        ("socketpair", &[]),
        ("shared-memory", &[]),
    ];
    let case = |(kind, args): (&'static str, &'static [&'static str])| {
        Case::new(format!("damage: damaged images of {kind} are refused in words or restored"), move || {
            damaged(kind, args)
        })
        .within(std::time::Duration::from_secs(600))
    };
    kinds.into_iter().map(case).collect()
}
