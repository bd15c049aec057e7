//! Structures both sides share, as bytes.
//!
//! # Safety
//! Rests on the promise of [`Plain`]: no padding, every bit pattern a value.
#![allow(unsafe_code)]

use parasite::Plain;

/// The bytes of a value.
pub(super) fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: a plain value has no padding; the slice lives as long as the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The value at the start of `bytes`, which must be long enough.
pub(super) fn value_of<T: Plain>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>());
    // SAFETY: long enough, any bits are a value, and the read needs no alignment.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive() {
        let c = parasite::Control { build: 7, data_len: 9, ..Default::default() };
        assert_eq!(value_of::<parasite::Control>(bytes_of(&c)), c);
    }
}
