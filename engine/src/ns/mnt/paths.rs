//! Paths of mounts: absolute, of any bytes, and how they lie in one another.

/// Whether `path` is absolute, has no empty component, none that goes elsewhere, and no zero byte.
pub fn is_plain(path: &[u8]) -> bool {
    let Some(rest) = path.strip_prefix(b"/") else { return false };
    let sound = |part: &[u8]| !part.is_empty() && part != b"." && part != b"..";
    !path.contains(&0) && path.len() < libc::PATH_MAX as usize && (rest.is_empty() || parts(rest).all(sound))
}

/// Components of a relative path.
pub fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|c| *c == b'/')
}

/// What of `path` lies below `base`, without a slash in front; empty if they are equal. Both are plain.
pub fn below<'a>(path: &'a [u8], base: &[u8]) -> Option<&'a [u8]> {
    if base == b"/" {
        return path.strip_prefix(b"/");
    }
    match path.strip_prefix(base)? {
        [] => Some(&[]),
        [b'/', rest @ ..] => Some(rest),
        _ => None,
    }
}

/// `base` and what lies below it, in one.
pub fn join(base: &[u8], rest: &[u8]) -> Vec<u8> {
    match (base, rest) {
        (base, []) => base.to_vec(),
        (b"/", rest) => [b"/", rest].concat(),
        (base, rest) => [base, b"/", rest].concat(),
    }
}

/// How many components a plain path has.
pub fn depth(path: &[u8]) -> usize {
    if path == b"/" { 0 } else { path.iter().filter(|c| **c == b'/').count() }
}

/// For messages.
pub fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_are_plain() {
        for good in [&b"/"[..], b"/a", b"/a/b c", b"/..a/\xff"] {
            assert!(is_plain(good), "{}", shown(good));
        }
        for bad in [&b""[..], b"a", b"/a/", b"//", b"/../x", b"/a/./b", b"/a/..", b"/a\0"] {
            assert!(!is_plain(bad), "{}", shown(bad));
        }
    }

    #[test]
    fn paths_lie_in_one_another_by_components() {
        assert_eq!(below(b"/a/b", b"/a"), Some(&b"b"[..]));
        assert_eq!(below(b"/a", b"/a"), Some(&b""[..]));
        assert_eq!(below(b"/a", b"/"), Some(&b"a"[..]));
        assert_eq!(below(b"/", b"/"), Some(&b""[..]));
        assert_eq!(below(b"/ab", b"/a"), None);
        assert_eq!(join(b"/", b"a"), b"/a");
        assert_eq!(join(b"/a", b"b"), b"/a/b");
        assert_eq!(join(b"/a", b""), b"/a");
        assert_eq!((depth(b"/"), depth(b"/a"), depth(b"/a/b")), (0, 1, 2));
    }
}
