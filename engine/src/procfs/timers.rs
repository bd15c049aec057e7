//! `/proc/PID/timers`: POSIX timers, Linux 3.10 with CONFIG_CHECKPOINT_RESTORE.

use super::{ProcDir, hex, number};
use crate::error::Result;

/// One timer; its time comes from the task itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer {
    pub id: u32,
    pub signo: u32,
    pub sival_ptr: u64,
    /// `SIGEV_*` numbers without `SIGEV_THREAD_ID`.
    pub notify: u32,
    /// `SIGEV_THREAD_ID`: the thread notified, as a number of the reader's pid namespace.
    pub notify_thread: Option<i32>,
    pub clock: i32,
}

/// Timers of the task; empty too where the kernel has no such file.
pub fn read(dir: &ProcDir) -> Result<Vec<Timer>> {
    let bytes = match dir.read("timers") {
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
        other => other?,
    };
    parse(&bytes).ok_or_else(|| dir.strange("timers", &bytes))
}

/// Parses the content of the file.
pub fn parse(bytes: &[u8]) -> Option<Vec<Timer>> {
    let mut timers: Vec<Timer> = Vec::new();
    for line in bytes.split(|c| *c == b'\n').filter(|l| !l.is_empty()) {
        let colon = line.iter().position(|c| *c == b':')?;
        let value = super::trim(&line[colon + 1..]);
        if &line[..colon] == b"ID" {
            let id = number(value)?;
            timers.push(Timer { id, signo: 0, sival_ptr: 0, notify: 0, notify_thread: None, clock: 0 });
            continue;
        }
        let timer = timers.last_mut()?;
        match &line[..colon] {
            b"signal" => {
                // `14/0000000000000000`
                let slash = value.iter().position(|c| *c == b'/')?;
                timer.signo = number(&value[..slash])?;
                let pointer = &value[slash + 1..];
                timer.sival_ptr = if pointer == b"(null)" { 0 } else { hex(pointer)? };
            }
            b"notify" => {
                // `signal/pid.1234`, `none/tid.12`
                let slash = value.iter().position(|c| *c == b'/')?;
                timer.notify = match &value[..slash] {
                    b"signal" => libc::SIGEV_SIGNAL as u32,
                    b"none" => libc::SIGEV_NONE as u32,
                    b"thread" => libc::SIGEV_THREAD as u32,
                    _ => return None,
                };
                let whom = &value[slash + 1..];
                timer.notify_thread =
                    whom.strip_prefix(b"tid.").map(|tid| number(tid).ok_or(())).transpose().ok()?;
            }
            b"ClockID" => timer.clock = number(value)?,
            _ => {}
        }
    }
    Some(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read_whole() {
        let text = b"ID: 0\nsignal: 14/0000000000000000\nnotify: signal/pid.2634\nClockID: 0\n\
            ID: 7\nsignal: 34/00007ffe12345678\nnotify: signal/tid.2640\nClockID: -6\n";
        assert_eq!(
            parse(text).unwrap(),
            [
                Timer { id: 0, signo: 14, sival_ptr: 0, notify: 0, notify_thread: None, clock: 0 },
                Timer {
                    id: 7,
                    signo: 34,
                    sival_ptr: 0x7ffe_1234_5678,
                    notify: 0,
                    notify_thread: Some(2640),
                    clock: -6
                },
            ]
        );
        assert_eq!(parse(b"").unwrap(), []);
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(parse(b"signal: 14/0\n"), None);
        assert_eq!(parse(b"ID: 1\nsignal: 14\n"), None);
        assert_eq!(parse(b"ID: 1\nnotify: odd/pid.1\n"), None);
        assert_eq!(parse(b"ID: 1\nnotify: none/tid.x\n"), None);
    }
}
