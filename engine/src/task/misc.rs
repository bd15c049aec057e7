//! Small per-task settings that procfs knows.

use rcriu_images::pb;

use crate::{
    error::{Error, Result, SysContext},
    procfs::{ProcDir, hex, trim},
};

/// Execution domain, personality(2). The file holds hexadecimal digits; images of this format hold the number
/// that their decimal reading gives, with whatever follows the last decimal digit dropped.
pub fn personality(dir: &ProcDir) -> Result<u32> {
    let bytes = dir.read("personality")?;
    let digits = bytes.iter().take_while(|c| c.is_ascii_digit());
    Ok(digits.fold(0u32, |n, c| n.wrapping_mul(10).wrapping_add(u32::from(c - b'0'))))
}

/// The same number exactly.
pub fn exact_personality(dir: &ProcDir) -> Result<u32> {
    let bytes = dir.read("personality")?;
    let value = hex(trim(&bytes)).and_then(|value| u32::try_from(value).ok());
    value.ok_or_else(|| dir.strange("personality", &bytes))
}

/// Login uid of the audit system; `None` where the kernel has none.
pub fn loginuid(dir: &ProcDir) -> Result<Option<u32>> {
    absent(dir.number("loginuid"))
}

/// Preference of the out-of-memory killer.
pub fn oom_score_adj(dir: &ProcDir) -> Result<Option<i32>> {
    absent(dir.number("oom_score_adj"))
}

/// Words of an auxiliary vector that every reader of the format takes.
const AUXV_WORDS: usize = 44;

/// Auxiliary vector, as words, without the empty pair at its end: the kernel sets that itself, and for CRIU
/// it would be too much.
pub fn auxv(dir: &ProcDir) -> Result<Vec<u64>> {
    let bytes = dir.read("auxv")?;
    let mut words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_ne_bytes(*w)).collect();
    while let [.., 0, 0] = words[..] {
        words.truncate(words.len() - 2);
    }
    if words.len() > AUXV_WORDS {
        log::warn!(
            "The auxiliary vector of {} has {} words: CRIU takes {AUXV_WORDS}",
            dir.pid(),
            words.len()
        );
    }
    Ok(words)
}

/// The personality that the number in images stands for: its decimal digits are the hexadecimal digits of the
/// file.
pub fn restore_personality(image: u32) -> u32 {
    u32::from_str_radix(&image.to_string(), 16).unwrap_or(0)
}

/// Sets what procfs can set for the calling task. A refusal is warned of: these are hints to the system, not
/// state of the program.
pub fn restore(tc: &pb::TaskCoreEntry) -> Result<()> {
    if let Some(wanted) = tc.oom_score_adj {
        set("/proc/self/oom_score_adj", i64::from(wanted))?;
    }
    if let Some(wanted) = tc.loginuid {
        set("/proc/self/loginuid", i64::from(wanted))?;
    }
    Ok(())
}

fn set(path: &str, wanted: i64) -> Result<()> {
    let now = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(format!("read({path})"), &e)),
    };
    if now.trim().parse() == Ok(wanted) {
        return Ok(());
    }
    match std::fs::write(path, wanted.to_string()) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            log::warn!("{path} stays {} instead of {wanted}: {e}", now.trim());
            Ok(())
        }
        other => other.call(format!("write({path})")),
    }
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
    fn personalities_survive_as_far_as_images_can_hold_them() {
        // ADDR_NO_RANDOMIZE, 0x0040000, is stored as 40000.
        assert_eq!(restore_personality(40_000), libc::ADDR_NO_RANDOMIZE as u32);
        assert_eq!(restore_personality(0), 0);
        assert_eq!(restore_personality(u32::MAX), 0);
    }

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
