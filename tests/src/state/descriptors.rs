//! Descriptors as /proc shows them, less what a restore gives other values.

use std::collections::HashMap;

/// What of a line of fdinfo is the same after a restore; None for what is not.
pub(super) fn fdinfo_line(line: &str) -> Option<String> {
    let dropped = [
        "mnt_id",
        "map_id",
        "prog_id",
        "ino",
        "it_value",
        "inotify",
        "fanotify",
        "scm_fds",
        "eventfd-id",
        "Pid",
        "NSpid",
        // What an io_uring counts as time.
        "SqTotalTime",
    ];
    let name = line.split([':', ' ']).next().unwrap_or("");
    if dropped.contains(&name) {
        return None;
    }
    if name == "flags" {
        // O_LARGEFILE means nothing to 64-bit programs: open(2) adds it, other ways to a descriptor do not.
        let flags = i64::from_str_radix(line["flags:".len()..].trim(), 8).ok()? & !0o100_000;
        return Some(format!("flags: 0{flags:o}"));
    }
    if name == "tfd" {
        return epoll_target(line);
    }
    Some(line.to_string())
}

/// `tfd: N events: X data: Y pos:.. ino:..` without the inode, and with the two events that the kernel adds
/// whenever a target is added: a one-shot target that has fired is without them until it is armed again.
fn epoll_target(line: &str) -> Option<String> {
    let mut words = line.split_whitespace().filter(|w| !w.ends_with(':'));
    let (target, events, data) = (words.next()?, words.next()?, words.next()?);
    let events = u32::from_str_radix(events, 16).ok()? | (libc::EPOLLERR | libc::EPOLLHUP) as u32;
    Some(format!("tfd: {target} events: {events:x} data: {data}"))
}

/// Kinds of inodes that have only a number, which is another after a restore.
const ANONYMOUS: [&str; 9] = ["pipe", "socket", "pid", "net", "mnt", "uts", "ipc", "user", "cgroup"];

/// Gives anonymous inodes numbers in the order in which they are met.
#[derive(Default)]
pub(super) struct Renumber(HashMap<String, usize>);

impl Renumber {
    pub(super) fn of(&mut self, link: &str) -> String {
        match link.split_once(":[") {
            Some((kind, _)) if ANONYMOUS.contains(&kind) => {
                let next = self.0.len();
                format!("{kind}:#{}", self.0.entry(link.to_string()).or_insert(next))
            }
            // A removed file comes back under a name of the restore's choosing, removed again.
            _ => match link.strip_suffix(" (deleted)") {
                Some(path) => format!("{} (deleted)", path.trim_end_matches(".cr_link")),
                None => link.to_string(),
            },
        }
    }
}
