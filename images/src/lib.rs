//! The on-disk format of checkpoint image sets, as CRIU 4.2 writes and reads it.
//!
//! | module | knows |
//! |---|---|
//! | [`pb`] | the messages, generated from `proto/` |
//! | [`catalog`] | which images there are, their names, magics and entry types |
//! | [`frame`] | header and entries of one image |
//! | [`dir`] | an image folder: opening, creating, the chain of parents |
//! | [`packed`] | compressed pages |
//! | [`pagemap`] | which memory pages are stored, and where |
//! | [`extra`] | payloads behind entries |
//! | [`json`] | the human form, both ways |
//! | [`set`] | a whole set for looking at it |
//! | [`check`] | whether a set holds together |
//! | [`compat`] | older layouts seen as today's |
//! | [`required`] | fields that must be there |
//! | [`sums`] | sums of all files of a set |
//! | [`schema`] | the descriptors of all messages at run time |

pub mod catalog;
pub mod check;
pub mod compat;
pub mod dir;
pub mod error;
pub mod extra;
pub mod frame;
pub mod json;
pub mod magic;
pub mod packed;
pub mod pagemap;
pub mod required;
pub mod schema;
pub mod set;
pub mod sums;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod wire;

pub use catalog::ImageKind;
pub use dir::{ImageDir, ImageReader, ImageWriter};
pub use error::{Cause, Error, Result};
pub use frame::Entry;

/// Every message of the schema, generated from `proto/`.
///
/// Fields that hold what Linux lets be any bytes (file names, command names, host names, mount options)
/// are `Vec<u8>` although the schema says `string`; on the wire both are the same.
#[allow(clippy::all, missing_docs, non_camel_case_types)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}
