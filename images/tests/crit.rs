//! Compares the human form with that of the original image tool, byte for byte, on images of every kind.
//!
//! Runs when `CRIT` holds a command that starts the tool (in the environment it needs, `PYTHONPATH` for
//! one). If `IMAGE_SETS` names a folder, the images below it are compared as well.

mod common;

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use rcriu_images::{
    dir::reader_of,
    json::{self, Style},
};

fn images_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            images_below(&path, found);
            continue;
        }
        let head = fs::read(&path).unwrap();
        let word = |at: usize| head.get(at..at + 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()));
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let known = rcriu_images::ImageKind::from_file_name(name).is_some();
        if known && json::is_image_magic(word(0)) {
            found.push(path);
        }
    }
}

fn crit(args: &[&OsStr]) -> Output {
    let line = env::var("CRIT").unwrap();
    let mut words = line.split_whitespace();
    Command::new(words.next().unwrap()).args(words).args(args).output().unwrap()
}

fn ours(path: &Path, style: Style) -> Vec<u8> {
    let mut reader = reader_of(File::open(path).unwrap(), path.to_string_lossy()).unwrap();
    let mut out = Vec::new();
    json::decode(&mut reader, &mut out, style).unwrap();
    out
}

/// Kinds the tool cannot show at all, or only in part: what it prints says nothing.
const NOT_CRITS: &[&str] = &[
    // It knows no handler for them.
    "BINFMT_MISC",
    "PIDFD",
    "SIGNAL",
];

/// Segments whose content is in a pagemap have no payload, but the tool skips over one.
fn swallows_entries(path: &Path, plain: &[u8]) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.starts_with("ipcns-shm") && plain.windows(12).any(|w| w == b"\"in_pagemaps")
}

#[test]
fn prints_and_reads_what_crit_does() {
    if env::var("CRIT").is_err() {
        println!("SKIP: CRIT is not set");
        return;
    }
    let mut images = Vec::new();
    if let Ok(sets) = env::var("IMAGE_SETS") {
        images_below(Path::new(&sets), &mut images);
    }
    let made = tempfile::tempdir().unwrap();
    for row in common::kinds().filter(|row| !NOT_CRITS.contains(&row.tag)) {
        for seed in 0..3 {
            fs::create_dir_all(made.path().join(seed.to_string())).unwrap();
            let path = made.path().join(seed.to_string()).join(row.kind.file_name(1));
            let mut random = common::Random::plain(u64::from(row.magic) + seed);
            fs::write(&path, common::image(row.kind, 6, &mut random)).unwrap();
            images.push(path);
        }
    }
    images.sort();
    let mut bad = Vec::new();
    for path in &images {
        let image = fs::read(path).unwrap();
        let plain = ours(path, Style::default());
        let pretty = ours(path, Style { pretty: true, no_payload: false });
        for text in [&plain, &pretty] {
            let mut back = Vec::new();
            json::encode(&json::parse(text).unwrap(), "input", &mut back).unwrap();
            if back != image {
                bad.push(format!("{}: encode(decode) differs", path.display()));
            }
        }
        if swallows_entries(path, &plain) {
            continue;
        }
        let path_arg = path.as_os_str();
        let short = ours(path, Style { pretty: true, no_payload: true });
        let compare: [(&[&OsStr], &[u8]); 3] = [
            (&["decode".as_ref(), "-i".as_ref(), path_arg], &plain),
            (&["show".as_ref(), path_arg], &pretty),
            (&["show".as_ref(), path_arg, "--nopl".as_ref()], &short),
        ];
        let (json_path, back_path) = (made.path().join("json"), made.path().join("back"));
        fs::write(&json_path, &plain).unwrap();
        let encoded =
            crit(&["encode".as_ref(), "-i".as_ref(), json_path.as_ref(), "-o".as_ref(), back_path.as_ref()]);
        if !encoded.status.success() {
            let why = String::from_utf8_lossy(&encoded.stderr);
            println!("the tool cannot encode {}: {}", path.display(), why.lines().last().unwrap_or(""));
        } else if fs::read(&back_path).unwrap() != image {
            bad.push(format!("{}: the tool encodes our form to something else", path.display()));
        }
        for (args, text) in compare {
            let theirs = crit(args);
            if !theirs.status.success() {
                let why = String::from_utf8_lossy(&theirs.stderr);
                println!("the tool fails: {:?}: {}", args, why.lines().last().unwrap_or(""));
            } else if theirs.stdout.strip_suffix(b"\n") != Some(text) {
                bad.push(format!("{args:?} differs"));
            }
        }
    }
    println!("{} images compared", images.len());
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
