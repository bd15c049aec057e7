//! What is wrong with a set.

use std::fmt;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// Restoring works, but something is not as it should be.
    Warning,
    /// The set cannot be restored, or not in full.
    Error,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Finding {
    pub severity: Severity,
    /// File name of the image it was found in.
    pub image: String,
    pub text: String,
}

impl Finding {
    pub fn error(image: impl Into<String>, text: impl Into<String>) -> Self {
        Self { severity: Severity::Error, image: image.into(), text: text.into() }
    }

    pub fn warning(image: impl Into<String>, text: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, image: image.into(), text: text.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.image, self.text)
    }
}
