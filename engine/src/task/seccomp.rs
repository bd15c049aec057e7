//! Seccomp: strict mode, and chains of filters that threads inherit from each other.
//!
//! In images a chain is stored oldest filter last; a thread names its oldest filter, and `prev` of each leads
//! to the next newer one, the order in which a restore installs them. Equal chains are stored once.

use std::collections::HashMap;

use rcriu_images::pb;

use crate::{
    error::{Context, Error, Result},
    pstree::RealPid,
    sys::ptrace::{self, SockFilter},
};

/// `SECCOMP_FILTER_FLAG_TSYNC`: the filter goes to all threads.
const TSYNC: u32 = 1;

/// Mode of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Disabled,
    Strict,
    Filter,
}

impl Mode {
    /// From the number in `/proc/PID/status`.
    pub fn from_status(n: u32) -> Result<Self> {
        match n {
            0 => Ok(Mode::Disabled),
            1 => Ok(Mode::Strict),
            2 => Ok(Mode::Filter),
            n => Err(Error::unsupported(format!("seccomp mode {n} is not known"))),
        }
    }
}

/// What goes into the core image of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThreadSeccomp {
    pub mode: Option<i32>,
    pub filter: Option<u32>,
}

/// A filter as the kernel gives it: program and flags.
type Filter = (Vec<SockFilter>, u32);

/// All chains of the dump.
#[derive(Debug, Default)]
pub struct Filters {
    entry: pb::SeccompEntry,
    /// Oldest filter first -> its position.
    known: HashMap<Vec<(Vec<u8>, u32)>, u32>,
}

impl Filters {
    /// Takes the filters of the threads of one task, the leader first; all must be stopped.
    ///
    /// Where all threads have the same chain it is stored for the leader alone with the TSYNC flag: without
    /// it, a later synchronisation by the program would fail, because chains that were installed one by one
    /// are not the same to the kernel even if they are equal.
    pub fn task(&mut self, threads: &[(RealPid, Mode)]) -> Result<Vec<ThreadSeccomp>> {
        let mut chains = Vec::with_capacity(threads.len());
        for (tid, mode) in threads {
            chains.push(match mode {
                Mode::Filter => read_chain(*tid).during(|| format!("seccomp filters of thread {tid}"))?,
                _ => Vec::new(),
            });
        }
        let programs = |chain: &'_ [Filter]| chain.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
        let same = threads.iter().all(|(_, mode)| *mode == Mode::Filter)
            && chains.split_first().is_some_and(|(leader, others)| {
                let leader = programs(leader);
                others.iter().all(|c| programs(c) == leader)
            });
        let mut result = Vec::with_capacity(threads.len());
        for (n, ((_, mode), chain)) in threads.iter().zip(chains).enumerate() {
            result.push(match mode {
                Mode::Disabled => ThreadSeccomp::default(),
                Mode::Strict => ThreadSeccomp { mode: Some(pb::SeccompMode::Strict as i32), filter: None },
                Mode::Filter if same && n > 0 => ThreadSeccomp::default(),
                Mode::Filter => ThreadSeccomp {
                    mode: Some(pb::SeccompMode::Filter as i32),
                    filter: Some(self.chain(chain, if same { TSYNC } else { 0 })),
                },
            });
        }
        Ok(result)
    }

    /// Position of the chain's oldest filter; `chain` has the oldest first.
    fn chain(&mut self, chain: Vec<Filter>, flags: u32) -> u32 {
        let key: Vec<_> = chain.into_iter().map(|(code, f)| (bytes(&code), f | flags)).collect();
        if let Some(at) = self.known.get(&key) {
            return *at;
        }
        let filters = &mut self.entry.seccomp_filters;
        let mut prev = None;
        for (filter, flags) in key.iter().rev() {
            filters.push(pb::SeccompFilter { filter: filter.clone(), prev, flags: Some(*flags) });
            prev = Some(filters.len() as u32 - 1);
        }
        let at = prev.unwrap_or(0);
        self.known.insert(key, at);
        at
    }

    /// The only entry of seccomp.img.
    pub fn entry(&self) -> &pb::SeccompEntry {
        &self.entry
    }
}

/// Filters of a stopped thread, oldest first.
fn read_chain(tid: RealPid) -> Result<Vec<Filter>> {
    let mut chain = Vec::new();
    let mut metadata = true;
    while let Some(code) = ptrace::seccomp_get_filter(tid, chain.len() as u64)? {
        let mut flags = 0;
        if metadata {
            match ptrace::seccomp_get_metadata(tid, chain.len() as u64) {
                Ok(f) => flags = f as u32,
                // Before Linux 4.16.
                Err(e) if e.errno() == Some(libc::EIO) => metadata = false,
                Err(e) => return Err(e),
            }
        }
        chain.push((code, flags));
    }
    if chain.is_empty() {
        return Err(Error::bug("filter mode without filters"));
    }
    Ok(chain)
}

/// `struct sock_filter`s as stored.
fn bytes(code: &[SockFilter]) -> Vec<u8> {
    let mut out = Vec::with_capacity(code.len() * 8);
    for i in code {
        out.extend(i.code.to_ne_bytes());
        out.extend([i.jt, i.jf]);
        out.extend(i.k.to_ne_bytes());
    }
    out
}

/// Most instructions a filter can have (`BPF_MAXINSNS`).
const MAX_CODE: usize = 4096;

/// The chain that starts at filter `oldest` of seccomp.img, in the order of installation: positions in
/// `entry`.
///
/// # Errors
/// A position that does not exist, a chain that has no end.
pub fn restore_chain(entry: &pb::SeccompEntry, oldest: u32) -> Result<Vec<u32>> {
    let filters = &entry.seccomp_filters;
    let mut chain = Vec::new();
    let mut next = Some(oldest);
    while let Some(at) = next {
        let filter = filters.get(at as usize);
        let filter = filter.ok_or_else(|| Error::image(format!("seccomp.img: there is no filter {at}")))?;
        if chain.len() >= filters.len() {
            return Err(Error::image("seccomp.img: a chain of filters has no end"));
        }
        chain.push(at);
        next = filter.prev;
    }
    Ok(chain)
}

/// A filter for the restorer: its instructions and flags.
pub fn restore_filter(filter: &pb::SeccompFilter) -> Result<(Vec<u64>, u64)> {
    /// TSYNC, LOG, SPEC_ALLOW: those that mean something after the call.
    const FLAGS: u32 = 7;
    let (code, []) = filter.filter.as_chunks::<8>() else {
        return Err(Error::image("seccomp.img: a filter is not made of whole instructions"));
    };
    if code.is_empty() || code.len() > MAX_CODE {
        return Err(Error::image(format!("seccomp.img: a filter has {} instructions", code.len())));
    }
    let flags = filter.flags.unwrap_or(0);
    if flags & !FLAGS != 0 {
        return Err(Error::unsupported(format!("a seccomp filter with flags {flags:#x} cannot be restored")));
    }
    Ok((code.iter().map(|c| u64::from_ne_bytes(*c)).collect(), u64::from(flags)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(k: u32) -> Filter {
        (vec![SockFilter { code: 6, jt: 0, jf: 0, k }], 0)
    }

    #[test]
    fn chains_lead_from_the_oldest_to_the_newest() {
        let mut filters = Filters::default();
        let at = filters.chain(vec![filter(1), filter(2), filter(3)], 0);
        let stored = &filters.entry().seccomp_filters;
        let order: Vec<_> = std::iter::successors(Some(at), |n| stored[*n as usize].prev)
            .map(|n| stored[n as usize].filter[4])
            .collect();
        assert_eq!(order, [1, 2, 3]);
        assert_eq!(restore_chain(filters.entry(), at).unwrap(), [2, 1, 0]);
        assert!(restore_chain(filters.entry(), 3).is_err());
        let mut looped = filters.entry().clone();
        looped.seccomp_filters[0].prev = Some(2);
        assert!(restore_chain(&looped, at).is_err());
        assert_eq!(stored[0].filter, [6, 0, 0, 0, 3, 0, 0, 0]);
    }

    #[test]
    fn equal_chains_are_stored_once() {
        let mut filters = Filters::default();
        let a = filters.chain(vec![filter(1)], TSYNC);
        let b = filters.chain(vec![filter(1)], TSYNC);
        let c = filters.chain(vec![filter(1)], 0);
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_eq!(filters.entry().seccomp_filters.len(), 2);
        assert_eq!(filters.entry().seccomp_filters[0].flags, Some(1));
    }

    #[test]
    fn hostile_filters_are_refused() {
        let filter = |len, flags| pb::SeccompFilter { filter: vec![0; len], prev: None, flags };
        assert_eq!(restore_filter(&filter(16, Some(1))).unwrap(), (vec![0, 0], 1));
        for (len, flags) in [(0, None), (7, None), (8 * (MAX_CODE + 1), None), (8, Some(8))] {
            assert!(restore_filter(&filter(len, flags)).is_err(), "{len} {flags:?}");
        }
    }

    #[test]
    fn modes_without_filters_need_no_thread() {
        let mut filters = Filters::default();
        let threads = [(RealPid(1), Mode::Strict), (RealPid(2), Mode::Disabled)];
        let got = filters.task(&threads).unwrap();
        assert_eq!(got[0], ThreadSeccomp { mode: Some(1), filter: None });
        assert_eq!(got[1], ThreadSeccomp::default());
        assert!(Mode::from_status(7).is_err());
    }
}
