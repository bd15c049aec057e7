//! The command demo: what the program is for, seen in a few seconds.
//!
//! It runs the same commands that a user would type, on a program of its own, and checks that nothing was lost.

mod program;

use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rcriu_engine::error::{Error, Result, SysContext};
use rcriu_engine::options::Dir;
use rcriu_engine::{interrupt, process, stats};
use rcriu_images::ImageKind;

pub use program::main as program;

/// The word by which a process of the demo's program is started; not for people.
pub const PROGRAM: &str = "demo-program";

/// How long anything may take before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Numbers that are watched before and after.
const WATCHED: u64 = 10;

/// The command.
pub fn run(args: &[OsString]) -> ExitCode {
    if !args.is_empty() {
        eprintln!("rcriu: demo takes no further words");
        return ExitCode::FAILURE;
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("rcriu: demo needs root, as freezing and restoring processes does: try it with sudo");
        return ExitCode::FAILURE;
    }
    match process::prepare_signals().and_then(|()| show()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rcriu: demo: {e}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("rcriu-demo-").tempdir().call("mkdtemp")?;
    let images = folder.path().join("images");
    fs::create_dir(&images).call("mkdir")?;
    let stage =
        Stage { file: folder.path().join("numbers"), images, plain: !std::io::stdout().is_terminal() };
    // An init that reaps late would keep the pids of the dumped descendants taken for a while.
    nix::sys::prctl::set_child_subreaper(true).call("prctl(PR_SET_CHILD_SUBREAPER)")?;
    let tree = stage.start()?;
    let last = stage.freeze(tree)?;
    stage.overview()?;
    let tree = stage.bring_back(last)?;
    stage.end(tree)
}

/// The tree of the program. Dropped, it ends; nothing else does.
struct Tree {
    root: i32,
    /// As we started it; a restored one is our child too.
    child: Option<Child>,
}

impl Tree {
    /// Waits for the tree, which has ended.
    fn reap(mut self) {
        self.reap_now();
        std::mem::forget(self);
    }

    fn reap_now(&mut self) {
        let _ = match &mut self.child {
            Some(child) => child.wait().map(drop).ok(),
            None => waitpid(Pid::from_raw(self.root), None).map(drop).ok(),
        };
        // Its descendants, which are ours now that it is gone: their pids must be free for the restore.
        while waitpid(Pid::from_raw(-self.root), None).is_ok() {}
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The root leads a group with its descendants and nobody else in it.
        let _ = killpg(Pid::from_raw(self.root), Signal::SIGKILL);
        self.reap_now();
    }
}

struct Stage {
    file: PathBuf,
    images: PathBuf,
    plain: bool,
}

impl Stage {
    fn start(&self) -> Result<Tree> {
        self.heading("A program starts: one process counts, another writes the numbers down.");
        let child = program::start(&self.file).call("execve")?;
        let tree = Tree { root: child.id() as i32, child: Some(child) };
        self.wait_for_number(WATCHED)?;
        self.draw(tree.root, 0);
        self.say("It counts in memory, sends each number through a pipe, and a file gets it.");
        self.count(1, WATCHED)?;
        Ok(tree)
    }

    /// Dumps it; the last number before.
    fn freeze(&self, tree: Tree) -> Result<u64> {
        self.heading("It is frozen, saved and gone.");
        let pid = tree.root.to_string();
        let took = self.tool(&["dump", "-t", &pid, "-o", "dump.log", "-D"])?;
        tree.reap();
        let (count, bytes) = self.size()?;
        let frozen = stats::read(&Dir::open(&self.images).call("open")?, ImageKind::StatsDump)?
            .and_then(|entry| entry.dump)
            .map_or(0, |dump| dump.frozen_time);
        self.say(&format!(
            "{} ms, of which it stood still for {} ms. {count} image files, {}.",
            took.as_millis(),
            frozen.div_ceil(1000),
            human(bytes),
        ));
        let last = self.last_number();
        std::thread::sleep(Duration::from_millis(700));
        if self.last_number() != last {
            return Err(Error::bug("the program went on counting after it was dumped"));
        }
        self.say(&format!("The last number is {last}, and no more come: no process is left."));
        Ok(last)
    }

    fn overview(&self) -> Result<()> {
        if crate::cli::has_command("show") {
            self.heading("What is in the images.");
            self.tool(&["show"])?;
        }
        Ok(())
    }

    fn bring_back(&self, last: u64) -> Result<Tree> {
        self.heading("It comes back to life.");
        let took = self.tool(&["restore", "-d", "-S", "-o", "restore.log", "-D"])?;
        let root = self.root_of_images()?;
        let tree = Tree { root, child: None };
        self.wait_for_number(last + WATCHED)?;
        self.say(&format!("{} ms. The same processes, pids and all, run again:", took.as_millis()));
        self.draw(root, 0);
        self.count(last + 1, last + WATCHED)?;
        Ok(tree)
    }

    fn end(&self, tree: Tree) -> Result<()> {
        drop(tree);
        let text = fs::read_to_string(&self.file).call("read")?;
        let numbers: Vec<u64> = text.lines().filter_map(number).collect();
        if numbers.iter().zip(1u64..).any(|(got, want)| *got != want) {
            return Err(Error::bug("a number was lost or came twice"));
        }
        self.heading("Nothing was lost.");
        self.say(&format!("The file has the numbers from 1 to {}, each once, in order.", numbers.len()));
        self.say("Memory, threads, pids, the pipe and the open file came back as they were.");
        Ok(())
    }

    /// The root task's pid, as the images have it.
    fn root_of_images(&self) -> Result<i32> {
        let dir = Dir::open(&self.images).call("open")?.images()?;
        let entries: Vec<rcriu_images::pb::PstreeEntry> = dir.read_all(ImageKind::Pstree, 0)?;
        let root = entries.first().ok_or_else(|| Error::image("pstree.img is empty"))?;
        i32::try_from(root.pid).map_err(|_| Error::image("pstree.img: the pid is too large"))
    }

    /// Runs one of our own commands on the images folder, after showing it.
    fn tool(&self, words: &[&str]) -> Result<Duration> {
        self.say(&self.bold(&format!("$ rcriu {} {}", words.join(" "), self.images.display())));
        let began = Instant::now();
        let status = Command::new("/proc/self/exe")
            .args(words)
            .arg(&self.images)
            .stdin(Stdio::null())
            .status()
            .call("execve")?;
        if !status.success() {
            return Err(Error::host(format!("rcriu {} failed", words[0])));
        }
        Ok(began.elapsed())
    }

    /// Prints numbers as they are in the file.
    fn count(&self, from: u64, to: u64) -> Result<()> {
        let text = fs::read_to_string(&self.file).call("read")?;
        let found: Vec<String> = text
            .lines()
            .filter_map(number)
            .filter(|n| (from..=to).contains(n))
            .map(|n| n.to_string())
            .collect();
        self.say(&format!("... {} ...", found.join(" ")));
        Ok(())
    }

    fn last_number(&self) -> u64 {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        text.lines().filter_map(number).next_back().unwrap_or(0)
    }

    fn wait_for_number(&self, wanted: u64) -> Result<()> {
        let began = Instant::now();
        while self.last_number() < wanted {
            interrupt::check()?;
            if began.elapsed() > PATIENCE {
                return Err(Error::host(format!("number {wanted} did not come")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Files in the images folder and their size on disk.
    fn size(&self) -> Result<(usize, u64)> {
        let mut count = 0;
        let mut bytes = 0;
        for entry in fs::read_dir(&self.images).call("open")? {
            let meta = entry.and_then(|e| e.metadata()).call("stat")?;
            count += 1;
            bytes += meta.len();
        }
        Ok((count, bytes))
    }

    /// The tree below `pid`, one line each.
    fn draw(&self, pid: i32, depth: usize) {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let many = if threads == 1 { String::new() } else { format!(", {threads} threads") };
        let indent = "   ".repeat(depth);
        self.say(&format!("  {indent}{pid}  {}{many}", read("comm").trim()));
        for child in read(&format!("task/{pid}/children")).split_whitespace().flat_map(str::parse) {
            self.draw(child, depth + 1);
        }
    }

    fn heading(&self, text: &str) {
        println!("\n{}", self.bold(text));
    }

    fn say(&self, text: &str) {
        println!("  {text}");
        let _ = std::io::stdout().flush();
    }

    fn bold(&self, text: &str) -> String {
        if self.plain { text.to_owned() } else { format!("\x1b[1m{text}\x1b[0m") }
    }
}

/// The number at the start of a line.
fn number(line: &str) -> Option<u64> {
    line.split(' ').next()?.parse().ok()
}

fn human(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(human(512), "512 bytes");
        assert_eq!(human(600 << 10), "600 KiB");
        assert_eq!(human(200 << 20), "200 MiB");
    }

    #[test]
    fn numbers_start_lines() {
        assert_eq!(number("12 360"), Some(12));
        assert_eq!(number("x"), None);
    }
}
