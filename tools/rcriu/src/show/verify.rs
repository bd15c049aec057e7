//! The integrity check: one line per finding, exit code 1 if a restore would fail.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Result;
use rcriu_images::{
    ImageDir,
    check::check,
    set::{Finding, Severity},
};
use serde::Serialize;

use super::{
    report::{FORMAT, FindingReport},
    style::{self, Colour, Style},
};

/// The result in JSON; see [`super::report`] for how stable it is.
#[derive(Serialize)]
struct Verified {
    format: u32,
    dir: String,
    sound: bool,
    findings: Vec<FindingReport>,
}

pub fn verify(dir: &ImageDir, json: bool, style: Style, out: &mut impl Write) -> Result<ExitCode> {
    let findings = check(dir)?;
    let sound = !findings.iter().any(|f| f.severity == Severity::Error);
    if json {
        let findings = findings.iter().map(FindingReport::from).collect();
        let verified = Verified { format: FORMAT, dir: dir.path().display().to_string(), sound, findings };
        serde_json::to_writer_pretty(&mut *out, &verified)?;
        writeln!(out)?;
    } else {
        text(dir, &findings, sound, style, out)?;
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(
    dir: &ImageDir,
    findings: &[Finding],
    sound: bool,
    style: Style,
    out: &mut impl Write,
) -> io::Result<()> {
    for finding in findings {
        let (colour, what) = match finding.severity {
            Severity::Error => (Colour::Bad, "error"),
            Severity::Warning => (Colour::Doubt, "warning"),
        };
        writeln!(out, "{}: {}", style.paint(colour, what), style::printable(&finding.to_string()))?;
    }
    let dir = style::printable(&dir.path().display().to_string());
    if sound {
        writeln!(out, "{dir}: {}", style.paint(Colour::Good, "sound"))
    } else {
        let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
        let text = if errors == 1 { "1 error".into() } else { format!("{errors} errors") };
        writeln!(out, "{dir}: {}", style.paint(Colour::Bad, &text))
    }
}
