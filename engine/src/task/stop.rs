//! What the parent of a stopped task knows of the stop.
//!
//! The kernel tells a parent twice: by SIGCHLD when the child stops, and by wait(2) once. Images have no field for
//! that, but the exit code of a task that lives means nothing to CRIU, which always writes 0.

/// How much of the news of a stop has reached the parent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    /// Nothing, or nobody knows: a restore tells the parent as a stop does. The task did not stand still yet when
    /// it was dumped, or CRIU dumped it.
    Untold,
    /// SIGCHLD was sent, wait(2) would tell that this signal stopped the task.
    Signalled(u8),
    /// wait(2) has told so.
    Taken(u8),
}

impl News {
    /// Of a task stopped by `signal` whose exit code is `code` in /proc: the signal that wait(2) would tell, or 0.
    pub fn of(signal: Option<i32>, code: i32) -> News {
        match signal.map(u8::try_from) {
            Some(Ok(signal)) if code == 0 => News::Taken(signal),
            Some(Ok(signal)) => News::Signalled(signal),
            _ => News::Untold,
        }
    }

    /// As `exit_code`: for a stop that was told, the status that wait(2) gave.
    pub fn to_image(self) -> u32 {
        match self {
            News::Untold => 0,
            News::Signalled(signal) => signal.into(),
            News::Taken(signal) => u32::from(signal) << 8 | 0x7f,
        }
    }

    /// From `exit_code`.
    pub fn from_image(code: u32) -> News {
        match (code >> 8, code & 0xff) {
            (0, signal @ 1..=64) => News::Signalled(signal as u8),
            (signal @ 1..=64, 0x7f) => News::Taken(signal as u8),
            _ => News::Untold,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_parent_knows_passes_through_images() {
        let told = |signal, code| News::of(signal, code).to_image();
        assert_eq!([told(None, 0), told(Some(19), 19), told(Some(19), 0)], [0, 19, 0x137f]);
        for news in [News::Untold, News::Signalled(20), News::Taken(22)] {
            assert_eq!(News::from_image(news.to_image()), news);
        }
        assert_eq!(News::from_image(u32::MAX), News::Untold);
    }
}
