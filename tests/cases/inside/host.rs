//! What of this process's own world a dump or restore of a tree in other namespaces could leave behind.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rcriu_tests::state::processes;

use crate::failures::{below, take_dead};

/// How long what cleans up after a killed dump may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Mounts, devices with their addresses, processes, namespaces.
#[derive(Debug, PartialEq, Eq)]
pub struct Host {
    facts: BTreeSet<String>,
}

impl Host {
    /// As they are now.
    pub fn now() -> Result<Host> {
        let mut facts = BTreeSet::new();
        let mut add = |what: &str, path: &str, wanted: fn(&str) -> Option<&str>| -> Result<()> {
            let text = fs::read_to_string(path).context(what.to_string())?;
            facts.extend(text.lines().filter_map(wanted).map(|line| format!("{what} {line}")));
            Ok(())
        };
        add("mount", "/proc/self/mountinfo", |line| Some(line))?;
        add("device", "/proc/self/net/dev", |line| line.split_once(':').map(|(name, _)| name.trim()))?;
        add("address", "/proc/self/net/fib_trie", |line| Some(line))?;
        for process in processes()? {
            for namespace in ["pid", "net", "mnt", "uts", "ipc", "user", "cgroup"] {
                if let Ok(link) = fs::read_link(format!("/proc/{}/ns/{namespace}", process.pid)) {
                    facts.insert(format!("namespace {}", link.display()));
                }
            }
        }
        facts.extend(below()?.into_iter().map(|pid| format!("process {pid}")));
        Ok(Host { facts })
    }

    /// Fails if anything has come or gone since.
    pub fn unchanged(&self) -> Result<()> {
        let now = Host::now()?;
        let new: Vec<&String> = now.facts.difference(&self.facts).collect();
        let gone: Vec<&String> = self.facts.difference(&now.facts).collect();
        ensure!(new.is_empty() && gone.is_empty(), "outside of the tree, new: {new:?}; gone: {gone:?}");
        Ok(())
    }

    /// The same once the guardian of a dump that was killed has ended.
    pub fn settles(&self) -> Result<()> {
        let enough = Instant::now() + PATIENCE;
        loop {
            take_dead();
            match self.unchanged() {
                Err(_) if Instant::now() < enough => std::thread::sleep(Duration::from_millis(2)),
                result => return result,
            }
        }
    }
}
