//! Extended attributes that hold owners, which differ between inside and outside of a user namespace.

use super::super::ids::IdMaps;
use crate::error::{Error, Result};

/// `XATTR_CAPS`: revision and length of capabilities without and with the owner of a namespace.
const REVISION_2: u32 = 0x0200_0000;
const REVISION_3: u32 = 0x0300_0000;
const REVISION_MASK: u32 = 0xff00_0000;
const LENGTH_2: usize = 20;
const LENGTH_3: usize = 24;

/// `posix_acl_xattr_header` and `_entry`.
const ACL_HEADER: usize = 4;
const ACL_ENTRY: usize = 8;
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;

/// The value of attribute `name`, read by us, as the user namespace with `maps` sees it.
pub(super) fn inside(name: &[u8], value: Vec<u8>, maps: &IdMaps) -> Result<Vec<u8>> {
    match name {
        _ if maps.are_plain() => Ok(value),
        b"security.capability" => capability(value, maps),
        b"system.posix_acl_access" | b"system.posix_acl_default" => acl(value, maps),
        _ => Ok(value),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// Capabilities for the owner of the namespace have no owner inside of it.
fn capability(value: Vec<u8>, maps: &IdMaps) -> Result<Vec<u8>> {
    let owner = word(&value, LENGTH_2);
    match (word(&value, 0), owner, value.get(4..LENGTH_2)) {
        (Some(magic), Some(owner), Some(sets))
            if magic & REVISION_MASK == REVISION_3 && value.len() == LENGTH_3 =>
        {
            if maps.user(owner)? != 0 {
                return Err(Error::unsupported("capabilities of a file in another user namespace"));
            }
            let magic = magic & !REVISION_MASK | REVISION_2;
            Ok([&magic.to_le_bytes()[..], sets].concat())
        }
        _ => Ok(value),
    }
}

fn acl(mut value: Vec<u8>, maps: &IdMaps) -> Result<Vec<u8>> {
    for entry in value.get_mut(ACL_HEADER..).unwrap_or_default().chunks_exact_mut(ACL_ENTRY) {
        let [tag_low, tag_high, _, _, id @ ..] = entry else { continue };
        let Ok(bytes) = <[u8; 4]>::try_from(&id[..]) else { continue };
        let number = u32::from_le_bytes(bytes);
        let mapped = match u16::from_le_bytes([*tag_low, *tag_high]) {
            ACL_USER => maps.user(number)?,
            ACL_GROUP => maps.group(number)?,
            _ => continue,
        };
        id.copy_from_slice(&mapped.to_le_bytes());
    }
    Ok(value)
}
