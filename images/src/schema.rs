//! The schema at run time: the descriptors of every message, embedded at build.

use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(DESCRIPTORS).expect("the descriptor set was written by this crate's build script")
});

/// Descriptors of all messages, under the package `criu`.
pub fn pool() -> &'static DescriptorPool {
    &POOL
}
