//! Line settings and window size, between kernel and images.

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    sys::tty::{Termios, Winsize},
};

/// Control characters images have.
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
        c_cc: termios.cc.iter().map(|c| u32::from(*c)).collect(),
    }
}

pub(super) fn from_image(entry: &pb::TermiosEntry) -> Result<Termios> {
    if entry.c_cc.len() < CHARACTERS {
        return Err(Error::image(format!("tty-info.img: {} control characters", entry.c_cc.len())));
    }
    let mut cc = [0; CHARACTERS];
    for (to, from) in cc.iter_mut().zip(&entry.c_cc) {
        *to = *from as u8;
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
