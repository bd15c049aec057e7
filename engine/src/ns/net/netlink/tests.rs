//! Messages put together, taken apart, and sent to the kernel.

use proptest::prelude::*;

use super::*;

#[test]
fn what_is_put_together_is_taken_apart() {
    let inner = Body::default().text(1, "veth").word(2, 7);
    let body = Body::new(&[1, 2, 3]).nest(18 | NESTED, &inner).bytes(3, b"abcde");
    let mut bytes = ((HEADER + body.0.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend([0; 12]);
    bytes.extend(&body.0);
    let message = Message::all(&bytes, "x").unwrap().remove(0);
    let attributes = message.attributes(3);
    assert_eq!(attributes.get(3), Some(&b"abcde"[..]));
    assert_eq!(attributes.inside(18).text(1), Some("veth"));
    assert_eq!(attributes.inside(18).word(2), Some(7));
    assert_eq!(attributes.word(4), None);
}

proptest! {
    #[test]
    fn no_bytes_make_it_read_beyond(bytes in proptest::collection::vec(any::<u8>(), 0..200), head in 0usize..80) {
        for message in Message::all(&bytes, "x").unwrap_or_default() {
            for (_, value) in message.attributes(head) {
                Attributes(value).count();
            }
        }
        let mut framed = ((HEADER + bytes.len()) as u32).to_ne_bytes().to_vec();
        framed.extend([0; 12]);
        framed.extend(&bytes);
        let message = Message::all(&framed, "x").unwrap().remove(0);
        message.attributes(head).count();
        failed("x", &message);
    }
}

#[test]
fn the_kernel_says_why() {
    let Ok(mut netlink) = Netlink::route() else { return eprintln!("skipped: no rtnetlink") };
    let links = netlink.dump("RTM_GETLINK", 18, &Body::new(&[0; 16])).unwrap();
    assert!(links.iter().any(|m| m.attributes(16).text(3) == Some("lo")));
    // No link has this name: RTM_SETLINK.
    let body = Body::new(&[0; 16]).text(3, "rcriu-none");
    let e = netlink.request("RTM_SETLINK", 19, 0, &body.0).unwrap_err();
    assert!(matches!(e.errno(), Some(libc::ENODEV | libc::EPERM)), "{e}");
}
