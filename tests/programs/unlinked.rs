//! Files whose name is gone but which are open: content, sharing, holes, directories, names taken again.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use anyhow::Context;

use crate::kit::crew::member;
use crate::kit::{Check, rest, same, write};

fn open(name: &str) -> anyhow::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(name).with_context(|| name.to_string())
}

/// See the module.
pub fn run(_: &[String]) -> Check {
    let mut one = open("one")?;
    one.write_all(b"content of one").context("write")?;
    let mut again = File::open("one").context("open")?;
    again.seek(SeekFrom::Start(8)).context("seek")?;
    fs::set_permissions("one", fs::Permissions::from_mode(0o640)).context("chmod")?;
    std::os::unix::fs::chown("one", Some(7), Some(8)).context("chown")?;
    fs::remove_file("one").context("unlink")?;
    // The name is taken by another file.
    let mut old = open("taken")?;
    old.write_all(b"the old one").context("write")?;
    fs::remove_file("taken").context("unlink")?;
    write("taken", b"the new one")?;
    // Holes stay holes.
    let sparse = open("sparse")?;
    sparse.write_all_at(b"start", 0).context("write")?;
    sparse.write_all_at(b"end", 700 << 10).context("write")?;
    fs::remove_file("sparse").context("unlink")?;
    let blocks = sparse.metadata().context("stat")?.blocks();
    let empty = open("empty")?;
    fs::remove_file("empty").context("unlink")?;
    // Shared with a member, which has its own descriptor of the same description.
    let mut shared = open("shared")?;
    shared.write_all(b"0123456789").context("write")?;
    shared.seek(SeekFrom::Start(2)).context("seek")?;
    fs::remove_file("shared").context("unlink")?;
    let child = {
        let shared = shared.try_clone().context("dup")?;
        member(move || {
            rest()?;
            let mut shared = shared;
            let mut two = [0; 2];
            shared.read_exact(&mut two).context("read")?;
            same("the child's read of a shared removed file", &two, b"23")
        })?
    };
    fs::create_dir("dir").context("mkdir")?;
    let dir = File::open("dir").context("open")?;
    fs::remove_dir("dir").context("rmdir")?;
    let listing = || -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(".").context("readdir")? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    };
    let before = listing()?;
    rest()?;
    same("names in the folder", listing()?, before)?;
    let m = one.metadata().context("stat")?;
    same(
        "mode, owner, links of a removed file",
        (m.mode() & 0o777, m.uid(), m.gid(), m.nlink()),
        (0o640, 7, 8, 0),
    )?;
    let mut text = String::new();
    again.read_to_string(&mut text).context("read")?;
    same("rest of a removed file", text.as_str(), "of one")?;
    one.write_all_at(b"CONTENT", 0).context("write")?;
    let mut seven = [0; 7];
    again.read_exact_at(&mut seven, 0).context("read")?;
    same("one removed file under two descriptors", &seven, b"CONTENT")?;
    text.clear();
    old.rewind().context("seek")?;
    old.read_to_string(&mut text).context("read")?;
    same("removed file whose name was taken", text.as_str(), "the old one")?;
    same("the file that took the name", fs::read("taken").context("read")?, b"the new one".to_vec())?;
    let mut end = [0; 3];
    sparse.read_exact_at(&mut end, 700 << 10).context("read")?;
    same("end of a file with a hole", &end, b"end")?;
    let now = sparse.metadata().context("stat")?.blocks();
    same(&format!("blocks of a file with a hole stay few ({now}, were {blocks})"), now <= blocks + 16, true)?;
    same("length of an empty removed file", empty.metadata().context("stat")?.len(), 0)?;
    same("links of a removed directory", dir.metadata().context("stat")?.nlink(), 0)?;
    child.verify()?;
    same("position moved by the child", shared.stream_position().context("seek")?, 4)
}
