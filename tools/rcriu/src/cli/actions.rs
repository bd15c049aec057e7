//! What the program can be asked to do: the first word of the command line.

/// One action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Write images of a tree.
    Dump,
    /// Write its memory only, while it goes on.
    PreDump,
    /// Bring a tree back.
    Restore,
    /// Ask the kernel for what we need.
    Check,
    /// Receive pages of a dump elsewhere.
    PageServer,
    /// Fill pages of a lazy restore.
    LazyPages,
    /// Serve requests over a socket.
    Service,
    /// Serve one client over an inherited socket.
    Swrk,
    /// The same for a client of [`Action::Service`]; not for people.
    ServiceWorker,
    /// Punch out of parent images what later ones hold.
    Dedup,
    /// Write the image of CPU features.
    CpuinfoDump,
    /// Compare that image with this CPU.
    CpuinfoCheck,
    /// CRIU's old system call injection.
    Exec,
}

impl Action {
    /// Those that help lists.
    pub const LISTED: &[Action] = &[
        Action::Dump,
        Action::PreDump,
        Action::Restore,
        Action::Check,
        Action::PageServer,
        Action::LazyPages,
        Action::Service,
        Action::Dedup,
        Action::CpuinfoDump,
        Action::CpuinfoCheck,
    ];

    /// Those that are not for people.
    pub const UNLISTED: &[Action] = &[Action::Swrk, Action::ServiceWorker, Action::Exec];

    /// As typed.
    pub fn name(self) -> &'static str {
        match self {
            Action::Dump => "dump",
            Action::PreDump => "pre-dump",
            Action::Restore => "restore",
            Action::Check => "check",
            Action::PageServer => "page-server",
            Action::LazyPages => "lazy-pages",
            Action::Service => "service",
            Action::Swrk => "swrk",
            Action::ServiceWorker => crate::service::WORKER,
            Action::Dedup => "dedup",
            Action::CpuinfoDump => "cpuinfo dump",
            Action::CpuinfoCheck => "cpuinfo check",
            Action::Exec => "exec",
        }
    }

    /// One line for help.
    pub fn help(self) -> &'static str {
        match self {
            Action::Dump => "Write a checkpoint of a process tree",
            Action::PreDump => "Write its memory ahead, to freeze it for less time later",
            Action::Restore => "Bring a process tree back from its checkpoint",
            Action::Check => "Tell whether this kernel has what is needed",
            Action::PageServer => "Receive memory pages from a dump elsewhere",
            Action::LazyPages => "Fill in memory of a restore with --lazy-pages",
            Action::Service => "Serve requests over a unix socket",
            Action::Swrk => "Serve one client over an inherited socket",
            Action::ServiceWorker => "Serve one client of the service",
            Action::Dedup => "Free in parent images what newer ones hold again",
            Action::CpuinfoDump => "Write the features of this CPU to an image",
            Action::CpuinfoCheck => "Compare this CPU with that image",
            Action::Exec => "Removed",
        }
    }

    /// Finds the action in the words of the command line and takes it away from them.
    pub fn take(words: &mut Vec<std::ffi::OsString>) -> Result<Action, String> {
        if words.is_empty() {
            return Err("a command is required".into());
        }
        let word = words.remove(0);
        let word = word.to_string_lossy().into_owned();
        if word == "cpuinfo" {
            let sub =
                if words.is_empty() { String::new() } else { words.remove(0).to_string_lossy().into_owned() };
            return match sub.as_str() {
                "dump" => Ok(Action::CpuinfoDump),
                "check" => Ok(Action::CpuinfoCheck),
                "" => Err("cpuinfo needs to be told: dump or check".into()),
                other => Err(format!("cpuinfo knows dump and check, not {other}")),
            };
        }
        Action::LISTED
            .iter()
            .chain(Action::UNLISTED)
            .find(|a| a.name() == word)
            .copied()
            .ok_or_else(|| format!("unknown command: {word}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(words: &[&str]) -> Result<(Action, usize), String> {
        let mut words = words.iter().map(std::ffi::OsString::from).collect();
        Action::take(&mut words).map(|a| (a, words.len()))
    }

    #[test]
    fn every_action_is_found_by_its_name() {
        for action in Action::LISTED.iter().chain(Action::UNLISTED) {
            let words: Vec<&str> = action.name().split(' ').collect();
            assert_eq!(take(&words), Ok((*action, 0)));
        }
        assert_eq!(take(&["restore", "ls"]), Ok((Action::Restore, 1)));
    }

    #[test]
    fn unknown_words_are_named() {
        assert_eq!(take(&["fly"]), Err("unknown command: fly".into()));
        assert!(take(&[]).is_err() && take(&["cpuinfo"]).is_err() && take(&["cpuinfo", "x"]).is_err());
    }
}
