//! The build-id of an ELF file, found the way images need it: both sides must find the same bytes.
//!
//! Rules shared by all who write or check `reg_file_entry.build_id`: only the first mebibyte of the file
//! counts; the first PT_NOTE segment that holds a note of type NT_GNU_BUILD_ID decides, whatever the note's
//! name; notes are 4-byte aligned in both classes; 1 to 512 bytes. Words are native-endian, the last one
//! padded with zeros.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes of a file that are looked at.
const WINDOW: u64 = 1 << 20;
const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;
const MOST: u32 = 512;
/// Size of a note's head: name length, content length, type.
const NOTE: u64 = 12;

/// The build-id as words, or `None` if the file has none.
///
/// # Errors
/// The file cannot be read.
pub(super) fn of(file: &File) -> io::Result<Option<Vec<u32>>> {
    let mut head = [0u8; 64];
    let size = file.metadata()?.len().min(WINDOW);
    if size < 5 || read(file, &mut head, 0, size)? < 5 || head[..4] != *b"\x7fELF" {
        return Ok(None);
    }
    let wide = match head[4] {
        1 => false,
        2 => true,
        _ => return Ok(None),
    };
    if size < if wide { 64 } else { 52 } {
        return Ok(None);
    }
    // e_phoff and e_phnum; the size of an entry is that of the class, as everybody else assumes.
    let (table, count, entry) = if wide {
        (u64_at(&head, 32), u16_at(&head, 56), 56u64)
    } else {
        (u64::from(u32_at(&head, 28)), u16_at(&head, 44), 32)
    };
    if table == 0 {
        return Ok(None);
    }
    for n in 0..u64::from(count) {
        let mut ph = [0u8; 56];
        let Some(at) = table.checked_add(n * entry).filter(|at| at.saturating_add(entry) <= size) else {
            break;
        };
        read(file, &mut ph[..entry as usize], at, size)?;
        if u32_at(&ph, 0) != PT_NOTE {
            continue;
        }
        let (offset, len) = if wide {
            (u64_at(&ph, 8), u64_at(&ph, 32))
        } else {
            (u64::from(u32_at(&ph, 4)), u64::from(u32_at(&ph, 16)))
        };
        if offset == 0 {
            continue;
        }
        if let Some(found) = in_notes(file, offset, offset.saturating_add(len).min(size), size)? {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Looks through the notes between `at` and `end`. The inner `None` is a build-id that does not count.
fn in_notes(file: &File, mut at: u64, end: u64, size: u64) -> io::Result<Option<Option<Vec<u32>>>> {
    while at.saturating_add(NOTE) <= end {
        let mut note = [0u8; NOTE as usize];
        read(file, &mut note, at, size)?;
        let (name, content, kind) = (u32_at(&note, 0), u32_at(&note, 4), u32_at(&note, 8));
        let start = at + NOTE + align(name);
        if kind == NT_GNU_BUILD_ID {
            if content == 0 || content > MOST || start + u64::from(content) > size {
                return Ok(Some(None));
            }
            let mut bytes = vec![0u8; content.next_multiple_of(4) as usize];
            read(file, &mut bytes[..content as usize], start, size)?;
            let words = bytes.chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
            return Ok(Some(Some(words.collect())));
        }
        at = start.saturating_add(align(content));
    }
    Ok(None)
}

fn align(len: u32) -> u64 {
    u64::from(len).next_multiple_of(4)
}

/// Fills `buf` from `at`, never from beyond the window; what is missing stays zero.
fn read(file: &File, buf: &mut [u8], at: u64, size: u64) -> io::Result<usize> {
    let want = buf.len().min(usize::try_from(size.saturating_sub(at)).unwrap_or(0));
    let mut got = 0;
    while got < want {
        match file.read_at(&mut buf[got..want], at + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A 64-bit ELF with a note of another kind and a build-id of `len` bytes.
    fn elf(len: u32) -> Vec<u8> {
        let mut b = vec![0u8; 64 + 56];
        b[..6].copy_from_slice(b"\x7fELF\x02\x01");
        b[32..40].copy_from_slice(&64u64.to_ne_bytes());
        b[56..58].copy_from_slice(&1u16.to_ne_bytes());
        b[64..68].copy_from_slice(&PT_NOTE.to_ne_bytes());
        b[72..80].copy_from_slice(&120u64.to_ne_bytes());
        let mut notes = Vec::new();
        for (kind, content) in [(1u32, vec![9; 6]), (3, (1..=len).map(|n| n as u8).collect())] {
            notes.extend(4u32.to_ne_bytes());
            notes.extend((content.len() as u32).to_ne_bytes());
            notes.extend(kind.to_ne_bytes());
            notes.extend(b"GNU\0");
            notes.extend(&content);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        b[96..104].copy_from_slice(&(notes.len() as u64).to_ne_bytes());
        b.extend(notes);
        b
    }

    #[test]
    fn build_ids_are_words_with_padding() {
        assert_eq!(of(&file(&elf(4))).unwrap(), Some(vec![u32::from_ne_bytes([1, 2, 3, 4])]));
        assert_eq!(
            of(&file(&elf(6))).unwrap(),
            Some(vec![u32::from_ne_bytes([1, 2, 3, 4]), u32::from_ne_bytes([5, 6, 0, 0])])
        );
        assert_eq!(of(&file(&elf(0))).unwrap(), None);
        assert_eq!(of(&file(&elf(513))).unwrap(), None);
        assert_eq!(of(&file(b"#!/bin/sh\n")).unwrap(), None);
        assert_eq!(of(&file(b"")).unwrap(), None);
    }

    #[test]
    fn our_own_executable_is_no_trouble() {
        of(&File::open("/proc/self/exe").unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn damaged_files_are_survived(cut in 0usize..200, at in 0usize..170, byte: u8) {
            let mut bytes = elf(20);
            let at = at.min(bytes.len() - 1);
            bytes[at] = byte;
            bytes.truncate(cut.max(5));
            of(&file(&bytes)).unwrap();
        }
    }
}
