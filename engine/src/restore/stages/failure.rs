//! The first error of a restore, as it crosses from the task that met it to the engine.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use restorer::{Stage, report, shared::ERROR_TEXT};

use super::{Area, LOOK};
use crate::error::{Error, Kind};
use crate::pstree::VirtPid;

impl Area {
    /// The first error, once somebody has failed.
    pub fn failure(&self) -> Error {
        let error = &self.shared().error;
        let deadline = Instant::now() + LOOK;
        while !error.is_written() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        if !error.is_written() {
            return Error::host("a task failed without saying why");
        }
        self.read_error()
    }

    /// What a task says of its end, if it was that which made `consequence`.
    pub fn why(&self, consequence: Error) -> Error {
        if self.failed() { self.failure() } else { consequence }
    }

    fn read_error(&self) -> Error {
        let slot = &self.shared().error;
        let mut buf = [0u8; ERROR_TEXT];
        let len = slot.text(&mut buf);
        let text = String::from_utf8_lossy(&buf[..len]).into_owned();
        let errno = slot.errno.load(Ordering::Relaxed);
        let kind = slot.kind.load(Ordering::Relaxed);
        if kind != 0 {
            return Error::new(kind_of(kind, text, errno));
        }
        let number = |n: &AtomicU32| n.load(Ordering::Relaxed);
        let (a, b) = (slot.a.load(Ordering::Relaxed), slot.b.load(Ordering::Relaxed));
        let object = report::Object::text(number(&slot.object)).unwrap_or("something");
        let call = report::Call::text(number(&slot.call)).unwrap_or("a call");
        let (pid, tid) = (slot.pid.load(Ordering::Relaxed), slot.tid.load(Ordering::Relaxed));
        let stage = Stage::from_word(number(&slot.stage)).name();
        // A name says more than numbers.
        let object = match text.as_str() {
            "" => format!("{object} {a:#x}, {b:#x}"),
            name => format!("{object} {name:?}"),
        };
        Error::sys(call, errno)
            .during(object)
            .during(format!("task {pid}, thread {tid}, restorer at {stage}"))
    }

    /// Makes `error` of the task `pid` the error of the restore, unless there is one already, and stops all.
    pub fn fail(&self, pid: VirtPid, error: &Error) {
        let slot = &self.shared().error;
        if slot.claim() {
            slot.stage.store(self.shared().stage.load(Ordering::Relaxed), Ordering::Relaxed);
            slot.pid.store(pid.0, Ordering::Relaxed);
            slot.errno.store(error.errno().unwrap_or(0), Ordering::Relaxed);
            slot.kind.store(tag_of(error.kind()), Ordering::Relaxed);
            slot.set_text(text_of(error).as_bytes());
            slot.publish();
        }
        self.stop();
    }
}

fn tag_of(kind: &Kind) -> u32 {
    match kind {
        Kind::Unsupported(_) => 1,
        Kind::Image(_) => 2,
        Kind::Host(_) => 3,
        Kind::Usage(_) => 4,
        Kind::Bug(_) => 5,
        _ => 6,
    }
}

/// The whole line, without what [`kind_of`] will add again.
fn text_of(error: &Error) -> String {
    let text = error.to_string();
    match error.kind() {
        Kind::Bug(_) => text.replacen("internal error: ", "", 1),
        _ => text,
    }
}

fn kind_of(tag: u32, text: String, errno: i32) -> Kind {
    match tag {
        1 => Kind::Unsupported(text),
        2 => Kind::Image(text),
        3 => Kind::Host(text),
        4 => Kind::Usage(text),
        5 => Kind::Bug(text),
        _ => Kind::Told { text, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Context, SysContext};

    #[test]
    fn an_error_crosses_as_it_was() {
        let area = Area::new(3).unwrap();
        let e = Err::<(), _>(nix::errno::Errno::ENOENT)
            .call("openat")
            .during(|| "task 7 (x)".into())
            .unwrap_err();
        area.fail(VirtPid(7), &e);
        area.fail(VirtPid(8), &Error::bug("a consequence"));
        let got = area.await_all(Stage::Restore, || Ok(())).unwrap_err();
        assert_eq!(got.to_string(), e.to_string());
        assert_eq!(got.errno(), Some(libc::ENOENT));
        assert!(area.wait_open(Stage::Forking).is_err());
        assert!(area.open(Stage::Restore, 1).is_err());
    }

    #[test]
    fn an_error_of_the_blob_is_spelled_out() {
        let area = Area::new(1).unwrap();
        let slot = &area.shared().error;
        assert!(slot.claim());
        slot.call.store(report::Call::Mremap as u32, Ordering::Relaxed);
        slot.object.store(report::Object::Vma as u32, Ordering::Relaxed);
        slot.errno.store(libc::ENOMEM, Ordering::Relaxed);
        slot.pid.store(9, Ordering::Relaxed);
        slot.a.store(0x1000, Ordering::Relaxed);
        slot.publish();
        let text = area.failure().to_string();
        assert!(text.contains("task 9") && text.contains("mremap") && text.contains("0x1000"), "{text}");
        slot.object.store(report::Object::Label as u32, Ordering::Relaxed);
        slot.set_text(b"some_t");
        let text = area.failure().to_string();
        assert!(text.contains("the security label \"some_t\": mremap"), "{text}");
    }
}
