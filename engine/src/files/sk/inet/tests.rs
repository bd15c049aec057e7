//! Sockets that are dumped and restored, each by a process of its own.

use std::net::{TcpListener, TcpStream, UdpSocket};

use super::*;
use crate::files::roundtrip::{FREE, Trip, at, get, pos_and_flags};
use crate::sys::sockopt::Opt;

const NODELAY: Opt = options::TEST[0];
const TTL: Opt = options::TEST[1];

fn udp(number: i32) -> UdpSocket {
    UdpSocket::from(get(number).try_clone_to_owned().unwrap())
}

#[test]
fn listeners_and_datagram_sockets_come_back() {
    Trip::new(
        concat!(module_path!(), "::listeners_and_datagram_sockets_come_back"),
        |folder| {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            tcp.set_nonblocking(true).unwrap();
            let tcp6 = TcpListener::bind("[::1]:0").unwrap();
            let (one, two) =
                (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
            one.connect(two.local_addr().unwrap()).unwrap();
            let ports = [tcp.local_addr(), tcp6.local_addr(), one.local_addr(), two.local_addr()];
            let ports = ports.map(|a| a.unwrap().port().to_string());
            std::fs::write(folder.join("ports"), ports.join(" ")).unwrap();
            let fresh = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
            sockopt::set_int(fresh.as_fd(), NODELAY, 1).unwrap();
            sockopt::set_int(fresh.as_fd(), TTL, 7).unwrap();
            at(tcp, FREE, false);
            at(tcp6, FREE + 1, false);
            at(one, FREE + 2, false);
            at(two, FREE + 3, false);
            at(fresh, FREE + 4, true);
        },
        |folder| {
            let ports = std::fs::read_to_string(folder.join("ports")).unwrap();
            let ports: Vec<u16> = ports.split(' ').map(|p| p.parse().unwrap()).collect();
            let client = TcpStream::connect(("127.0.0.1", ports[0])).unwrap();
            let tcp = TcpListener::from(get(FREE).try_clone_to_owned().unwrap());
            assert_eq!(tcp.accept().unwrap().1, client.local_addr().unwrap());
            assert_eq!(pos_and_flags(FREE).1, (libc::O_RDWR | libc::O_NONBLOCK) as u32);
            TcpStream::connect(("::1", ports[1])).unwrap();
            let (one, two) = (udp(FREE + 2), udp(FREE + 3));
            assert_eq!(one.local_addr().unwrap().port(), ports[2]);
            assert_eq!(one.peer_addr().unwrap().port(), ports[3]);
            one.send(b"hello").unwrap();
            let mut bytes = [0; 10];
            assert_eq!(two.recv_from(&mut bytes).unwrap(), (5, one.local_addr().unwrap()));
            assert_eq!(sockopt::int(get(FREE + 4), NODELAY).unwrap(), 1);
            assert_eq!(sockopt::int(get(FREE + 4), TTL).unwrap(), 7);
            assert_eq!(sockopt::int(get(FREE + 2), opts::REUSEADDR).unwrap(), 0);
            assert_eq!(sockopt::int(get(FREE), opts::REUSEADDR).unwrap(), 1);
        },
    )
    .run();
}

#[test]
fn connections_are_refused() {
    let trip = Trip::new(
        concat!(module_path!(), "::connections_are_refused"),
        |_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            at(client, FREE, false);
            at(accepted, FREE + 1, false);
        },
        |_| {},
    );
    if let Some(e) = trip.refusal() {
        assert!(e.contains("Connected TCP socket") && e.contains("--tcp-close"), "{e}");
    }
}
