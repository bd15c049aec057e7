//! The page server protocol: commands of 32 bytes, some followed by pages.
//!
//! ```text
//! dump ----------- OPEN2 task ------------> page server     restore (lazy)          dump (lazy)
//!      <--- 1 byte: is there a parent ----                     ---- GET task addr n --->
//!      --- ADD_F addr n flags | n pages -->                    <--- ADD_F addr m | m pages
//!      ...                                                     ...
//!      ----------- CLOSE ----------------->                    ---- CLOSE ------------->
//!      <--- 4 bytes: status --------------                     <--- 4 bytes: status ----
//! ```
//!
//! Numbers are little endian, four bytes of padding follow the command. Lengths come from a stranger: nothing is
//! allocated by them.

use rcriu_images::{
    ImageKind,
    pagemap::{PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT},
};

use crate::error::{Error, Result};

/// Length in bytes of a command.
pub const LEN: usize = 32;

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Begins an object; no answer.
    Open,
    /// Begins an object; one byte says whether its parent images have it.
    Open2,
    /// Asks whether the parent images have an object; answered by four bytes.
    Parent,
    /// Pages of the object, with the flags of their pagemap entry.
    Add { flags: u32 },
    /// Asks for pages; the answer is an [`Command::Add`].
    Get,
    /// The end; four bytes of status answer.
    Close,
    /// The same where the connection itself may live on.
    ForceClose,
}

const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
/// Bits of the command word below the flags.
const COMMAND_BITS: u32 = 16;
const KNOWN_FLAGS: u32 = PE_PARENT | PE_LAZY | PE_PRESENT;

/// One command with its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub command: Command,
    /// Number of pages.
    pub pages: u64,
    /// Address of the first; for shared memory its offset.
    pub vaddr: u64,
    /// The object: an [`Object`] encoded, or just a pid in [`Command::Get`] and its answer.
    pub object: u64,
}

impl Message {
    /// A command about `object` as a whole.
    pub fn about(command: Command, object: u64) -> Self {
        Message { command, pages: 0, vaddr: 0, object }
    }

    pub fn encode(&self) -> [u8; LEN] {
        let word = match self.command {
            Command::Open => OPEN,
            Command::Open2 => OPEN2,
            Command::Parent => PARENT,
            Command::Add { flags } => flags << COMMAND_BITS | ADD_F,
            Command::Get => GET,
            Command::Close => CLOSE,
            Command::ForceClose => FORCE_CLOSE,
        };
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&word.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.pages.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.vaddr.to_le_bytes());
        bytes[24..].copy_from_slice(&self.object.to_le_bytes());
        bytes
    }

    /// Reads a command of today's or an older peer.
    ///
    /// # Errors
    /// Unknown commands and flags; pages that lie outside of any address space.
    pub fn decode(bytes: &[u8; LEN]) -> Result<Self> {
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let word = number(0) as u32;
        let flags = word >> COMMAND_BITS;
        let command = match word & ((1 << COMMAND_BITS) - 1) {
            ADD => Command::Add { flags: PE_PRESENT },
            HOLE => Command::Add { flags: PE_PARENT },
            ADD_F => Command::Add { flags },
            OPEN => Command::Open,
            OPEN2 => Command::Open2,
            PARENT => Command::Parent,
            GET => Command::Get,
            CLOSE => Command::Close,
            FORCE_CLOSE => Command::ForceClose,
            other => return Err(strange(format!("the unknown command {other:#x}"))),
        };
        let message = Message { command, pages: number(8), vaddr: number(16), object: number(24) };
        match command {
            Command::Add { flags } if flags == 0 || flags & !KNOWN_FLAGS != 0 => {
                Err(strange(format!("pages with the unknown flags {flags:#x}")))
            }
            Command::Add { .. } | Command::Get => {
                message.end()?;
                Ok(message)
            }
            _ => Ok(message),
        }
    }

    /// The first address after the pages.
    ///
    /// # Errors
    /// No pages, addresses that are not those of pages, or too many of them.
    pub fn end(&self) -> Result<u64> {
        let end = self.pages.checked_mul(PAGE_SIZE).and_then(|len| self.vaddr.checked_add(len));
        end.filter(|end| self.pages > 0 && end % PAGE_SIZE == 0)
            .ok_or_else(|| strange(format!("{} pages at {:#x}", self.pages, self.vaddr)))
    }
}

/// A peer that does not keep to the protocol.
pub fn strange(what: impl std::fmt::Display) -> Error {
    Error::host(format!("the other side of the page server connection sent {what}"))
        .remedy("both sides must be CRIU 4.2 or rcriu, with the same TLS options")
}

/// What pages belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    /// [`ImageKind::Pagemap`] of a task or [`ImageKind::ShmemPagemap`].
    pub kind: ImageKind,
    /// Number of the image.
    pub id: u64,
}

const TYPE_BITS: u32 = 8;
const TASK: u64 = 1;
const SHMEM: u64 = 2;

impl Object {
    /// The number that stands for it.
    pub fn encode(self) -> u64 {
        self.id << TYPE_BITS | if self.kind == ImageKind::ShmemPagemap { SHMEM } else { TASK }
    }

    /// Reads it; versions up to 3.2 had other numbers for the types.
    pub fn decode(word: u64) -> Result<Self> {
        let kind = match word & ((1 << TYPE_BITS) - 1) {
            TASK | 10 | 11 | 16 | 17 => ImageKind::Pagemap,
            SHMEM | 27 | 28 | 29 | 32 | 33 | 34 => ImageKind::ShmemPagemap,
            other => return Err(strange(format!("an object of the unknown type {other}"))),
        };
        Ok(Object { kind, id: word >> TYPE_BITS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_that_of_the_protocol() {
        let add = Command::Add { flags: PE_PRESENT | PE_LAZY };
        let object = Object { kind: ImageKind::ShmemPagemap, id: 0x1234 };
        let m = Message { command: add, pages: 1 << 20, vaddr: 0x7f00_0000_1000, object: object.encode() };
        let bytes = m.encode();
        assert_eq!(bytes[..8], [6, 0, 6, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], (1u64 << 20).to_le_bytes());
        assert_eq!(bytes[24..], [2, 0x34, 0x12, 0, 0, 0, 0, 0]);
        assert_eq!(Message::decode(&bytes).unwrap(), m);
        assert_eq!(m.end().unwrap(), 0x7f01_0000_1000);
        assert_eq!(Object::decode(m.object).unwrap(), object);
        let close = Message::about(Command::Close, 0).encode();
        assert_eq!(close[..4], [0x23, 0x10, 0, 0]);
    }

    #[test]
    fn older_peers_are_understood() {
        let mut bytes = Message { command: Command::Get, pages: 1, vaddr: 0, object: 7 }.encode();
        bytes[0] = 2;
        assert_eq!(Message::decode(&bytes).unwrap().command, Command::Add { flags: PE_PARENT });
        bytes[0] = 1;
        assert_eq!(Message::decode(&bytes).unwrap().command, Command::Add { flags: PE_PRESENT });
        assert_eq!(Object::decode(5 << 8 | 34).unwrap(), Object { kind: ImageKind::ShmemPagemap, id: 5 });
    }

    #[test]
    fn nonsense_is_refused() {
        let get = |pages, vaddr| Message { command: Command::Get, pages, vaddr, object: 1 }.encode();
        for bytes in [get(0, 0x1000), get(1, 0x1001), get(u64::MAX, 0), get(1, u64::MAX - 4095), [9; LEN]] {
            assert!(Message::decode(&bytes).is_err(), "{bytes:?}");
        }
        let add = Message { command: Command::Add { flags: 8 }, pages: 1, vaddr: 0, object: 1 };
        assert!(Message::decode(&add.encode()).is_err());
        assert!(Object::decode(3).is_err());
    }

    proptest! {
        #[test]
        fn whatever_comes_is_an_answer(bytes: [u8; LEN]) {
            if let Ok(m) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&m.encode()).unwrap(), m);
            }
        }
    }
}
