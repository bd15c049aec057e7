//! The program that the demo freezes: three processes, of which one has three more threads, a pipe, a file.
//!
//! ```text
//! root  -->  counter: threads count, main sends "N SUM" each tick  == pipe ==>  writer: appends to the file
//! ```
//!
//! All of its state is in memory, in the pipe and in the file: were any of it lost or repeated, the lines in the
//! file would not be 1, 2, 3, ...

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Between two numbers.
const TICK: Duration = Duration::from_millis(100);
/// Threads that count for themselves.
pub const THREADS: usize = 3;

/// Starts it in a session of its own. Its lines go to the file `to`.
pub fn start(to: &std::path::Path) -> std::io::Result<Child> {
    command("root").arg(to).stdin(Stdio::null()).spawn()
}

fn command(part: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(format!("demo-{part}")).args([super::PROGRAM, part]).current_dir("/");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// One of the processes.
pub fn main(args: &[OsString]) -> ExitCode {
    let part = args.first().map(|a| a.to_string_lossy().into_owned()).unwrap_or_default();
    let name = std::ffi::CString::new(format!("demo-{part}")).unwrap_or_default();
    let _ = nix::sys::prctl::set_name(&name);
    let result = match (part.as_str(), args.get(1)) {
        ("root", Some(file)) => root(file),
        ("counter", _) => counter(),
        ("writer", Some(file)) => writer(file),
        _ => Err(std::io::ErrorKind::InvalidInput.into()),
    };
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn root(file: &OsString) -> std::io::Result<()> {
    nix::unistd::setsid()?;
    let mut counter = command("counter").stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let pipe = counter.stdout.take().map_or(Stdio::null(), Stdio::from);
    let mut writer = command("writer").arg(file).stdin(pipe).spawn()?;
    counter.wait()?;
    writer.wait()?;
    Ok(())
}

fn counter() -> std::io::Result<()> {
    let sum = Arc::new(AtomicU64::new(0));
    for _ in 0..THREADS {
        let sum = sum.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(TICK / 10);
                sum.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for number in 1u64.. {
        writeln!(std::io::stdout(), "{number} {}", sum.load(Ordering::Relaxed))?;
        std::thread::sleep(TICK);
    }
    Ok(())
}

fn writer(file: &OsString) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(file)?;
    for line in BufReader::new(std::io::stdin()).lines() {
        writeln!(file, "{}", line?)?;
    }
    Ok(())
}
