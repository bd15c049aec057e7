//! What the engine and every blob must agree on.

/// In `rax` when a blob executes the `ud2` of its panic handler; then `rdi` and `rsi` are address and
/// length of the source file's name, `rdx` is the line and `r8` the column.
pub const PANIC_MARK: u64 = 0x6261_6420_626c_6f62;

/// FNV-1a over `bytes`, starting from `hash`. Both compilations of an ABI crate run it over their own
/// sources; equal numbers mean that the engine and the blob were built from the same text.
pub const fn fingerprint(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Start value of [`fingerprint`].
pub const FINGERPRINT_SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// `struct clone_args` of clone3(2) up to `set_tid_size` (Linux 5.5); the kernel tells forms apart by size.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(8))]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where the pidfd goes.
    pub pidfd: u64,
    /// Where the tid goes in the child.
    pub child_tid: u64,
    /// Where the tid goes in the parent.
    pub parent_tid: u64,
    /// Signal to the parent at the child's end.
    pub exit_signal: u64,
    /// Lowest address of the child's stack.
    pub stack: u64,
    /// Its length in bytes.
    pub stack_size: u64,
    /// New FS base.
    pub tls: u64,
    /// Address of the wanted tids (`i32`), innermost pid namespace first.
    pub set_tid: u64,
    /// How many there are.
    pub set_tid_size: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 80);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_fnv_1a() {
        assert_eq!(fingerprint(FINGERPRINT_SEED, b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fingerprint(FINGERPRINT_SEED, b"foobar"), 0x8594_4171_f739_67e8);
    }
}
