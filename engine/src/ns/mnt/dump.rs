//! Dump of mount namespaces.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    dir::Dir,
    fcntl::{OFlag, openat},
    sched::CloneFlags,
    sys::stat::{Mode, SFlag, fstat, stat},
};
use rcriu_images::{ImageDir, ImageKind};

use super::{
    beside, content, external, flags,
    fstypes::Again,
    ids::IdMaps,
    mount::{Mount, device},
    paths::shown,
    reach, terminals,
    tree::{Source, Tree},
};
use crate::{
    error::{Context, Error, Result, SysContext},
    ns::enter,
    options::{CommonOptions, DumpOptions},
    procfs::{ProcDir, mountinfo},
    pstree::RealPid,
};

/// What a dump of the mount namespaces of a tree needs.
#[derive(Debug)]
pub struct DumpMounts<'a> {
    /// A task in each, and its number in the images: that of the root task first, whose user and cgroup namespaces
    /// mounts belong to.
    pub spaces: &'a [(RealPid, u32)],
    pub opts: &'a DumpOptions,
    pub images: &'a ImageDir,
    /// Numbers of terminals whose masters are open in the tree.
    pub masters: &'a [u32],
}

/// The mounts that were dumped, for all that refers to them.
#[derive(Debug)]
pub struct Table {
    tree: Tree,
}

impl Table {
    /// The mount with this number of mountinfo and of the files' images; `None` also for one that was left out.
    pub fn mount(&self, id: u32) -> Option<&Mount> {
        self.tree.mount(id)
    }

    /// All mounts, in the order of the kernel's table.
    pub fn mounts(&self) -> &[Mount] {
        &self.tree.mounts
    }

    /// Checks that a file, found at `path` of the namespace on mount `id`, can be found there again.
    ///
    /// # Errors
    /// A mount that was left out or is not of this namespace; a file that is hidden by other mounts.
    pub fn check_file(&self, id: u32, path: &[u8]) -> Result<()> {
        if self.tree.mount(id).is_none() {
            let what = format!("{} is on mount {id}, which is not among those dumped", shown(path));
            return Err(Error::unsupported(what));
        }
        self.tree.path(id, path).map(drop)
    }
}

/// Writes `mountpoints-ID.img` of each and the content of file systems that live in memory.
///
/// Precondition: nobody in the namespaces runs.
///
/// # Errors
/// What no restore could make again, by name, with the flag that would help.
pub fn dump(cx: &DumpMounts<'_>) -> Result<Table> {
    let (first, _) = *cx.spaces.first().ok_or_else(|| Error::bug("no namespace"))?;
    let maps = IdMaps::read(first)?;
    let ours: Vec<Mount> = mountinfo::own()?.iter().map(Mount::from_kernel).collect();
    let host = if cx.opts.common.external_mounts.auto { &ours[..] } else { &[] };
    let mut tables: Vec<(u32, Vec<Mount>)> = Vec::new();
    for (pid, id) in cx.spaces {
        let of_root = tables.first().map(|(_, mounts)| &mounts[..]);
        let mounts = listed(*pid, of_root, &maps, host, &cx.opts.common)?;
        tables.push((*id, mounts));
    }
    let tree = Tree::new(tables).map_err(|e| match e.kind() {
        // The kernel's own table is no image.
        crate::error::Kind::Image(text) => Error::host(format!("the table of mounts: {text}")),
        _ => e,
    })?;
    for at in 0..tree.mounts.len() {
        tree.context(at, check(&tree, at, cx))?;
    }
    contents(&tree, cx, &maps, &ours)?;
    for space in &tree.spaces {
        let mut out = cx.images.writer(ImageKind::Mnts, space.id.into());
        // As CRIU has it: the last comes first.
        for mount in tree.mounts.get(space.mounts.clone()).unwrap_or_default().iter().rev() {
            out.write(&mount.entry())?;
        }
        out.finish()?;
    }
    Ok(Table { tree })
}

impl DumpMounts<'_> {
    /// A task in the namespace that the mount at a position of `tree` is in.
    fn task(&self, tree: &Tree, at: usize) -> Result<RealPid> {
        let space = self.spaces.get(tree.space_of(at));
        space.map(|(pid, _)| *pid).ok_or_else(|| Error::bug("a namespace without a task"))
    }
}

/// The mounts of the namespace of task `pid`, as images have them; `of_root` are those of the root task, if that is in
/// another.
fn listed(
    pid: RealPid,
    of_root: Option<&[Mount]>,
    maps: &IdMaps,
    host: &[Mount],
    opts: &CommonOptions,
) -> Result<Vec<Mount>> {
    let lines = table(pid, CloneFlags::CLONE_NEWNS)?;
    let groups = groups_inside(pid)?;
    let mut mounts = lines.iter().map(Mount::from_kernel).collect::<Vec<_>>();
    check_all_there(pid, &lines)?;
    let own = groups.iter().filter(|(_, root)| !is_above(root)).map(|(id, _)| *id).collect();
    external::mark(&mut mounts, of_root.unwrap_or_default(), (host, &own), opts);
    leave_out(&mut mounts, opts)?;
    for mount in &mut mounts {
        prepare(mount, opts, maps, groups.get(&mount.id)).during(|| mount.name())?;
    }
    for mount in mounts.iter().filter(|m| m.outside.is_none() && (of_root.is_some() || m.point != b"/")) {
        let line = lines.iter().find(|line| line.id.cast_unsigned() == mount.id);
        let unknown = line.and_then(|line| flags::of_mount(&line.options).1.first().map(|w| shown(w)));
        if let Some(word) = unknown {
            let point = shown(&mount.point);
            return Err(Error::unsupported(format!("its option {word} cannot be set again"))
                .remedy(format!("dump with --external mnt[{point}]:NAME"))
                .during(mount.name()));
        }
    }
    Ok(mounts)
}

fn differs(pid: RealPid, kind: &str) -> Result<bool> {
    let theirs = ProcDir::open(pid)?.link(&format!("ns/{kind}"));
    let ours = std::fs::read_link(format!("/proc/self/ns/{kind}"));
    Ok(matches!((ours, theirs), (Ok(ours), Ok(theirs)) if ours != theirs))
}

/// Roots of mounts of control groups as they are seen in the task's cgroup namespace, by number; none if it is ours.
fn groups_inside(pid: RealPid) -> Result<HashMap<u32, Vec<u8>>> {
    if !differs(pid, "cgroup")? {
        return Ok(HashMap::new());
    }
    let lines = table(pid, CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)?;
    let groups = lines.into_iter().filter(|line| line.fs_type.starts_with(b"cgroup"));
    Ok(groups.map(|line| (line.id.cast_unsigned(), line.root)).collect())
}

/// Whether a root seen in a cgroup namespace lies outside of it.
fn is_above(root: &[u8]) -> bool {
    root == b"/.." || root.starts_with(b"/../")
}

/// The root folder of the mount namespace of task `pid`, and mountinfo as seen from there: all mounts that paths lead to,
/// wherever the root of the task is.
pub fn look(pid: RealPid) -> Result<(OwnedFd, Vec<u8>)> {
    look_from(pid, CloneFlags::CLONE_NEWNS)
}

/// The same, seen from the task's namespaces of `kinds`.
fn look_from(pid: RealPid, kinds: CloneFlags) -> Result<(OwnedFd, Vec<u8>)> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let proc = nix::fcntl::open("/proc", flags, Mode::empty()).call("open(/proc)")?;
    enter::inside(pid, kinds, || {
        let root = nix::fcntl::open("/", flags, Mode::empty()).call("open(/)")?;
        let name = "thread-self/mountinfo";
        let file = openat(&proc, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
        let mut bytes = Vec::new();
        std::fs::File::from(file.call("open(mountinfo)")?).read_to_end(&mut bytes).call("read(mountinfo)")?;
        Ok((root, bytes))
    })
}

fn table(pid: RealPid, kinds: CloneFlags) -> Result<Vec<mountinfo::Mount>> {
    let (_, bytes) = look_from(pid, kinds)?;
    mountinfo::parse(&bytes).ok_or_else(|| Error::host(format!("mountinfo of task {pid} is not understood")))
}

/// The task must not be in a root that is hidden by another, from which the table does not come.
fn check_all_there(pid: RealPid, lines: &[mountinfo::Mount]) -> Result<()> {
    let bytes = ProcDir::open(pid)?.read("mountinfo")?;
    let seen = mountinfo::parse(&bytes)
        .ok_or_else(|| Error::host(format!("mountinfo of task {pid} is not understood")))?;
    let known: HashSet<i32> = lines.iter().map(|line| line.id).collect();
    match seen.iter().find(|line| !known.contains(&line.id)) {
        None => Ok(()),
        Some(line) => Err(Error::unsupported(format!(
            "mount {} on {}, which task {pid} sees, is hidden behind the root of its mount namespace",
            line.id,
            shown(&line.point)
        ))),
    }
}

/// What the table does not show, or not as whoever restores needs it.
fn prepare(mount: &mut Mount, opts: &CommonOptions, maps: &IdMaps, groups: Option<&Vec<u8>>) -> Result<()> {
    let kind = mount.kind.map_or("", |kind| kind.name);
    match groups {
        None => {}
        Some(_) if mount.outside.is_some() => mount.root = Some(b"/".to_vec()),
        Some(root) if is_above(root) => {
            let point = shown(&mount.point);
            return Err(Error::unsupported(
                "it shows control groups above those of the tree's cgroup namespace, in which it cannot be made again",
            )
            .remedy(format!(
                "dump with --external mnt[{point}]:NAME, restore with --external mnt[NAME]:PATH"
            )));
        }
        Some(root) => mount.root = Some(root.clone()),
    }
    if kind == "devpts" {
        let ours = stat("/dev/pts").map(|s| device(libc::major(s.st_dev), libc::minor(s.st_dev)));
        if ours != Ok(mount.dev) {
            // The kernel does not tell it. Without it, old kernels mount the host's.
            let text = [&mount.options[..], b"newinstance"];
            mount.options = text.into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join(&b',');
        }
    }
    if mount.kind.is_none() && opts.enable_fs.allows(&String::from_utf8_lossy(&mount.fs_name)) {
        mount.by_name = true;
    }
    if !maps.are_plain() {
        let word = |word: &[u8]| {
            let id = |rest: &[u8]| crate::procfs::number::<u32>(rest);
            if let Some(user) = word.strip_prefix(b"uid=").and_then(id) {
                return Ok(format!("uid={}", maps.user(user)?).into_bytes());
            }
            if let Some(group) = word.strip_prefix(b"gid=").and_then(id) {
                return Ok(format!("gid={}", maps.group(group)?).into_bytes());
            }
            Ok(word.to_vec())
        };
        let words = mount.options.split(|c| *c == b',').map(word).collect::<Result<Vec<_>>>()?;
        mount.options = words.join(&b',');
    }
    Ok(())
}

/// Mounts the user wants out, and those the kernel makes by itself.
fn leave_out(mounts: &mut Vec<Mount>, opts: &CommonOptions) -> Result<()> {
    let debugfs: HashSet<u32> =
        mounts.iter().filter(|m| m.kind.is_some_and(|k| k.name == "debugfs")).map(|m| m.id).collect();
    let mut out = HashSet::new();
    for mount in mounts.iter() {
        let path = Path::new(OsStr::from_bytes(&mount.point));
        let unwanted = opts.skip_mnt.iter().any(|skip| skip == path);
        let by_itself = mount.kind.is_some_and(|k| k.name == "tracefs") && debugfs.contains(&mount.parent);
        if unwanted || by_itself {
            log::info!("{} is left out", mount.name());
            out.insert(mount.id);
        }
    }
    if let Some(on) = mounts.iter().find(|m| out.contains(&m.parent) && !out.contains(&m.id)) {
        return Err(Error::usage("the mount it is on is left out")
            .remedy(format!("give --skip-mnt {} too", shown(&on.point)))
            .during(on.name()));
    }
    mounts.retain(|m| !out.contains(&m.id));
    Ok(())
}

/// Refuses what the tree alone does not show.
fn check(tree: &Tree, at: usize, cx: &DumpMounts<'_>) -> Result<()> {
    let mount = tree.at(at)?;
    beside::check(tree, at, cx.task(tree, at)?)?;
    terminals::check(tree, at)?;
    if let Some(number) = terminals::number(tree, at)
        && !cx.masters.contains(&number)
        && !cx.opts.common.orphan_pts_master
    {
        let point = shown(&mount.point);
        return Err(Error::unsupported(format!(
            "the terminal /dev/pts/{number} belongs to somebody outside of the tree"
        ))
        .remedy(format!(
            "of LXC: set `lxc.tty.max = 0`; others: dump with --external mnt[{point}]:NAME, restore with --external \
             mnt[NAME]:PATH"
        )));
    }
    if mount.deleted && mount.outside.is_none() && !matches!(tree.sources.get(at), Some(Source::Of(_))) {
        return Err(Error::unsupported("what it shows was removed from its file system"));
    }
    Ok(())
}

/// File systems whose content is nowhere else.
fn contents(tree: &Tree, cx: &DumpMounts<'_>, maps: &IdMaps, ours: &[Mount]) -> Result<()> {
    let mut done = HashSet::new();
    for (at, mount) in tree.mounts.iter().enumerate() {
        tree.context(at, deleted(tree, at, cx))?;
        let new = tree.sources.get(at) == Some(&Source::New) && mount.outside.is_none();
        let again = mount.kind.map(|kind| kind.again).filter(|_| new);
        if !matches!(again, Some(Again::Content | Again::Empty)) || !done.insert(mount.dev) {
            continue;
        }
        if again == Some(Again::Content) && ours.iter().any(|m| m.dev == mount.dev) {
            let name = mount.name();
            log::warn!("{name} is mounted on the host too: what comes back is a copy of its own");
        }
        let dump = || {
            let folder = whole(tree, at, cx, maps)?;
            if again == Some(Again::Content) {
                return content::pack(folder.as_fd(), mount.dev, cx.images, maps);
            }
            let mut dir = Dir::from_fd(folder).call("fdopendir")?;
            let found = dir.iter().filter_map(std::result::Result::ok).map(|e| e.file_name().to_owned());
            match found.filter(|name| ![c".", c".."].contains(&name.as_c_str())).min() {
                None => Ok(()),
                Some(name) => Err(Error::unsupported(format!(
                    "a file system of type {} is kept only if it is empty, and {} is in it",
                    mount.kind.map_or("", |kind| kind.name),
                    shown(name.to_bytes())
                ))
                .remedy("remove what is in it")),
            }
        };
        tree.context(at, dump())?;
    }
    Ok(())
}

/// The root folder of a file system that `at` is a mount of: by any mount of the whole of it that can be reached.
fn whole(tree: &Tree, at: usize, cx: &DumpMounts<'_>, maps: &IdMaps) -> Result<OwnedFd> {
    let dev = tree.at(at)?.dev;
    let mut first = None;
    let same = |(_, m): &(usize, &Mount)| m.dev == dev && m.is_whole() && !m.deleted;
    for (candidate, _) in tree.mounts.iter().enumerate().filter(same) {
        match reach::folder(tree, candidate, cx.task(tree, candidate)?, !maps.are_plain()) {
            Ok(folder) => return Ok(folder),
            Err(e) => first = first.or(Some(e)),
        }
    }
    Err(first.unwrap_or_else(|| Error::bug("a file system without a mount")))
}

/// What is mounted although it was removed comes back empty: so it must be.
fn deleted(tree: &Tree, at: usize, cx: &DumpMounts<'_>) -> Result<()> {
    let mount = tree.at(at)?;
    if !mount.deleted || mount.outside.is_some() {
        return Ok(());
    }
    if tree.is_hidden(at)? {
        return Err(Error::unsupported("what it shows was removed, and is hidden by other mounts"));
    }
    let pid = cx.task(tree, at)?;
    let found = enter::inside(pid, CloneFlags::CLONE_NEWNS, || fstat(&reach::find(mount)?).call("fstat"))?;
    match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFREG if found.st_size == 0 => Ok(()),
        SFlag::S_IFDIR => Ok(()),
        SFlag::S_IFREG => Err(Error::unsupported("the file it shows was removed, and has content")),
        _ => Err(Error::unsupported("what it shows was removed, and is neither file nor folder")),
    }?;
    log::warn!("{}: owner and permissions of what was removed are not kept", mount.name());
    Ok(())
}
