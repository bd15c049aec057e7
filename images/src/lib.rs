//! The on-disk format of checkpoint image sets, as CRIU 4.2 writes and reads it.

/// Every message of the schema, generated from `proto/`.
#[allow(clippy::all, missing_docs, non_camel_case_types)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}
