//! The user namespace: which ids of ours are which inside (user_namespaces(7)), in `userns-ID.img`.
//!
//! A process outside sees ids of its own namespace: in /proc, from stat(2) and fcntl(2), from the ipc calls. Images hold
//! the ids that the tree itself sees, so that it can be restored on other ids of the host. All of these are read from
//! outside here and go through [`UserNs::image_uid`] and [`UserNs::image_gid`]:
//!
//! ```text
//! image              fields                         read by
//! core               creds: uid..fsgid, groups      /proc/PID/status
//! core               tc.loginuid                    /proc/PID/loginuid
//! files              fown.uid, .euid                fcntl(F_GETOWNER_UIDS)
//! ghost-file, memfd  uid, gid                       fstat
//! files (unix)       file_perms.uid, .gid           stat of the socket's name
//! tty-info           uid, gid                       fstat
//! ipcns-*            desc.uid, .gid, .cuid, .cgid   shmctl and the like
//! mountpoints        options: uid=N, gid=N          /proc/PID/mountinfo
//! netns              ping_group_range               sysctl
//! ```
//! Those of control groups are not translated: their folders are the host's. Archives of tmpfs are made inside.
//!
//! Whether setgroups(2) is denied inside is not in images; a tree for which it is, is warned of.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{fcntl::OFlag, sys::stat::fstat};
use rcriu_images::{ImageDir, ImageKind, pb};

use crate::{
    error::{Context, Error, Result, SysContext},
    procfs::{ProcDir, number, trim, words},
    pstree::RealPid,
    sys::{ids, nsfs},
};

/// What images have for an id without a mapping.
pub const UNMAPPED: u32 = u32::MAX;
/// Kinds that must belong to the user namespace, with their names in `/proc/PID/ns`.
const OWNED: [&str; 7] = ["net", "uts", "time", "ipc", "cgroup", "pid", "mnt"];
/// Ranges that the kernel takes at most (340 since Linux 4.15, 5 before).
const RANGES: usize = 340;

/// An image that the engine could read, but root of the tree's user namespace, who fills the tree's other namespaces,
/// perhaps cannot.
pub fn unreadable(e: Error) -> Error {
    match e.errno() {
        Some(libc::EACCES) => e.remedy(
            "root of the tree's user namespace opens it: chown -R the images folder to that user of the host",
        ),
        _ => e,
    }
}

/// Both maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserNs {
    uid: Map,
    gid: Map,
}

/// Ranges of ids; `lower_first` is ours, `first` is inside.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Map(Vec<pb::UidGidExtent>);

impl Map {
    fn inside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|e| shifted(id, e.lower_first, e.first, e.count))
    }

    fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|e| shifted(id, e.first, e.lower_first, e.count))
    }

    /// Ranges, for others who translate.
    fn ranges(&self) -> &[pb::UidGidExtent] {
        &self.0
    }

    /// As the kernel takes and shows it.
    fn text(&self) -> String {
        self.0.iter().map(|e| format!("{} {} {}\n", e.first, e.lower_first, e.count)).collect()
    }

    fn parse(bytes: &[u8]) -> Option<Map> {
        let lines = bytes.split(|c| *c == b'\n').filter(|l| !trim(l).is_empty());
        lines
            .map(|line| {
                let mut fields = words(line);
                let (first, lower_first) = (number(fields.next()?)?, number(fields.next()?)?);
                let count = number(fields.next()?)?;
                fields.next().is_none().then_some(pb::UidGidExtent { first, lower_first, count })
            })
            .collect::<Option<Vec<_>>>()
            .map(Map)
    }

    /// What the kernel would refuse.
    fn check(&self) -> Result<(), &'static str> {
        let past = |first: u32, count: u32| first.checked_add(count).is_none();
        let meet = |a: u32, n: u32, b: u32, m: u32| a < b.saturating_add(m) && b < a.saturating_add(n);
        if self.0.len() > RANGES {
            return Err("it has more ranges than a kernel takes");
        }
        if self.0.iter().any(|e| e.count == 0 || past(e.first, e.count) || past(e.lower_first, e.count)) {
            return Err("a range of it is empty or goes beyond the last id");
        }
        let pairs =
            self.0.iter().enumerate().flat_map(|(at, a)| self.0.iter().skip(at + 1).map(move |b| (a, b)));
        let both = |a: &pb::UidGidExtent, b: &pb::UidGidExtent| {
            meet(a.first, a.count, b.first, b.count) || meet(a.lower_first, a.count, b.lower_first, b.count)
        };
        if pairs.into_iter().any(|(a, b)| both(a, b)) {
            return Err("two ranges of it overlap");
        }
        if self.outside(0).is_none() {
            return Err("it has no id 0");
        }
        Ok(())
    }
}

fn shifted(id: u32, from: u32, to: u32, count: u32) -> Option<u32> {
    id.checked_sub(from).filter(|n| *n < count).and_then(|n| to.checked_add(n))
}

/// Reads the maps of the namespace of task `pid` and writes `userns-ID.img`.
///
/// World: Dump, before anything that needs ids to be translated.
///
/// # Errors
/// Another namespace of the task that belongs to a user namespace outside; no root inside, without whom nothing can
/// be restored; ids that are not mapped here.
pub fn dump(pid: RealPid, images: &ImageDir, id: u32) -> Result<UserNs> {
    let named = || format!("user namespace of task {pid}");
    let dir = ProcDir::open(pid)?;
    let namespace = UserNs::of(&dir).during(named)?;
    check_owned(&dir).during(named)?;
    if dir.read("setgroups").is_ok_and(|said| trim(&said) == b"deny") {
        log::warn!("{}: setgroups(2) is denied there; it will be allowed in the restored one", named());
    }
    let mut out = images.writer(ImageKind::Userns, id.into());
    out.write(&namespace.entry())?;
    out.finish()?;
    Ok(namespace)
}

/// Reads `userns-ID.img`. World: Plan.
///
/// # Errors
/// No such image; maps that a kernel would not take, or without root.
pub fn read(images: &ImageDir, id: u32) -> Result<UserNs> {
    let entry: pb::UsernsEntry = images.read_one(ImageKind::Userns, id.into())?;
    let namespace = UserNs { uid: Map(entry.uid_map), gid: Map(entry.gid_map) };
    for (what, map) in [("users", &namespace.uid), ("groups", &namespace.gid)] {
        map.check().map_err(|why| {
            Error::image(format!("{}: the map of {what}: {why}", ImageKind::Userns.file_name(id.into())))
        })?;
    }
    Ok(namespace)
}

impl UserNs {
    /// The maps of the namespace of a task.
    fn of(dir: &ProcDir) -> Result<UserNs> {
        let map = |name: &str| {
            let bytes = dir.read(name)?;
            let map = Map::parse(&bytes).ok_or_else(|| dir.strange(name, &bytes))?;
            let hidden = map.0.iter().any(|e| e.lower_first == UNMAPPED);
            if hidden {
                return Err(Error::unsupported(format!("its {name} has ids that do not exist here"))
                    .remedy("run the dump in the namespace in which the container was started"));
            }
            map.check().map_err(|why| {
                Error::unsupported(format!("its {name} cannot be restored: {why}"))
                    .remedy("start the container with its root mapped")
            })?;
            Ok(map)
        };
        Ok(UserNs { uid: map("uid_map")?, gid: map("gid_map")? })
    }

    fn entry(&self) -> pb::UsernsEntry {
        pb::UsernsEntry { uid_map: self.uid.0.clone(), gid_map: self.gid.0.clone() }
    }

    /// The user inside that is our `uid`.
    pub fn uid_inside(&self, uid: u32) -> Option<u32> {
        self.uid.inside(uid)
    }

    /// The group inside that is our `gid`.
    pub fn gid_inside(&self, gid: u32) -> Option<u32> {
        self.gid.inside(gid)
    }

    /// Our user that is `uid` inside.
    pub fn uid_outside(&self, uid: u32) -> Option<u32> {
        self.uid.outside(uid)
    }

    /// Our group that is `gid` inside.
    pub fn gid_outside(&self, gid: u32) -> Option<u32> {
        self.gid.outside(gid)
    }

    /// What images have for our user `uid`: the one inside, or [`UNMAPPED`].
    pub fn image_uid(&self, uid: u32) -> u32 {
        self.uid_inside(uid).unwrap_or(UNMAPPED)
    }

    /// What images have for our group `gid`: the one inside, or [`UNMAPPED`].
    pub fn image_gid(&self, gid: u32) -> u32 {
        self.gid_inside(gid).unwrap_or(UNMAPPED)
    }

    /// Ranges of users and of groups.
    pub fn ranges(&self) -> (&[pb::UidGidExtent], &[pb::UidGidExtent]) {
        (self.uid.ranges(), self.gid.ranges())
    }

    /// Acts in a thread that is a user and in a group of the namespace, with all rights over ours that this thread has:
    /// nobody else can make anything in a file system that belongs to it.
    ///
    /// World: the engine.
    pub fn acting<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let first = |map: &Map| map.ranges().first().map(|range| range.lower_first);
        let (Some(uid), Some(gid)) = (first(&self.uid), first(&self.gid)) else { return act() };
        let dumpable = nix::sys::prctl::get_dumpable().call("prctl(PR_GET_DUMPABLE)")?;
        let done = std::thread::scope(|scope| {
            let acting = scope.spawn(|| ids::become_user(uid, gid).and_then(|()| act()));
            acting.join().unwrap_or_else(|_| Err(Error::bug("a thread of another user panicked")))
        });
        // The kernel takes it away with a change of ids.
        nix::sys::prctl::set_dumpable(dumpable).call("prctl(PR_SET_DUMPABLE)")?;
        done
    }

    /// Gives the maps to the namespace of child `pid`, made with CLONE_NEWUSER and waiting.
    ///
    /// World: the engine, with CAP_SETUID and CAP_SETGID in the namespace above; without, it may map its own ids only,
    /// and setgroups(2) is denied inside. `/proc` must be that of our pid namespace, `pid` a number in it.
    ///
    /// # Errors
    /// EPERM without these capabilities or if maps are there already; EINVAL for more ranges than the kernel takes.
    pub fn write_maps(&self, pid: RealPid) -> Result<()> {
        let dir = ProcDir::open(pid)?;
        let write = |name: &str, map: &Map| {
            // Each file takes one write.
            let mut file: File = dir.file(name, OFlag::O_WRONLY)?.into();
            file.write_all(map.text().as_bytes()).call(format!("write(/proc/{pid}/{name})"))
        };
        let groups = || match write("gid_map", &self.gid) {
            // Who has no rights over groups may map their own once nobody inside can change theirs.
            Err(e) if e.errno() == Some(libc::EPERM) => {
                let mut file: File = dir.file("setgroups", OFlag::O_WRONLY)?.into();
                file.write_all(b"deny").call(format!("write(/proc/{pid}/setgroups)"))?;
                write("gid_map", &self.gid)
            }
            other => other,
        };
        write("uid_map", &self.uid).and_then(|()| groups()).during(|| "user namespace".to_owned())
    }

    /// Becomes root of the namespace that the calling thread is in, and can be looked at through /proc.
    ///
    /// World: Task, in the root of the tree once [`UserNs::write_maps`] is done; and again in each process that was
    /// forked before.
    pub fn become_root() -> Result<()> {
        ids::become_root()
            .and_then(|()| nix::sys::prctl::set_dumpable(true).call("prctl(PR_SET_DUMPABLE)"))
            .during(|| "root of the user namespace".to_owned())
    }
}

/// How ids that are read outside stand in images of a tree.
#[derive(Debug, Clone, Default)]
pub struct Ids(Option<Arc<UserNs>>);

impl Ids {
    /// Of a tree in the user namespace `user`.
    pub fn of(user: UserNs) -> Ids {
        Ids(Some(Arc::new(user)))
    }

    /// The tree's own user namespace, if it has one.
    pub fn namespace(&self) -> Option<&UserNs> {
        self.0.as_deref()
    }

    /// A user.
    pub fn user(&self, uid: u32) -> u32 {
        self.0.as_ref().map_or(uid, |user| user.image_uid(uid))
    }

    /// A group.
    pub fn group(&self, gid: u32) -> u32 {
        self.0.as_ref().map_or(gid, |user| user.image_gid(gid))
    }
}

/// Refuses namespaces of the task that are neither ours nor owned by its user namespace: those restored are all made
/// by the root inside, who would get rights that he never had.
fn check_owned(dir: &ProcDir) -> Result<()> {
    let me = ProcDir::open(RealPid(std::process::id().cast_signed()))?;
    let user = dir.file("ns/user", OFlag::O_RDONLY)?;
    let own = OWNED.iter().filter_map(|name| own(dir, &me, name).transpose()).collect::<Result<Vec<_>>>()?;
    match first_stranger(&user, &own, &|file| nsfs::owner(file))? {
        None => Ok(()),
        Some(name) => Err(Error::unsupported(format!(
            "its {name} namespace belongs to another user namespace, and would belong to this one when restored"
        ))
        .remedy("make all its namespaces together with the user namespace, or after it")),
    }
}

/// The namespace `name` of a task, if it is another one than ours.
fn own(dir: &ProcDir, me: &ProcDir, name: &'static str) -> Result<Option<(&'static str, OwnedFd)>> {
    let file = format!("ns/{name}");
    match dir.link(&file) {
        // A kernel without the kind.
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        link => {
            Ok(if link? == me.link(&file)? { None } else { Some((name, dir.file(&file, OFlag::O_RDONLY)?)) })
        }
    }
}

type Owner<'a> = dyn Fn(BorrowedFd<'_>) -> Result<Option<OwnedFd>> + 'a;

fn first_stranger(
    user: &OwnedFd,
    own: &[(&'static str, OwnedFd)],
    owner: &Owner<'_>,
) -> Result<Option<&'static str>> {
    let identity = |fd: &OwnedFd| fstat(fd).call("fstat").map(|stat| (stat.st_dev, stat.st_ino));
    let wanted = identity(user)?;
    for (name, file) in own {
        match owner(file.as_fd())? {
            Some(owner) if identity(&owner)? == wanted => {}
            Some(_) => return Ok(Some(name)),
            None => {
                let files: Vec<_> = own.iter().map(|(_, file)| file.as_fd()).collect();
                let found = nsfs::stranger(user.as_fd(), &files)?;
                return Ok(found.and_then(|at| own.get(at)).map(|(name, _)| *name));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(super) mod tests;
