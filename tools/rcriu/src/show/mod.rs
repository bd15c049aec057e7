//! The command show: what is in images, for people and for programs.
//!
//! ```text
//! show DIR                the overview of a set
//! show DIR --check        whether the set holds together
//! show FILE.img           the entries of one image, as crit shows them
//! show x DIR ps           crit's explorers
//! show --decode, --encode crit's conversions
//! ```
//! Nothing here changes an image.

mod convert;
mod explore;
mod overview;
mod report;
mod style;
mod verify;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Command, FromArgMatches};
use rcriu_images::{ImageDir, json::Style as Form};

use self::{explore::What, style::Style};

/// Arguments of the command.
#[derive(Debug, Clone, Default, Args)]
pub struct ShowArgs {
    /// A folder of images or one image; `x` for crit's explorers
    #[arg(value_name = "PATH")]
    words: Vec<OsString>,
    /// Print for programs: the overview in a stable form, an image without pretty forms of numbers
    #[arg(long)]
    json: bool,
    /// Say whether the set holds together; exit code 1 if it does not
    #[arg(long, conflicts_with_all = ["decode", "encode"])]
    check: bool,
    /// Read all pages to count those that are zero and those that are equal
    #[arg(long)]
    pages: bool,
    /// Convert an image to JSON
    #[arg(long, conflicts_with = "encode")]
    decode: bool,
    /// Convert JSON to an image
    #[arg(long)]
    encode: bool,
    /// Where --decode and --encode read (standard input)
    #[arg(short = 'i', long = "in", value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where --decode and --encode write (standard output)
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    output: Option<PathBuf>,
    /// On many lines, numbers in the form of their field
    #[arg(long)]
    pretty: bool,
    /// Sizes in place of payloads
    #[arg(long)]
    nopl: bool,
}

/// Pages of sets up to this size are counted unasked, in bytes.
const CENSUS_LIMIT: u64 = 256 << 20;

/// Does what the words after `show` ask for.
pub fn command(words: &[OsString]) -> ExitCode {
    let parser = ShowArgs::augment_args(Command::new("rcriu show").no_binary_name(true).term_width(80))
        .about("Print what is in images")
        .after_help("Explorers: rcriu show x DIR ps|fds|mems|rss");
    let args = match parser.try_get_matches_from(words).and_then(|m| ShowArgs::from_arg_matches(&m)) {
        Ok(args) => args,
        Err(e) => {
            // Help and mistakes alike; a broken pipe is nobody's concern.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(args) {
        Ok(code) => code,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rcriu show: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints to standard output.
///
/// # Errors
/// Images that cannot be read, output that cannot be written.
pub fn run(args: ShowArgs) -> Result<ExitCode> {
    let form = Form { pretty: args.pretty, no_payload: args.nopl };
    if args.encode {
        convert::encode(args.input.as_deref().or(single(&args.words)?), args.output.as_deref())?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.decode {
        let input = args.input.as_deref().or(single(&args.words)?);
        convert::decode(input, args.output.as_deref(), form)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let [x, first, second] = &args.words[..]
        && x == "x"
    {
        let (what, dir) = match (What::parse(first), What::parse(second)) {
            (_, Some(what)) => (what, first),
            (Some(what), None) => (what, second),
            _ => bail!("explorers are ps, fds, mems and rss: rcriu show x DIR ps"),
        };
        let mut out = io::BufWriter::new(io::stdout().lock());
        explore::explore(&ImageDir::open(dir)?, what, &mut out)?;
        out.flush()?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(path) = single(&args.words)? else { bail!("a folder of images or an image is wanted") };
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    if !meta.is_dir() {
        let form = Form { pretty: !args.json, ..form };
        convert::decode(Some(path), None, form)?;
        return Ok(ExitCode::SUCCESS);
    }
    folder(path, &args)
}

fn folder(path: &std::path::Path, args: &ShowArgs) -> Result<ExitCode> {
    let dir = ImageDir::open(path)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let style = Style::of_stdout();
    let code = if args.check {
        verify::verify(&dir, args.json, style, &mut out)?
    } else {
        let limit = if args.pages { u64::MAX } else { CENSUS_LIMIT };
        let report = report::Report::gather(&dir, limit)?;
        if args.json {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        } else {
            overview::print(&report, style, &mut out)?;
        }
        ExitCode::SUCCESS
    };
    out.flush()?;
    Ok(code)
}

fn single(words: &[OsString]) -> Result<Option<&std::path::Path>> {
    match words {
        [] => Ok(None),
        [one] => Ok(Some(one.as_ref())),
        [_, second, ..] => bail!("one path at a time, not also {}", second.display()),
    }
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|cause| {
        let errno = match cause.downcast_ref::<rcriu_images::Error>() {
            Some(e) => e.errno(),
            None => cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error),
        };
        errno == Some(libc::EPIPE)
    })
}

#[cfg(test)]
mod tests;
