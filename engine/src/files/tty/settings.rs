//! Line settings, window size and owner, between kernel and images.

use std::os::fd::BorrowedFd;

use nix::unistd::{Gid, Uid, fchown};
use rcriu_images::pb;

use crate::{
    error::{Error, Result, SysContext},
    sys::{
        signal,
        tty::{self, Termios, Winsize},
    },
};

/// Control characters a line has, and words that images have for them.
const CHARACTERS: usize = 19;

pub(super) fn to_image(termios: &Termios) -> pb::TermiosEntry {
    pb::TermiosEntry {
        c_iflag: termios.iflag,
        c_oflag: termios.oflag,
        c_cflag: termios.cflag,
        c_lflag: termios.lflag,
        c_line: termios.line.into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: pack(&termios.cc),
    }
}

/// The control characters as images have them: CRIU copies the bytes into the words as they lie in memory, four into
/// each, and leaves the other words as they are.
fn pack(characters: &[u8; CHARACTERS]) -> Vec<u32> {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    let mut words: Vec<u32> = characters.chunks(4).map(word).collect();
    words.resize(CHARACTERS, 0);
    words
}

pub(super) fn from_image(entry: &pb::TermiosEntry) -> Result<Termios> {
    if entry.c_cc.len() < CHARACTERS {
        return Err(Error::image(format!("tty-info.img: {} control characters", entry.c_cc.len())));
    }
    let mut cc = [0; CHARACTERS];
    for (to, from) in cc.iter_mut().zip(entry.c_cc.iter().flat_map(|word| word.to_le_bytes())) {
        *to = from;
    }
    Ok(Termios {
        iflag: entry.c_iflag,
        oflag: entry.c_oflag,
        cflag: entry.c_cflag,
        lflag: entry.c_lflag,
        line: entry.c_line as u8,
        cc,
    })
}

pub(super) fn size_to_image(size: Winsize) -> pb::WinsizeEntry {
    pb::WinsizeEntry {
        ws_row: size.row.into(),
        ws_col: size.col.into(),
        ws_xpixel: size.xpixel.into(),
        ws_ypixel: size.ypixel.into(),
    }
}

pub(super) fn size_from_image(entry: &pb::WinsizeEntry) -> Winsize {
    Winsize {
        row: entry.ws_row as u16,
        col: entry.ws_col as u16,
        xpixel: entry.ws_xpixel as u16,
        ypixel: entry.ws_ypixel as u16,
    }
}

/// Line settings; size and owner too unless the terminal is somebody else's.
pub(super) fn settle(tty: BorrowedFd<'_>, info: &pb::TtyInfoEntry, own: bool) -> Result<()> {
    let Some(termios) = &info.termios else { return Ok(()) };
    if own {
        settle_owner(tty, info)?;
        if let Some(size) = &info.winsize {
            tty::set_winsize(tty, size_from_image(size))?;
        }
    }
    signal::without_sigttou(|| tty::set_termios(tty, from_image(termios)?))
}

pub(super) fn settle_owner(tty: BorrowedFd<'_>, info: &pb::TtyInfoEntry) -> Result<()> {
    if let (Some(uid), Some(gid)) = (info.uid, info.gid) {
        fchown(tty, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).call("fchown")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_lie_as_in_criu_s_images() {
        // As CRIU 4.2 writes a new pseudo-terminal; what follows the characters is left over memory.
        let mut words = vec![0x157f_1c03, 0x0001_0004, 0x001a_1311, 0x1617_0f12, 0];
        words.extend([0x5681_1234; 14]);
        let entry = pb::TermiosEntry { c_cc: words.clone(), ..Default::default() };
        let termios = from_image(&entry).unwrap();
        assert_eq!((termios.cc[libc::VINTR], termios.cc[libc::VEOF], termios.cc[libc::VMIN]), (3, 4, 1));
        assert_eq!((termios.cc[libc::VSUSP], termios.cc[libc::VLNEXT]), (0x1a, 0x16));
        let written = to_image(&termios).c_cc;
        assert_eq!((&written[..5], written.len()), (&words[..5], CHARACTERS));
        assert!(from_image(&pb::TermiosEntry::default()).is_err());
    }
}
