//! What can be wrong with an image, and where: every error names the file, and the entry and byte
//! offset when there is one.

use std::{fmt, io};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An image that cannot be read or written.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    image: String,
    entry: Option<usize>,
    offset: Option<u64>,
    cause: Cause,
}

/// Why.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error("there is no such image")]
    Missing,
    #[error("{call}: {error}")]
    Sys { call: &'static str, error: io::Error },
    #[error("wrong magic {found:#010x}, expected {expected:#010x}")]
    Magic { found: u32, expected: u32 },
    #[error("unknown magic {0:#x}")]
    UnknownMagic(u32),
    #[error("truncated: {want} bytes wanted, {left} left")]
    Truncated { want: u64, left: u64 },
    #[error("there is no entry")]
    Empty,
    #[error("{0}")]
    Decode(prost::DecodeError),
    #[error("required field {0} is missing")]
    Required(String),
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// An error about the image as a whole.
    pub fn new(image: impl Into<String>, cause: Cause) -> Self {
        Self(Box::new(Inner { image: image.into(), entry: None, offset: None, cause }))
    }

    /// A failed system call on the image.
    pub fn sys(image: impl Into<String>, call: &'static str, error: impl Into<io::Error>) -> Self {
        Self::new(image, Cause::Sys { call, error: error.into() })
    }

    /// Content that contradicts itself or the rest of the set.
    pub fn invalid(image: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::new(image, Cause::Invalid(reason.into()))
    }

    /// Adds where in the file: entries count from 0, `offset` is that of the entry's length word.
    pub fn at(mut self, entry: usize, offset: u64) -> Self {
        (self.0.entry, self.0.offset) = (Some(entry), Some(offset));
        self
    }

    /// File name of the image.
    pub fn image(&self) -> &str {
        &self.0.image
    }

    /// Index of the entry, from 0.
    pub fn entry(&self) -> Option<usize> {
        self.0.entry
    }

    /// Byte offset of that entry.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// The kernel's error number, when a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match &self.0.cause {
            Cause::Sys { error, .. } => error.raw_os_error(),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.image)?;
        if let Some(entry) = self.0.entry {
            write!(f, ", entry {entry}")?;
        }
        if let Some(offset) = self.0.offset {
            write!(f, ", offset {offset}")?;
        }
        write!(f, ": {}", self.0.cause)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.cause {
            Cause::Sys { error, .. } => Some(error),
            Cause::Decode(error) => Some(error),
            _ => None,
        }
    }
}
