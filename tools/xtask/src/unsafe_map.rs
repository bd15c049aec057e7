//! Unsafe code has an address: a few folders and files, each file with its reasons at the top.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::root;

/// Where unsafe code may live: folders end in a slash.
const FENCE: &[&str] = &[
    "engine/src/sys/",
    "engine/src/arch/",
    "engine/src/infect/",
    "engine/src/restore/fork.rs",
    "engine/src/restore/handoff.rs",
    "engine/src/restore/stages.rs",
    "parasite/",
    "restorer/",
    "tests/",
    "kernel-matrix/",
];

/// Number of `unsafe` words in code: comments, strings and lint names do not count.
fn unsafe_words(text: &str) -> usize {
    let mut count = 0;
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or("");
        // A string is whatever stands between quotation marks of one line.
        let code: String = code.split('"').step_by(2).collect::<Vec<_>>().join(" ");
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        count += code.split(|c: char| !is_word(c)).filter(|word| *word == "unsafe").count();
    }
    count
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            sources(&path, found)?;
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    Ok(())
}

pub fn run() -> Result<()> {
    let root = root();
    let mut files = Vec::new();
    sources(&root, &mut files)?;
    files.sort();
    let mut strays = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let words = unsafe_words(&text);
        if words == 0 {
            continue;
        }
        let name = file.strip_prefix(&root).unwrap_or(&file).display().to_string();
        println!("{words:5}  {name}");
        if !FENCE.iter().any(|place| name == *place || (place.ends_with('/') && name.starts_with(place))) {
            strays.push(format!("{name} is outside the places for unsafe code"));
        }
        if !text.lines().any(|l| l.starts_with("//! # Safety")) {
            strays.push(format!("{name} has no `# Safety` section at its top"));
        }
    }
    if strays.is_empty() { Ok(()) } else { bail!("{}", strays.join("\n")) }
}

#[cfg(test)]
mod tests {
    use super::unsafe_words;

    #[test]
    fn only_code_counts() {
        assert_eq!(unsafe_words("// unsafe\nlet s = \"unsafe { }\"; #![deny(unsafe_code)]"), 0);
        assert_eq!(unsafe_words("unsafe { a() } // unsafe\nunsafe fn b() {}"), 2);
    }
}
