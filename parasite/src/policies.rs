//! NUMA memory policies of mappings.
//!
//! # Safety
//! Works on the data area, whose length is checked; get_mempolicy(2) stores one int.

use blobrt::syscall::{Result, nr, syscall5};

use crate::{Control, DATA_LEN, task::value};

/// Addresses that one call takes.
pub const MAX: usize = DATA_LEN / 8;
/// The policy of the mapping at an address, not of the thread.
pub const MPOL_F_ADDR: usize = 2;

/// Replaces each of `args[0]` addresses in the data area by the mode of the policy that its mapping has of its
/// own, 0 for none, or by a negative error number.
///
/// # Safety
/// As [`Control::data_mut`].
pub unsafe fn read(control: &mut Control) -> Result<()> {
    // SAFETY: as the caller says.
    for word in unsafe { control.data_mut::<u64>(control.args[0] as usize)? } {
        let mut mode = 0i32;
        // SAFETY: the address is only looked up.
        let asked = unsafe {
            syscall5(nr::GET_MEMPOLICY, (&raw mut mode) as usize, 0, 0, *word as usize, MPOL_F_ADDR)
        };
        *word = match value(asked) {
            e if e < 0 => e as u64,
            _ => mode as u64,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::{Command, tests::Bench};

    #[test]
    fn mappings_without_a_policy_have_none() {
        let mut bench = Bench::new(Command::Policies);
        let here = bench.data.as_ptr() as u64;
        bench.data[0] = here;
        bench.data[1] = 0;
        bench.control.args[0] = 2;
        assert_eq!(bench.run(), 0);
        // 0, or ENOSYS on a kernel without NUMA.
        assert!(matches!(bench.read::<u64>(0) as i64, 0 | -38));
        assert!((bench.read::<u64>(1) as i64) < 0, "nothing is mapped there");
        bench.control.args[0] = 1 << 40;
        assert_eq!(bench.run(), -22);
    }
}
