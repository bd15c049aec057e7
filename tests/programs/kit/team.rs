//! A team of threads, the first one among them, each with state of its own.

use std::sync::mpsc;

use anyhow::{Context, Result, anyhow};

use super::{Check, rest};

/// Has `set` set something up in the first thread (as number 0) and in `others` more; when the program is asked
/// for its verdict, each checks what it had set up. The first trouble counts.
pub fn run<T: 'static>(others: usize, set: fn(usize) -> Result<T>, check: fn(usize, T) -> Check) -> Check {
    let mut members = Vec::new();
    for i in 1..=others {
        let (told, ready) = mpsc::channel::<Result<()>>();
        let (go, gone) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(move || -> Check {
            let mine = match set(i) {
                Ok(mine) => mine,
                Err(e) => {
                    let _ = told.send(Err(e));
                    return Ok(());
                }
            };
            let _ = told.send(Ok(()));
            gone.recv().context("the first thread")?;
            check(i, mine)
        });
        members.push((thread.context("starting a thread")?, ready, go));
    }
    // A thread that was not asked any more sees its channel close.
    for (_, ready, _) in &members {
        ready.recv().context("a thread")??;
    }
    // Last: what the first thread does to itself must not come to the others by inheritance.
    let mine = set(0)?;
    rest()?;
    check(0, mine).context("first thread")?;
    for (i, (thread, _, go)) in members.into_iter().enumerate() {
        go.send(()).context("a thread")?;
        thread
            .join()
            .map_err(|_| anyhow!("it panicked"))
            .and_then(|verdict| verdict)
            .with_context(|| format!("thread {}", i + 1))?;
    }
    Ok(())
}
