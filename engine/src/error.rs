//! One error type for the whole engine: what failed, on which object, why, and what to do.
//!
//! Context is added once, where an object becomes known, with [`Context::during`]; nothing is
//! printed on the way up. The front end prints one line: the contexts from the outside in, the
//! cause, and the remedy when there is one.

use std::{borrow::Cow, fmt};

/// Result of everything in the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in a form the caller may act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// State that cannot be dumped or restored; the text names the resource.
    Unsupported(String),
    /// A system call failed.
    Sys {
        /// Name of the call, with its object if that says more than the context does.
        call: Cow<'static, str>,
        /// `errno` as the kernel gave it.
        errno: i32,
    },
    /// An image is missing, damaged or does not fit; the text names file, entry and offset.
    Image(String),
    /// The host does not offer what the operation needs (a pid in use, a file gone, a feature).
    Host(String),
    /// A task ended while it was worked on.
    TaskDied(i32),
    /// The error of a task being restored, as it told it; complete.
    Told {
        /// The whole line.
        text: String,
        /// `errno` of the failed call, 0 if none failed.
        errno: i32,
    },
    /// The caller asked for something that makes no sense.
    Usage(String),
    /// A signal asked us to stop.
    Interrupted(i32),
    /// The deadline of the whole operation passed.
    TimedOut,
    /// Our own mistake.
    Bug(String),
}

/// An error with the objects it concerns and, when known, what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What went wrong. Boxed: a `Result` must stay small.
    inner: Box<Inner>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inner {
    kind: Kind,
    /// Innermost first.
    during: Vec<String>,
    remedy: Option<String>,
}

impl Error {
    /// An error of `kind` without context.
    pub fn new(kind: Kind) -> Self {
        Error { inner: Box::new(Inner { kind, during: Vec::new(), remedy: None }) }
    }
    /// A refusal: `what` names the resource and why it cannot be kept.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported(what.into()))
    }
    /// A damaged, missing or mismatched image.
    pub fn image(what: impl Into<String>) -> Self {
        Self::new(Kind::Image(what.into()))
    }
    /// The host lacks something.
    pub fn host(what: impl Into<String>) -> Self {
        Self::new(Kind::Host(what.into()))
    }
    /// A wrong request.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage(what.into()))
    }
    /// A mistake of ours.
    pub fn bug(what: impl Into<String>) -> Self {
        Self::new(Kind::Bug(what.into()))
    }
    /// A failed system call with an explicit `errno`.
    pub fn sys(call: impl Into<Cow<'static, str>>, errno: i32) -> Self {
        Self::new(Kind::Sys { call: call.into(), errno })
    }
    /// A failed system call, `errno` taken from an [`std::io::Error`].
    pub fn io(call: impl Into<Cow<'static, str>>, e: &std::io::Error) -> Self {
        match e.raw_os_error() {
            Some(errno) => Self::sys(call, errno),
            None => Self::host(format!("{}: {e}", call.into())),
        }
    }
    /// Adds what the user can do about it.
    #[must_use]
    pub fn remedy(mut self, what: impl Into<String>) -> Self {
        self.inner.remedy.get_or_insert_with(|| what.into());
        self
    }
    /// Adds the object that was worked on.
    #[must_use]
    pub fn during(mut self, what: impl Into<String>) -> Self {
        self.inner.during.push(what.into());
        self
    }
    /// What went wrong.
    pub fn kind(&self) -> &Kind {
        &self.inner.kind
    }
    /// The `errno` behind it, if a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match self.inner.kind {
            Kind::Sys { errno, .. } => Some(errno),
            Kind::Told { errno, .. } => Some(errno).filter(|e| *e != 0),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for context in self.inner.during.iter().rev() {
            write!(f, "{context}: ")?;
        }
        match &self.inner.kind {
            Kind::Unsupported(s) | Kind::Image(s) | Kind::Host(s) | Kind::Usage(s) => f.write_str(s)?,
            Kind::Sys { call, errno } => {
                write!(f, "{call}: {}", std::io::Error::from_raw_os_error(*errno))?;
            }
            Kind::Told { text, .. } => f.write_str(text)?,
            Kind::TaskDied(pid) => write!(f, "task {pid} ended meanwhile")?,
            Kind::Interrupted(sig) => write!(f, "interrupted by signal {sig}")?,
            Kind::TimedOut => f.write_str("the time given with --timeout is over")?,
            Kind::Bug(s) => write!(f, "internal error: {s}")?,
        }
        if let Some(remedy) = &self.inner.remedy {
            write!(f, " ({remedy})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Failed system calls on images keep their `errno`; everything else is about the image's content.
impl From<rcriu_images::Error> for Error {
    fn from(e: rcriu_images::Error) -> Self {
        match e.cause() {
            rcriu_images::Cause::Sys { call, error } => Self::io(*call, error).during(e.image()),
            _ => Self::image(e.to_string()),
        }
    }
}

/// Adds context to results on their way up.
pub trait Context<T> {
    /// Names the object that was worked on; evaluated only on failure.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| e.into().during(what()))
    }
}

/// Names the system call whose failure this is.
pub trait SysContext<T> {
    /// Turns an errno-carrying error into [`Kind::Sys`] with the name of the call.
    fn call(self, name: impl Into<Cow<'static, str>>) -> Result<T>;
}

impl<T> SysContext<T> for nix::Result<T> {
    fn call(self, name: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|e| Error::sys(name, e as i32))
    }
}

impl<T> SysContext<T> for std::io::Result<T> {
    fn call(self, name: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|e| Error::io(name, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_names_object_cause_and_remedy() {
        let e = Err::<(), _>(nix::errno::Errno::ENOENT)
            .call("openat")
            .during(|| "fd 7".into())
            .during(|| "task 12".into())
            .map_err(|e| e.remedy("create it"))
            .unwrap_err();
        assert_eq!(
            e.to_string(),
            "task 12: fd 7: openat: No such file or directory (os error 2) (create it)"
        );
    }
}
