//! What every program needs: saying READY and waiting, checking, forking members of its crew.

pub mod crew;
pub mod mem;
pub mod net;
pub mod team;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

/// Verdict of a program or of a part of it.
pub type Check = Result<()>;

/// Why a program cannot set its state up here.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The error that becomes the verdict `SKIP why`.
pub fn skip(why: impl Into<String>) -> anyhow::Error {
    Skip(why.into()).into()
}

/// Descriptor a crew member tells its readiness through; -1 in the root, which prints READY.
static TELL: AtomicI32 = AtomicI32::new(-1);

/// Blocks SIGTERM, which asks for the verdict, in this thread and those it will start.
pub fn block_term() -> Check {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&term), None).context("sigprocmask")
}

/// Says that the state is set up and waits until it is to be verified.
pub fn rest() -> Check {
    tell_ready()?;
    wait_term()
}

/// Says that the state is set up; the caller waits in its own way.
pub fn tell_ready() -> Check {
    match TELL.swap(-1, Ordering::SeqCst) {
        -1 => {
            println!("READY");
            std::io::stdout().flush().context("stdout")
        }
        fd => crew::tell(fd),
    }
}

/// Waits for the SIGTERM that asks for the verdict.
pub fn wait_term() -> Check {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    loop {
        match term.wait() {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e).context("sigwait"),
        }
    }
}

/// Fails with a name and both values when they differ.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, was: T) -> Check {
    if is == was { Ok(()) } else { bail!("{what} is {is:?} but was {was:?}") }
}

/// Turns -1 of a C call into an error with the call's name.
pub fn sys<T: nix::errno::ErrnoSentinel + PartialEq>(call: &'static str, result: T) -> Result<T> {
    nix::errno::Errno::result(result).context(call)
}

/// A number among the arguments, or its default.
pub fn number(args: &[String], at: usize, default: usize) -> Result<usize> {
    args.get(at).map_or(Ok(default), |a| a.parse().with_context(|| format!("argument {a:?}")))
}

/// A file of this name in the scratch folder, created with this content.
pub fn write(name: impl AsRef<Path>, content: &[u8]) -> Check {
    fs::write(name.as_ref(), content).with_context(|| format!("writing {}", name.as_ref().display()))
}

/// Value of a line of a /proc file, after its colon.
pub fn proc_line(file: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(file).with_context(|| file.to_string())?;
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name} in {file}"))?.trim().to_string())
}
