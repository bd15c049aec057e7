//! Content of a tmpfs: an archive of tar, compressed by gzip, as CRIU has it made by tar(1).
//!
//! Folders come before what is in them. What the plain format has no place for goes into extended headers (pax),
//! which tar(1) understands or leaves out: nanoseconds of times, long names, extended attributes
//! (`SCHILY.xattr.NAME`), and the names of sockets. Sockets have no type in the format, so those of a folder are an
//! extended header of it, [`SOCKETS`]: whoever bound one binds it again, and the others are made as they were.
//! Holes are kept as the format's sparse files.
//!
//! ```text
//! pack     folder of the frozen tree -> member headers and data -> gzip -> tmpfs-dev-DEV.tar.gz.img
//! unpack   image -> gzip -> members, checked -> files below the root of a new tmpfs
//! ```

mod archive;
mod pack;
mod unpack;
mod xattr;

#[cfg(test)]
mod tests;

pub(super) use pack::pack;
pub(super) use unpack::unpack;

/// Bytes of a block: headers are one, data is padded to whole ones.
const BLOCK: usize = 512;

/// Prefix of the extended header of an attribute.
const XATTR: &str = "SCHILY.xattr.";

/// Extended header of a folder: sockets in it, each as `MODE UID GID SECONDS.NANOSECONDS NAME` and a zero byte.
const SOCKETS: &str = "RCRIU.sockets";
