//! The instructions that a program was loaded from.
//!
//! The kernel tells only what it has made of them: accesses to a program's context (`struct __sk_buff`) have become such
//! to its own structures, which other kernels have elsewhere. Each of them is found again by having the kernel do the
//! same to every field, and the kernel itself says whether the result is right: it is loaded, and must have the same
//! digest (tag), which is one of the instructions as they were given.

use std::collections::HashMap;

use crate::{
    error::{Error, Result},
    sys::bpfprog::{self, Info, Insn},
};

/// `BPF_PROG_TYPE_CGROUP_SKB` and `BPF_PROG_TYPE_CGROUP_DEVICE`.
pub(super) const CGROUP_SKB: u32 = 8;
pub(super) const CGROUP_DEVICE: u32 = 15;

/// Bytes of a context whose fields may be read, in words.
const CONTEXT: i16 = 192;

/// What the kernel says of `insns` once it has loaded them; `None` if it does not.
type Load<'a> = &'a dyn Fn(&[Insn]) -> Option<Info>;

/// Finds the instructions that `info` was loaded from.
///
/// # Errors
/// Instructions that cannot be found again, or that speak of things outside of the program.
pub(super) fn of(info: &Info, load: Load<'_>) -> Result<Vec<Insn>> {
    let close = "close it before the dump";
    if info.maps != 0 {
        return Err(Error::unsupported("a BPF program that uses maps cannot be dumped").remedy(close));
    }
    if info.insns.is_empty() {
        return Err(Error::unsupported("the instructions of a BPF program are not shown")
            .remedy("dump with CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN"));
    }
    if info.insns.iter().any(is_call) {
        return Err(Error::unsupported("a BPF program that calls functions cannot be dumped").remedy(close));
    }
    let is_it = |insns: &[Insn]| load(insns).is_some_and(|found| found.tag == info.tag);
    if is_it(&info.insns) {
        return Ok(info.insns.clone());
    }
    let undone = undo(&info.insns, load).filter(|insns| is_it(insns));
    undone.ok_or_else(|| {
        Error::unsupported(
            "what a BPF program was loaded from cannot be told from what the kernel has made of it",
        )
        .remedy(close)
    })
}

fn code(insn: &Insn) -> u8 {
    insn[0]
}

fn registers(insn: &Insn) -> (u8, u8) {
    (insn[1] & 15, insn[1] >> 4)
}

fn is_jump(insn: &Insn) -> bool {
    // Classes JMP and JMP32, but neither call nor exit.
    matches!(code(insn) & 7, 5 | 6) && !matches!(code(insn) & 0xf0, 0x80 | 0x90)
}

fn is_call(insn: &Insn) -> bool {
    matches!(code(insn) & 7, 5 | 6) && code(insn) & 0xf0 == 0x80
}

/// A load from memory whose address is in a register.
fn is_load(insn: &Insn) -> bool {
    code(insn) & 0xe7 == 0x61
}

/// The load of a word of the context.
fn field(to: u8, from: u8, offset: i16) -> Insn {
    let [low, high] = offset.to_ne_bytes();
    [0x61, from << 4 | to, low, high, 0, 0, 0, 0]
}

/// Fields of the context, and what loading each has become.
type Fields = Vec<(i16, Vec<Insn>)>;

/// Puts back all accesses to the context. `None` if jumps lead into what an access has become.
fn undo(insns: &[Insn], load: Load<'_>) -> Option<Vec<Insn>> {
    let mut known: HashMap<(u8, u8), Fields> = HashMap::new();
    let mut result = Vec::new();
    // Where each instruction is in the result; inside of an access there is no such place.
    let mut places: Vec<Option<usize>> = Vec::new();
    let mut at = 0;
    while let Some(insn) = insns.get(at) {
        let (mut taken, mut put) = (1, *insn);
        if is_load(insn) {
            let (to, from) = registers(insn);
            let rest = insns.get(at..).unwrap_or_default();
            let fields = known.entry((to, from)).or_insert_with(|| fields(to, from, load));
            let fits = fields.iter().filter(|(_, made)| rest.starts_with(made));
            if let Some((offset, made)) = fits.max_by_key(|(_, made)| made.len()) {
                (put, taken) = (field(to, from, *offset), made.len());
            }
        }
        places.push(Some(result.len()));
        places.extend((1..taken).map(|_| None));
        result.push(put);
        at += taken;
    }
    places.push(Some(result.len()));
    for (at, insn) in insns.iter().enumerate().filter(|(_, insn)| is_jump(insn)) {
        let from = places.get(at).copied().flatten()?;
        let target = (at as i64 + 1).checked_add(i16::from_ne_bytes([insn[2], insn[3]]).into())?;
        let target = places.get(usize::try_from(target).ok()?).copied().flatten()?;
        let offset = i16::try_from(target as i64 - from as i64 - 1).ok()?;
        result.get_mut(from)?[2..4].copy_from_slice(&offset.to_ne_bytes());
    }
    Some(result)
}

/// What the kernel makes of the load of each field of the context, whose address is in register `from`.
fn fields(to: u8, from: u8, load: Load<'_>) -> Vec<(i16, Vec<Insn>)> {
    // Registers 0 to 9 can be written; the context comes in register 1.
    if to > 9 || from > 9 {
        return Vec::new();
    }
    let have = [0xbf, 1 << 4 | from, 0, 0, 0, 0, 0, 0];
    let done = [[0xb7, 0, 0, 0, 1, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let offsets = (0..CONTEXT).step_by(4);
    let made = offsets.filter_map(|offset| {
        let found = load(&[have, field(to, from, offset), done[0], done[1]])?;
        let made = found.insns.strip_prefix(&[have])?.strip_suffix(&done)?;
        Some((offset, made.to_vec())).filter(|(_, made)| !made.is_empty())
    });
    made.collect()
}

/// Loads instructions as `info` was, and asks the kernel what it has made of them.
pub(super) fn try_it(info: &Info, insns: &[Insn]) -> Option<Info> {
    let program = bpfprog::load(info.kind, insns, info.gpl, &info.name).ok()?;
    bpfprog::info(std::os::fd::AsFd::as_fd(&program)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel in which the field at 16 is read in two steps, and that at 20 in one; tags are the sum of all bytes.
    fn kernel(insns: &[Insn]) -> Option<Info> {
        let mut made: Vec<Insn> = Vec::new();
        for insn in insns {
            let (to, from) = registers(insn);
            match (code(insn), i16::from_ne_bytes([insn[2], insn[3]])) {
                (0x61, 16) => made.extend([[0x79, from << 4 | to, 8, 0, 0, 0, 0, 0], field(to, to, 100)]),
                (0x61, 20) => made.push([0x69, from << 4 | to, 176, 0, 0, 0, 0, 0]),
                (0x61 | 0x69 | 0x79, _) => return None,
                _ => made.push(*insn),
            }
        }
        let tag = insns.iter().flatten().map(|b| u64::from(*b)).sum::<u64>().to_ne_bytes();
        let plain = Info { kind: 8, id: 0, tag, maps: 0, name: Vec::new(), gpl: true, btf: 0, insns: made };
        // Jumps over what has become longer.
        let mut info = plain;
        if insns.len() == 6 {
            info.insns[1][2] += 1;
        }
        Some(info)
    }

    #[test]
    fn accesses_to_the_context_are_put_back() {
        let program: [Insn; 6] = [
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
            [0x55, 6, 2, 0, 7, 0, 0, 0],
            field(7, 6, 16),
            field(8, 6, 20),
            [0xb7, 0, 0, 0, 1, 0, 0, 0],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        let info = kernel(&program).unwrap();
        assert_eq!(info.insns.len(), 7);
        assert_eq!(of(&info, &kernel).unwrap(), program);
        let other = Info { tag: [1; 8], ..info.clone() };
        assert!(of(&other, &kernel).unwrap_err().to_string().contains("cannot be told"));
        for (bad, word) in [
            (Info { maps: 1, ..info.clone() }, "maps"),
            (Info { insns: Vec::new(), ..info.clone() }, "CAP_BPF"),
            (Info { insns: vec![[0x85, 0, 0, 0, 1, 0, 0, 0]], ..info }, "calls functions"),
        ] {
            assert!(of(&bad, &kernel).unwrap_err().to_string().contains(word), "{word}");
        }
    }
}
