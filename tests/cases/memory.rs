//! Memory: private, shared, of files, copy-on-write.

use rcriu_tests::Case;

use crate::kinds::{Kind, all, kind};

pub const KINDS: &[Kind] = &[
    kind("private memory keeps content, protections, advice", "private-memory", &[]),
    kind("file mappings keep content and file", "file-memory", &[]),
    kind("pages shared since a fork are still shared", "cow", &[]),
    kind("shared anonymous memory stays shared", "shared-memory", &[]),
    kind("stack, brk, arguments stay and grow", "stack", &[]),
    kind("64 MiB without pattern are kept", "random-memory", &["64"]),
    kind("two thousand mappings stay apart", "many-mappings", &["2000"]),
];

pub fn cases() -> Vec<Case> {
    all("memory", KINDS)
}
