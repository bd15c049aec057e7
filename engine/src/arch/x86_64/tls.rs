//! Thread-local storage descriptors of the global descriptor table (set_thread_area(2)), which 64-bit
//! programs can have too (Wine does).

use rcriu_images::pb;

use crate::{
    error::{Error, Result},
    sys::ptrace::UserDesc,
};

/// Numbers of the descriptors a thread owns.
pub const TLS_ENTRIES: std::ops::Range<u32> = 12..15;

/// The message of images.
pub fn tls_to_image(desc: &UserDesc) -> pb::UserDescT {
    let bit = |n: u32| desc.flags & 1 << n != 0;
    #[allow(clippy::needless_update)]
    pb::UserDescT {
        entry_number: desc.entry_number,
        base_addr: desc.base_addr,
        limit: desc.limit,
        seg_32bit: bit(0),
        contents_l: bit(1),
        contents_h: bit(2),
        read_exec_only: bit(3),
        limit_in_pages: bit(4),
        seg_not_present: bit(5),
        usable: bit(6),
        ..Default::default()
    }
}

/// From the message of images; `None` for an empty descriptor.
pub fn tls_from_image(entry: &pb::UserDescT) -> Result<Option<UserDesc>> {
    let bits = [
        entry.seg_32bit,
        entry.contents_l,
        entry.contents_h,
        entry.read_exec_only,
        entry.limit_in_pages,
        entry.seg_not_present,
        entry.usable,
    ];
    let flags = bits.iter().enumerate().map(|(n, b)| u32::from(*b) << n).sum();
    if entry.seg_not_present {
        return Ok(None);
    }
    if !TLS_ENTRIES.contains(&entry.entry_number) {
        return Err(Error::image(format!(
            "descriptor {} is not for thread-local storage",
            entry.entry_number
        )));
    }
    Ok(Some(UserDesc {
        entry_number: entry.entry_number,
        base_addr: entry.base_addr,
        limit: entry.limit,
        flags,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_survive_an_image() {
        let desc = UserDesc { entry_number: 12, base_addr: 0x1000, limit: 0xfffff, flags: 0b101_0001 };
        assert_eq!(tls_from_image(&tls_to_image(&desc)).unwrap(), Some(desc));
        let empty = UserDesc { entry_number: 13, flags: 0b010_1000, ..UserDesc::default() };
        assert_eq!(tls_from_image(&tls_to_image(&empty)).unwrap(), None);
        assert!(tls_from_image(&tls_to_image(&UserDesc { entry_number: 3, ..desc })).is_err());
    }
}
