//! Work on many things of the same kind, halved with a second thread where there are many.
//!
//! Only what reads and writes files may be done so: ptrace(2) belongs to the thread that has attached. The thread
//! ends before the call returns, so that who forks afterwards is as alone as before.

use std::sync::{
    atomic::{AtomicUsize, Ordering},
    mpsc::sync_channel,
};

use nix::sys::signal::SigSet;

use crate::error::{Error, Result};

/// Fewer are not worth a thread.
const MANY: usize = 64;
/// How many are taken at a time.
const CHUNK: usize = 16;
/// How many results may wait.
const AHEAD: usize = 4;
/// How many things may wait for [`behind`].
const BEHIND: usize = 8;

/// What `each` gives for all, in their order.
pub(crate) fn map<T: Sync, R: Send>(all: &[T], each: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    map_beside(all, each, || ()).1
}

/// The same, and what `meanwhile` gives, which is done by the calling thread first.
pub(crate) fn map_beside<T: Sync, R: Send, M>(
    all: &[T],
    each: impl Fn(&T) -> Result<R> + Sync,
    meanwhile: impl FnOnce() -> M,
) -> (M, Result<Vec<R>>) {
    halved(all, MANY, CHUNK, each, meanwhile)
}

/// The same for things that each take long.
pub(crate) fn large_beside<T: Sync, R: Send, M>(
    all: &[T],
    each: impl Fn(&T) -> Result<R> + Sync,
    meanwhile: impl FnOnce() -> M,
) -> (M, Result<Vec<R>>) {
    halved(all, 2, 1, each, meanwhile)
}

/// By two threads from `many` on, `chunk` at a time.
fn halved<T: Sync, R: Send, M>(
    all: &[T],
    many: usize,
    chunk: usize,
    each: impl Fn(&T) -> Result<R> + Sync,
    meanwhile: impl FnOnce() -> M,
) -> (M, Result<Vec<R>>) {
    if all.len() < many {
        return (meanwhile(), all.iter().map(each).collect());
    }
    let next = AtomicUsize::new(0);
    let share = || -> Result<Vec<(usize, Vec<R>)>> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(chunk, Ordering::Relaxed);
            if at >= all.len() {
                return Ok(done);
            }
            let these = &all[at..all.len().min(at + chunk)];
            done.push((at, these.iter().map(&each).collect::<Result<_>>()?));
        }
    };
    std::thread::scope(|scope| {
        let other = std::thread::Builder::new().name("second".into()).spawn_scoped(scope, || {
            // Signals are for the thread that may be waiting for something.
            let _ = SigSet::all().thread_block();
            share()
        });
        let result = meanwhile();
        let mine = share();
        let theirs = match other {
            Ok(other) => other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // No thread is to be had: all is done.
            Err(_) => Ok(Vec::new()),
        };
        let joined = mine.and_then(|mut done| {
            done.extend(theirs?);
            done.sort_unstable_by_key(|(at, _)| *at);
            Ok(done.into_iter().flat_map(|(_, chunk)| chunk).collect())
        });
        (result, joined)
    })
}

/// Whether [`ahead`] has a second thread for so many.
pub(crate) fn is_ahead(many: usize) -> bool {
    many > AHEAD
}

/// Has a second thread do `each` for all in their order, not far ahead of `main`, which asks for one result after the
/// other by number.
pub(crate) fn ahead<T: Sync, R: Send, M>(
    all: &[T],
    each: impl Fn(&T) -> R + Sync,
    main: impl FnOnce(&mut dyn FnMut(usize) -> R) -> M,
) -> M {
    let (sender, receiver) = sync_channel(AHEAD);
    let each = &each;
    std::thread::scope(|scope| {
        let other = is_ahead(all.len()).then(|| {
            std::thread::Builder::new().name("ahead".into()).spawn_scoped(scope, move || {
                let _ = SigSet::all().thread_block();
                // Nobody takes any more: the rest is not needed.
                let _ = all.iter().try_for_each(|one| sender.send(each(one)));
            })
        });
        match other {
            // Gone when this is over, so that the other thread ends.
            Some(Ok(_)) => {
                let mut next = move |at: usize| receiver.recv().unwrap_or_else(|_| each(&all[at]));
                main(&mut next)
            }
            _ => main(&mut |at| each(&all[at])),
        }
    })
}

/// Has a second thread do `each` for everything that `main` hands over, in that order, if there is `much` of it; gives
/// what `main` gives, and what `each` does.
///
/// # Errors
/// Of either. After an error of `each` nothing is taken any more.
pub(crate) fn behind<T: Send, R: Send, M>(
    much: bool,
    each: impl Fn(T) -> Result<R> + Sync,
    main: impl FnOnce(&mut dyn FnMut(T) -> Result<()>) -> Result<M>,
) -> Result<(M, Vec<R>)> {
    let (sender, receiver) = sync_channel(BEHIND);
    let each = &each;
    std::thread::scope(|scope| {
        let other = much.then(|| {
            std::thread::Builder::new().name("behind".into()).spawn_scoped(scope, move || {
                let _ = SigSet::all().thread_block();
                receiver.into_iter().map(each).collect::<Result<Vec<R>>>()
            })
        });
        let Some(Ok(other)) = other else {
            let mut done = Vec::new();
            let given = main(&mut |one| {
                done.push(each(one)?);
                Ok(())
            })?;
            return Ok((given, done));
        };
        // Why nobody takes it, the thread tells.
        let mut give = move |one| sender.send(one).map_err(|_| Error::bug("the second thread is gone"));
        let given = main(&mut give);
        drop(give);
        let done = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((given?, done))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        for count in [0, 1, MANY - 1, MANY, 1000, 1001] {
            let all: Vec<usize> = (0..count).collect();
            let (meanwhile, doubled) = map_beside(&all, |n| Ok(n * 2), || 7);
            assert_eq!(meanwhile, 7);
            assert_eq!(doubled.unwrap(), all.iter().map(|n| n * 2).collect::<Vec<_>>());
            let (meanwhile, doubled) = large_beside(&all, |n| Ok(n * 2), || 7);
            assert_eq!(meanwhile, 7);
            assert_eq!(doubled.unwrap(), all.iter().map(|n| n * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn results_come_in_order_and_need_not_all_be_taken() {
        for (count, taken) in [(0, 0), (1, 1), (3, 3), (100, 100), (100, 7), (100, 0)] {
            let all: Vec<usize> = (0..count).collect();
            let got = ahead(&all, |n| n * 2, |next| (0..taken).map(next).collect::<Vec<_>>());
            assert_eq!(got, (0..taken).map(|n| n * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_handed_over_is_done_in_order() {
        for (much, count) in [(false, 10), (true, 0), (true, 3), (true, 1000)] {
            let main = |give: &mut dyn FnMut(usize) -> Result<()>| (0..count).try_for_each(give).map(|()| 7);
            let (given, done) = behind(much, |n| Ok(n * 2), main).unwrap();
            assert_eq!((given, done), (7, (0..count).map(|n| n * 2).collect()));
        }
    }

    #[test]
    fn the_second_thread_tells_its_own_error() {
        let each = |n| if n == 5 { Err(Error::bug("bad")) } else { Ok(n) };
        for much in [false, true] {
            let all = |give: &mut dyn FnMut(usize) -> Result<()>| (0..1000).try_for_each(give);
            assert!(behind(much, each, all).unwrap_err().to_string().contains("bad"));
            let ends = |_: &mut dyn FnMut(usize) -> Result<()>| Err::<(), _>(Error::bug("worse"));
            assert!(behind(much, each, ends).unwrap_err().to_string().contains("worse"));
        }
    }

    #[test]
    fn an_error_is_told() {
        let all: Vec<usize> = (0..1000).collect();
        for bad in [0, 500, 999] {
            let result = map(&all, |n| if *n == bad { Err(Error::bug("bad")) } else { Ok(*n) });
            assert!(result.is_err());
        }
    }
}
