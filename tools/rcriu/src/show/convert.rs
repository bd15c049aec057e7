//! Images to JSON and back, as `crit decode`, `crit show` and `crit encode` do it.

use std::{
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    path::Path,
};

use anyhow::{Context, Result, bail};
use rcriu_images::{
    Cause,
    frame::EntryReader,
    json::{self, Style as Form},
};

/// Name of standard input in messages.
const STDIN: &str = "standard input";

/// Prints an image as JSON. On standard output a newline follows, in a file none does, as with crit.
pub fn decode(input: Option<&Path>, output: Option<&Path>, form: Form) -> Result<()> {
    let name = input.map_or_else(|| STDIN.into(), |path| path.display().to_string());
    let source: Box<dyn Read> = match input {
        Some(path) => Box::new(BufReader::new(File::open(path).with_context(|| format!("open {name}"))?)),
        None => Box::new(io::stdin().lock()),
    };
    let len = input.and_then(|path| fs::metadata(path).ok()).filter(fs::Metadata::is_file).map(|m| m.len());
    let mut reader = EntryReader::new(source, &name, len);
    write_to(output, |out| {
        json::decode(&mut reader, &mut &mut *out, form).map_err(|e| match e.cause() {
            Cause::UnknownMagic(_) => anyhow::Error::new(e)
                .context("no image with entries: memory pages and data of other programs have none"),
            _ => e.into(),
        })?;
        if output.is_none() {
            writeln!(out)?;
        }
        Ok(())
    })
}

/// Makes an image of JSON.
pub fn encode(input: Option<&Path>, output: Option<&Path>) -> Result<()> {
    let name = input.map_or_else(|| STDIN.into(), |path| path.display().to_string());
    let mut text = Vec::new();
    match input {
        Some(path) => text = fs::read(path).with_context(|| format!("open {name}"))?,
        None => _ = io::stdin().lock().read_to_end(&mut text)?,
    }
    let word = text.first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
    if json::is_image_magic(word) {
        bail!("{name} is an image already; JSON is wanted");
    }
    let parsed = json::parse(&text).with_context(|| name.clone())?;
    write_to(output, |out| Ok(json::encode(&parsed, &name, &mut &mut *out)?))
}

/// Writes to a file, which disappears on failure, or to standard output.
fn write_to(output: Option<&Path>, f: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let Some(path) = output else {
        let mut out = BufWriter::new(io::stdout().lock());
        f(&mut out)?;
        return Ok(out.flush()?);
    };
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut out = BufWriter::new(file);
    let written = f(&mut out).and_then(|()| out.flush().with_context(|| format!("write {}", path.display())));
    if written.is_err() && fs::symlink_metadata(path).is_ok_and(|m| m.is_file()) {
        // Half a file is worse than none; that it cannot be removed is not the error to report.
        let _ = fs::remove_file(path);
    }
    written
}
