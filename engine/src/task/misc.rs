//! Small per-task settings that procfs knows.

use crate::{error::Result, procfs::ProcDir};

/// Execution domain, personality(2). The file holds hexadecimal digits; images of this format hold the number
/// that their decimal reading gives, with whatever follows the last decimal digit dropped.
pub fn personality(dir: &ProcDir) -> Result<u32> {
    let bytes = dir.read("personality")?;
    let digits = bytes.iter().take_while(|c| c.is_ascii_digit());
    Ok(digits.fold(0u32, |n, c| n.wrapping_mul(10).wrapping_add(u32::from(c - b'0'))))
}

/// Login uid of the audit system; `None` where the kernel has none.
pub fn loginuid(dir: &ProcDir) -> Result<Option<u32>> {
    absent(dir.number("loginuid"))
}

/// Preference of the out-of-memory killer.
pub fn oom_score_adj(dir: &ProcDir) -> Result<Option<i32>> {
    absent(dir.number("oom_score_adj"))
}

/// Auxiliary vector, as words.
pub fn auxv(dir: &ProcDir) -> Result<Vec<u64>> {
    let bytes = dir.read("auxv")?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w)).collect())
}

fn absent<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pstree::RealPid;

    #[test]
    fn our_own_settings_are_read() {
        let me = ProcDir::open(RealPid(std::process::id() as i32)).unwrap();
        assert_eq!(personality(&me).unwrap() & 0xff, 0);
        assert!(oom_score_adj(&me).unwrap().is_some());
        let auxv = auxv(&me).unwrap();
        let at = auxv.chunks(2).find(|pair| pair[0] == libc::AT_PAGESZ).unwrap();
        assert_eq!(at[1], 4096);
        assert!(dir_number_of_missing(&me).unwrap().is_none());
    }

    fn dir_number_of_missing(dir: &ProcDir) -> Result<Option<u32>> {
        absent(dir.number("no_such_file"))
    }
}
