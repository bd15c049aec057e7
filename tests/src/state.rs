//! What /proc shows of a process tree, as keys and values: taken before a dump and after a restore, the two
//! must be equal. Looking from outside disturbs nothing in the tree, and works for any program.
//!
//! Left out is what a restore cannot and need not keep: times, counters, the time namespace (a restore makes
//! one to keep the clocks going on), inode numbers of anonymous objects
//! (they are renumbered in the order met, so sharing stays visible), and how the kernel splits one range of
//! memory into neighbours of equal kind (they are joined).

mod descriptors;
mod home;
mod memory;
mod numbers;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;

use anyhow::{Context, Result};

use descriptors::{Renumber, fdinfo_line};
use numbers::Numbers;

/// Fields of /proc/PID/stat that a restore keeps, by their number in proc_pid_stat(5).
const STAT: [(usize, &str); 19] = [
    (4, "parent"),
    (5, "process group"),
    (6, "session"),
    (7, "terminal"),
    (18, "priority"),
    (19, "nice"),
    (20, "threads"),
    (26, "start_code"),
    (27, "end_code"),
    (28, "start_stack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (50, "env_start"),
    (52, "exit_code"),
];

/// Lines of /proc/PID/task/TID/status that a restore keeps.
const STATUS: [&str; 26] = [
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "Kthread",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];

/// One process of a tree, from one reading of /proc.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    pub ppid: i32,
    pub state: char,
}

/// Every process /proc shows.
pub fn processes() -> Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("opening /proc")? {
        let name = entry.context("reading /proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        // It may die between the listing and the reading.
        if let Some(stat) = stat_fields(&format!("/proc/{pid}/stat")) {
            let (state, ppid) = (stat[0].chars().next().unwrap_or('?'), stat[1].parse().unwrap_or(0));
            all.push(Process { pid, ppid, state });
        }
    }
    Ok(all)
}

/// Processes below `root` (itself not among them), parents before children.
pub fn descendants(all: &[Process], root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    all.iter().for_each(|p| children.entry(p.ppid).or_default().push(p.pid));
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        found.extend(children.remove(&found[at]).unwrap_or_default());
        at += 1;
    }
    found.split_off(1)
}

/// Fields from the third (state) on; the name in the second may hold anything.
fn stat_fields(path: &str) -> Option<Vec<String>> {
    let text = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&text);
    let fields: Vec<String> = text.rsplit_once(')')?.1.split_whitespace().map(str::to_string).collect();
    (fields.len() >= 50).then_some(fields)
}

/// State of a tree by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State(BTreeMap<String, String>);

impl State {
    /// Reads the whole tree below and with `root`. The tree must be at rest.
    pub fn of(root: i32) -> Result<State> {
        let mut state = State::default();
        let mut names = Renumber::default();
        let mut pids = vec![root];
        pids.extend(descendants(&processes()?, root));
        let numbers = Numbers::of(root, &pids)?;
        // Their order here may be another after a restore.
        pids.sort_by_key(|pid| numbers.within(*pid));
        for pid in &pids {
            state
                .process(*pid, &mut names, &numbers)
                .with_context(|| format!("reading the state of pid {pid}"))?;
        }
        for (what, value) in home::of(root, &pids)? {
            state.put(numbers.within(root), &what, value);
        }
        Ok(state)
    }

    /// Pids of the tree, as its own pid namespace counts them.
    pub fn pids(&self) -> Vec<i32> {
        let of_process = |k: &String| k.strip_suffix(" process").and_then(|p| p.parse().ok());
        self.0.keys().filter_map(of_process).collect()
    }

    /// Removes entries the caller knows to change, by a test of their names.
    pub fn without(mut self, unwanted: impl Fn(&str) -> bool) -> State {
        self.0.retain(|k, _| !unwanted(k));
        self
    }

    /// This state, with what CRIU makes of shared anonymous memory taken for what it was: CRIU restores it as a
    /// memfd, called as its image calls it.
    pub fn restored_by_criu(mut self) -> State {
        for (_, value) in self.0.iter_mut().filter(|(k, _)| k.ends_with(" memory")) {
            for memfd in ["/memfd: (deleted)", "/memfd:/dev/zero (deleted)"] {
                *value = value.replace(memfd, "/dev/zero (deleted)");
            }
        }
        self
    }

    /// Human-readable differences; empty when equal.
    pub fn differences(&self, after: &State) -> String {
        let mut out = String::new();
        let keys: std::collections::BTreeSet<&String> = self.0.keys().chain(after.0.keys()).collect();
        // A process or thread that is gone, or new, is told in one line instead of all that it had.
        let whole = |key: &str| {
            let words: Vec<&str> = key.split(' ').collect();
            match words[..] {
                [pid, "thread", tid, ..] => {
                    vec![format!("{pid} process"), format!("{pid} thread {tid} Name")]
                }
                [pid, ..] => vec![format!("{pid} process")],
                [] => vec![],
            }
        };
        for key in keys {
            // A process that has become a zombie has lost all the rest with its life.
            let one_sided = |k: &String| {
                let changed = k.ends_with(" process") && self.0.get(k) != after.0.get(k);
                k != key && (changed || self.0.contains_key(k) != after.0.contains_key(k))
            };
            if whole(key).iter().any(one_sided) {
                continue;
            }
            match (self.0.get(key), after.0.get(key)) {
                (Some(a), Some(b)) if a == b => {}
                (Some(a), Some(b)) => {
                    let _ = writeln!(out, "  {key}:");
                    lines_changed(a, b, &mut out);
                }
                (Some(a), None) => drop(writeln!(out, "  {key}: gone (was {})", a.trim())),
                (None, Some(b)) => drop(writeln!(out, "  {key}: new ({})", b.trim())),
                (None, None) => {}
            }
        }
        out
    }

    fn put(&mut self, pid: i32, what: &str, value: impl Into<String>) {
        self.0.insert(format!("{pid} {what}"), value.into());
    }

    fn process(&mut self, real: i32, names: &mut Renumber, numbers: &Numbers) -> Result<()> {
        let pid = numbers.within(real);
        let stat = stat_fields(&format!("/proc/{real}/stat")).context("no stat")?;
        let zombie = stat[0] == "Z";
        self.put(pid, "process", if zombie { "zombie" } else { "alive" });
        for (number, name) in STAT {
            // A zombie has no memory left and its exit code is what matters.
            if if zombie { number < 8 || number == 52 } else { number != 52 } {
                let value = &stat[number - 3];
                match number {
                    4..=6 => self.put(pid, name, numbers.in_text(value)),
                    20 if !zombie => self.put(pid, name, threads(real)?.len().to_string()),
                    _ => self.put(pid, name, value),
                }
            }
        }
        if zombie {
            return Ok(());
        }
        let file = |name: &str| fs::read(format!("/proc/{real}/{name}"));
        for name in ["cmdline", "environ"] {
            let text = String::from_utf8_lossy(&file(name)?).replace('\0', " ");
            self.put(pid, name, text);
        }
        self.put(pid, "auxv", format!("{:x?}", file("auxv")?));
        for name in ["limits", "oom_score_adj", "coredump_filter", "personality", "loginuid"] {
            if let Ok(text) = file(name) {
                self.put(pid, name, String::from_utf8_lossy(&text));
            }
        }
        for name in ["exe", "cwd", "root"] {
            let link =
                fs::read_link(format!("/proc/{real}/{name}")).with_context(|| format!("readlink {name}"))?;
            self.put(pid, name, link.to_string_lossy());
        }
        for (name, value) in ["pid", "net", "mnt", "uts", "ipc", "user", "cgroup"]
            .iter()
            .filter_map(|ns| Some((ns, fs::read_link(format!("/proc/{real}/ns/{ns}")).ok()?)))
        {
            let ours = fs::read_link(format!("/proc/self/ns/{name}")).is_ok_and(|ours| ours == value);
            let which = if ours { "ours".into() } else { names.of(&value.to_string_lossy()) };
            self.put(pid, &format!("{name} namespace"), which);
        }
        for thread in threads(real)? {
            self.thread(real, thread, numbers)?;
        }
        for fd in sorted_numbers(&format!("/proc/{real}/fd"))? {
            self.descriptor(real, fd, names, numbers)?;
        }
        self.put(pid, "memory", memory::lines(&fs::read_to_string(format!("/proc/{real}/smaps"))?));
        Ok(())
    }

    fn thread(&mut self, real: i32, thread: i32, numbers: &Numbers) -> Result<()> {
        let (pid, tid) = (numbers.within(real), numbers.within(thread));
        let base = format!("/proc/{real}/task/{thread}");
        let status = String::from_utf8_lossy(&fs::read(format!("{base}/status"))?).into_owned();
        for line in status.lines() {
            if let Some((name, value)) = line.split_once(':').filter(|(name, _)| STATUS.contains(name)) {
                let value = match name {
                    "SigBlk" => without_term(value.trim()),
                    "Tgid" | "Pid" | "TracerPid" => numbers.in_text(value.trim()),
                    _ if name.starts_with("NS") => numbers.innermost(value),
                    _ => value.trim().into(),
                };
                self.put(pid, &format!("thread {tid} {name}"), value);
            }
        }
        if let Ok(slack) = fs::read_to_string(format!("{base}/timerslack_ns")) {
            self.put(pid, &format!("thread {tid} timerslack"), slack);
        }
        if let Some(stat) = stat_fields(&format!("{base}/stat")) {
            for (number, name) in [(18, "priority"), (19, "nice"), (40, "rt_priority"), (41, "policy")] {
                self.put(pid, &format!("thread {tid} {name}"), &stat[number - 3]);
            }
        }
        Ok(())
    }

    fn descriptor(&mut self, real: i32, fd: i32, names: &mut Renumber, numbers: &Numbers) -> Result<()> {
        let pid = numbers.within(real);
        let link =
            fs::read_link(format!("/proc/{real}/fd/{fd}")).with_context(|| format!("readlink of fd {fd}"))?;
        self.put(pid, &format!("fd {fd}"), names.of(&link.to_string_lossy()));
        let info = fs::read_to_string(format!("/proc/{real}/fdinfo/{fd}"))?;
        // Sorted, because the targets of an epoll are listed in the order of kernel addresses.
        let mut kept: Vec<String> =
            info.lines().filter_map(fdinfo_line).map(|line| numbers.in_lock(&line)).collect();
        kept.sort();
        self.put(pid, &format!("fd {fd} info"), kept.join("\n"));
        Ok(())
    }
}

/// A signal mask without SIGTERM, which sigwait(2) unblocks for as long as it happens to be in the call.
fn without_term(mask: &str) -> String {
    let bits = u64::from_str_radix(mask, 16).unwrap_or(0);
    format!("{:016x}", bits & !(1 << (libc::SIGTERM - 1)))
}

/// Threads of a process, without those that the kernel keeps at hand for an io_uring (PF_IO_WORKER).
fn threads(real: i32) -> Result<Vec<i32>> {
    let mut all = sorted_numbers(&format!("/proc/{real}/task"))?;
    all.retain(|tid| {
        let stat = stat_fields(&format!("/proc/{real}/task/{tid}/stat"));
        stat.is_none_or(|stat| stat[9 - 3].parse::<u32>().is_ok_and(|flags| flags & 0x10 == 0))
    });
    Ok(all)
}

fn sorted_numbers(dir: &str) -> Result<Vec<i32>> {
    let mut numbers: Vec<i32> = fs::read_dir(dir)
        .with_context(|| format!("opening {dir}"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn lines_changed(before: &str, after: &str, out: &mut String) {
    let (a, b): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    for (sign, these, those) in [('-', &a, &b), ('+', &b, &a)] {
        for line in these.iter().filter(|l| !those.contains(l)).take(12) {
            let _ = writeln!(out, "    {sign} {}", line.chars().take(400).collect::<String>());
        }
    }
}
