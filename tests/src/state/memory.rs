//! Memory as /proc shows it, less how the kernel happens to split it.

/// smaps as lines `start-end perms offset path flags`, neighbours of one kind joined.
pub(super) fn lines(smaps: &str) -> String {
    struct Area {
        start: u64,
        end: u64,
        perms: String,
        offset: u64,
        file: bool,
        path: String,
        flags: String,
    }
    let mut areas: Vec<Area> = Vec::new();
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            // sd: soft-dirty, and ac: accounted, say what was written when, not what is mapped; dw: that exec mapped it.
            let flags = flags
                .split_whitespace()
                .filter(|f| !["sd", "ac", "dw"].contains(f))
                .collect::<Vec<_>>()
                .join(" ");
            if let Some(area) = areas.last_mut() {
                area.flags = flags;
            }
        } else if let Some(area) = (|| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let (perms, offset, dev) = (words.next()?, words.next()?, words.next()?);
            let inode = words.next()?;
            let path = line.splitn(6, ' ').nth(5).unwrap_or("").trim_start();
            let path = path.strip_prefix(inode).unwrap_or(path).trim();
            // A socket has another number when it is made again.
            let path = if path.starts_with("socket:[") { "socket" } else { path };
            Some(Area {
                start: u64::from_str_radix(start, 16).ok()?,
                end: u64::from_str_radix(end, 16).ok()?,
                perms: perms.into(),
                offset: u64::from_str_radix(offset, 16).ok()?,
                // Private anonymous memory in huge pages has a file that nobody can see.
                file: inode != "0"
                    && dev.contains(':')
                    && !(perms.ends_with('p') && path == "/anon_hugepage (deleted)"),
                path: path.into(),
                flags: String::new(),
            })
        })() {
            areas.push(area);
        }
    }
    let mut joined: Vec<Area> = Vec::new();
    for area in areas {
        match joined.last_mut() {
            Some(last)
                if last.end == area.start
                    && (&last.perms, &last.path, &last.flags, last.file)
                        == (&area.perms, &area.path, &area.flags, area.file)
                    && (!area.file || last.offset + (last.end - last.start) == area.offset) =>
            {
                last.end = area.end;
            }
            _ => joined.push(area),
        }
    }
    let line = |a: &Area| {
        let offset = if a.file { a.offset } else { 0 };
        format!("{:x}-{:x} {} {offset:x} {} [{}]", a.start, a.end, a.perms, a.path, a.flags)
    };
    joined.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::lines;

    #[test]
    fn neighbours_of_one_kind_are_joined() {
        let text = "1000-2000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr sd \n\
                    2000-3000 rw-p 00000000 00:00 0 \nVmFlags: rd wr \n\
                    3000-4000 r--p 00001000 fe:00 12   /a b\nVmFlags: rd \n";
        assert_eq!(lines(text), "1000-3000 rw-p 0  [rd wr]\n3000-4000 r--p 1000 /a b [rd]");
    }
}
