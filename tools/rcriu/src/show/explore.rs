//! The explorers of crit, line for line: processes, descriptors, mappings, stored pages.

use std::{
    collections::HashMap,
    ffi::OsStr,
    io::{self, Write},
};

use anyhow::Result;
use rcriu_images::{
    ImageDir, ImageKind,
    json::text::quoted,
    pagemap::{PAGE_SIZE, Pagemap},
    pb::{FdTypes, VmaEntry},
    set::{self, ImageSet, Severity, Task},
};

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Ps,
    Fds,
    Mems,
    Rss,
}

/// `vma_entry.status` bits.
const REGULAR: u32 = 1 << 0;
const STACK: u32 = 1 << 1;
const VSYSCALL: u32 = 1 << 2;
const VDSO: u32 = 1 << 3;
const FILE_PRIVATE: u32 = 1 << 6;
const FILE_SHARED: u32 = 1 << 7;
const ANON_SHARED: u32 = 1 << 8;
const SYSVIPC: u32 = 1 << 10;
const SOCKET: u32 = 1 << 11;

const GROWSDOWN: u32 = 0x100;

impl What {
    pub fn parse(word: &OsStr) -> Option<Self> {
        Some(match word.to_str()? {
            "ps" => Self::Ps,
            "fds" => Self::Fds,
            "mems" => Self::Mems,
            "rss" => Self::Rss,
            _ => return None,
        })
    }
}

/// Prints what crit prints, where crit can; it gives up at the first zombie, this passes over it.
pub fn explore(dir: &ImageDir, what: What, out: &mut impl Write) -> Result<()> {
    let set = ImageSet::load(dir)?;
    match what {
        What::Ps => ps(&set, out)?,
        What::Fds => fds(&set, out)?,
        What::Mems => mems(&set, out)?,
        What::Rss => rss(&set, out)?,
    }
    match set.findings.iter().find(|f| f.severity == Severity::Error) {
        Some(finding) => anyhow::bail!("{finding}"),
        None => Ok(()),
    }
}

fn ps(set: &ImageSet, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{:>7}{:>7}{:>7}   COMM", "PID", "PGID", "SID")?;
    for node in set::tree(set) {
        let task = node.task;
        let indent = 4 * node.depth;
        writeln!(out, "{:>7}{:>7}{:>7}   {:indent$}{}", task.pid, task.pgid, task.sid, "", task.comm())?;
    }
    Ok(())
}

fn fds(set: &ImageSet, out: &mut impl Write) -> io::Result<()> {
    for task in &set.tasks {
        writeln!(out, "{}", task.pid)?;
        for fd in set.fds(task) {
            writeln!(out, "\t{:>7}: {}", fd.fd, file(set, fd.r#type(), fd.id))?;
        }
        if let Some(fs) = &task.fs {
            writeln!(out, "\t{:>7}: {}", "cwd", file(set, FdTypes::Reg, fs.cwd_id))?;
            writeln!(out, "\t{:>7}: {}", "root", file(set, FdTypes::Reg, fs.root_id))?;
        }
    }
    Ok(())
}

/// An open file in a few words.
fn file(set: &ImageSet, ty: FdTypes, id: u32) -> String {
    let entry = set.files.get(&(ty, id));
    match ty {
        FdTypes::Reg => match set.path(id) {
            None | Some([]) => "unknown path".into(),
            Some(path) => String::from_utf8_lossy(path).into_owned(),
        },
        FdTypes::Pipe => match entry.and_then(|e| e.pipe.as_ref()) {
            Some(pipe) => format!("pipe[{}]", pipe.pipe_id),
            None => "pipe[?]".into(),
        },
        FdTypes::Unixsk => match entry.and_then(|e| e.usk.as_ref()) {
            Some(sk) if sk.name.is_empty() => format!("unix[{} ({})]", sk.ino, sk.peer),
            Some(sk) => format!("unix[{} ({}) {}]", sk.ino, sk.peer, quoted(&sk.name)),
            None => "unix[?]".into(),
        },
        other => format!("{}.{id}", other.as_str_name()),
    }
}

/// Small numbers for objects in the order of their appearance.
#[derive(Default)]
struct Numbers(HashMap<u64, usize>);

impl Numbers {
    fn of(&mut self, object: u64) -> usize {
        let next = self.0.len() + 1;
        *self.0.entry(object).or_insert(next)
    }
}

fn mems(set: &ImageSet, out: &mut impl Write) -> io::Result<()> {
    let mut numbers = Numbers::default();
    for task in &set.tasks {
        writeln!(out, "{}", task.pid)?;
        let Some(mm) = &task.mm else { continue };
        writeln!(out, "\t{:<36}    {}", "exe", file(set, FdTypes::Reg, mm.exe_file_id))?;
        for vma in &mm.vmas {
            let range = format!("{:08x}-{:08x}", vma.start, vma.end);
            let access: String = [(1, 'r'), (2, 'w'), (4, 'x')]
                .iter()
                .map(|(bit, c)| if vma.prot & bit != 0 { *c } else { '-' })
                .collect();
            writeln!(out, "\t{range:<36}{access}{}", mapped(set, vma, &mut numbers))?;
        }
    }
    Ok(())
}

/// What a mapping maps.
fn mapped(set: &ImageSet, vma: &VmaEntry, numbers: &mut Numbers) -> String {
    let status = vma.status;
    let mut text = if status & SYSVIPC != 0 {
        format!(" ips[{:x}]", numbers.of(vma.shmid))
    } else if status & ANON_SHARED != 0 {
        format!(" shmem[{:x}]", numbers.of(vma.shmid))
    } else if status & SOCKET != 0 {
        format!(" packet[{:x}]", numbers.of(vma.shmid))
    } else if status & (FILE_PRIVATE | FILE_SHARED) != 0 {
        let mut text = format!(" {}", backing(set, vma));
        if vma.pgoff != 0 {
            text.push_str(&format!(" + {:#x}", vma.pgoff));
        }
        if status & FILE_SHARED != 0 {
            text.push_str(" (s)");
        }
        text
    } else if status & STACK != 0 {
        " [stack]".into()
    } else if status & VSYSCALL != 0 {
        " [vsyscall]".into()
    } else if status & VDSO != 0 {
        " [vdso]".into()
    } else if vma.flags & GROWSDOWN != 0 {
        " [stack?]".into()
    } else {
        String::new()
    };
    if status & REGULAR == 0 {
        text.push_str(" *");
    }
    text
}

fn backing(set: &ImageSet, vma: &VmaEntry) -> String {
    file(set, FdTypes::Reg, u32::try_from(vma.shmid).unwrap_or(0))
}

fn rss(set: &ImageSet, out: &mut impl Write) -> Result<()> {
    for task in &set.tasks {
        writeln!(out, "{}", task.pid)?;
        if let Some(map) = Pagemap::read(&set.dir, ImageKind::Pagemap, task.pid.into())? {
            task_rss(set, task, &map, out)?;
        }
    }
    Ok(())
}

/// One line per stored region, and beside it the mappings it lies in: their range when they first come,
/// a tilde after that.
fn task_rss(set: &ImageSet, task: &Task, map: &Pagemap, out: &mut impl Write) -> io::Result<()> {
    let vmas = task.mm.as_ref().map_or(&[][..], |mm| &mm.vmas);
    let mut at = 0;
    let mut shown = None;
    for region in &map.regions {
        while vmas.get(at).is_some_and(|vma| vma.end <= region.vaddr) {
            at += 1;
        }
        let mut beside = String::new();
        while let Some(vma) = vmas.get(at).filter(|vma| vma.start < region.end()) {
            if shown == Some(at) {
                beside.push_str(" ~");
            } else {
                let pages = vma.end.saturating_sub(vma.start) / PAGE_SIZE;
                beside.push_str(&format!(" {:08x} / {pages:<8}", vma.start));
                if vma.status & (FILE_PRIVATE | FILE_SHARED) != 0 {
                    beside.push_str(&format!(" {}", backing(set, vma)));
                }
                shown = Some(at);
            }
            beside.push_str(&format!("\n\t{:23}", ""));
            at += 1;
        }
        at = at.saturating_sub(1);
        let here = format!("\t{:x} / {:<8}", region.vaddr, region.pages);
        writeln!(out, "{here:<24}{beside}")?;
    }
    Ok(())
}
