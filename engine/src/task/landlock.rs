//! Landlock domains (landlock(7)): restrictions that a thread has put on itself and its children. No interface
//! tells of them, and none could make one again, so a dump refuses them.
//!
//! What gives them away: a thread in a domain must not inspect a process outside of it, not even one of its own
//! user. Each thread is made to try, on a process that it could inspect otherwise, and that it can see: one in the
//! pid and user namespaces of the tree.

use std::collections::{HashMap, hash_map::Entry};

use parasite::thread::ThreadInfo;

use nix::{fcntl::OFlag, sched::CloneFlags};

use crate::{
    dump::collect::Pstree,
    error::{Error, Result},
    infect::{Infected, StoppedThread},
    ns::user::Ids,
    procfs::{ProcDir, status::Status, trim},
    pstree::RealPid,
    sys::{
        bystander::{Bystander, Place},
        landlock,
    },
};

/// `CAP_SYS_PTRACE`.
const CAP_SYS_PTRACE: u64 = 1 << 19;
const DENIED: i64 = -(libc::EPERM as i64);

/// Processes to be inspected, made as they are needed.
#[derive(Debug)]
pub struct Landlock {
    enabled: bool,
    /// By real user and group, with the number that the tree knows them by.
    bystanders: HashMap<(u32, u32), (Bystander, RealPid)>,
    /// Where the tree is, if not beside us.
    place: Option<Place>,
    ids: Ids,
}

impl Landlock {
    /// Asks whether the kernel has it; `ids` are those of the user namespace of `tree`.
    pub fn ask(tree: &Pstree, ids: Ids) -> Result<Landlock> {
        let open = |flag, name| match tree.tasks.first() {
            Some(root) if tree.namespaces.contains(flag) => root.dir.file(name, OFlag::O_RDONLY).map(Some),
            _ => Ok(None),
        };
        let place = Place {
            pids: open(CloneFlags::CLONE_NEWPID, "ns/pid")?,
            users: open(CloneFlags::CLONE_NEWUSER, "ns/user")?,
        };
        let place = Some(place).filter(|place| place.pids.is_some() || place.users.is_some());
        Ok(Landlock { enabled: landlock::is_enabled(), bystanders: HashMap::new(), place, ids })
    }

    /// Whom the thread is to inspect; 0 for nobody.
    pub fn target(&mut self, status: &Status) -> Result<RealPid> {
        if !self.enabled {
            return Ok(RealPid(0));
        }
        // Those may inspect this very process.
        if self.place.is_none() && status.uid == [0; 4] && status.cap_eff & CAP_SYS_PTRACE != 0 {
            return Ok(RealPid(std::process::id().cast_signed()));
        }
        self.bystander(status)
    }

    fn bystander(&mut self, status: &Status) -> Result<RealPid> {
        let (uid, gid) = (status.uid[0], status.gid[0]);
        Ok(match self.bystanders.entry((uid, gid)) {
            Entry::Occupied(known) => known.get().1,
            Entry::Vacant(new) => {
                let (uid, gid) = (self.ids.user(uid), self.ids.group(gid));
                let bystander = match &self.place {
                    Some(place) => Bystander::start(uid, gid, place)?,
                    None => Bystander::start(uid, gid, &Place::default())?,
                };
                let numbers = Status::read(&ProcDir::open(bystander.pid())?)?.nspid;
                let seen = match &self.place {
                    Some(Place { pids: Some(_), .. }) => numbers.last().map(|last| RealPid(*last)),
                    _ => None,
                };
                let seen = seen.unwrap_or(bystander.pid());
                new.insert((bystander, seen)).1
            }
        })
    }

    /// Refuses a thread that was not let through, as `info` says.
    pub fn check(
        &mut self,
        infected: &Infected<'_>,
        thread: &StoppedThread,
        status: &Status,
        info: &ThreadInfo,
    ) -> Result<()> {
        if !self.enabled || info.inspection != DENIED {
            return Ok(());
        }
        // One that has no right by itself at all.
        let again = infected.thread_info_and(thread, self.bystander(status)?, false)?;
        if again.inspection != DENIED {
            return Ok(());
        }
        let tid = thread.tid();
        if is_confined(tid)? {
            log::warn!(
                "Whether thread {tid} has a Landlock domain cannot be told: another security module confines it"
            );
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "thread {tid} has restricted itself with Landlock, and no such restriction can be made again"
        ))
        .remedy("run the program without its sandbox"))
    }
}

/// Whether AppArmor, SELinux or Smack confine the thread.
fn is_confined(tid: RealPid) -> Result<bool> {
    match ProcDir::open(tid)?.read("attr/current") {
        Ok(label) => {
            let label = trim(label.strip_suffix(b"\0").unwrap_or(&label));
            Ok(!label.is_empty() && !label.starts_with(b"unconfined") && !label.ends_with(b"unconfined_t"))
        }
        Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP)) => Ok(false),
        Err(e) => Err(e),
    }
}
