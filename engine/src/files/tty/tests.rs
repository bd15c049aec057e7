use std::{
    io::{Read, Write},
    os::fd::AsFd,
};

use nix::{
    fcntl::{OFlag, open},
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
    sys::stat::Mode,
};

use super::*;
use crate::files::roundtrip::{FREE, Trip, at, get, link, pos_and_flags};

#[test]
fn device_numbers_tell_the_sort() {
    let of = |major, minor| Sort::of(nix::sys::stat::makedev(major, minor));
    assert_eq!(of(5, 2), Some(Sort::Master));
    assert_eq!(of(136, 7), Some(Sort::Slave));
    assert_eq!(of(5, 0), Some(Sort::Ctty));
    assert_eq!(of(4, 1), Some(Sort::Vt));
    assert_eq!(of(4, 64), None);
    assert_eq!(of(1, 3), None);
}

#[test]
fn numbers_of_pairs_never_meet_others() {
    assert_eq!((pair_id(0), pair_id(7) | 1), (0, 15));
    let fixed = [CONSOLE, VT, CTTY, SERIAL, EXTERNAL + 1, EXTERNAL + 64].map(|n| n << 1);
    for index in 0..4096 {
        assert!(!fixed.contains(&pair_id(index)), "{index}");
    }
}

#[test]
fn pairs_come_back_with_number_settings_and_data() {
    Trip::new(
        concat!(module_path!(), "::pairs_come_back_with_number_settings_and_data"),
        |folder| {
            // A number beyond those that other tests get meanwhile.
            let new = || posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
            let fillers: Vec<_> = (0..40).map(|_| new()).collect();
            let master = new();
            drop(fillers);
            grantpt(&master).unwrap();
            unlockpt(&master).unwrap();
            let name = ptsname_r(&master).unwrap();
            std::fs::write(folder.join("name"), &name).unwrap();
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
            let slave = open(name.as_str(), flags | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
            let second = open(name.as_str(), OFlag::O_WRONLY | OFlag::O_NOCTTY, Mode::empty()).unwrap();
            let mut settings = tty::termios(slave.as_fd()).unwrap();
            settings.lflag &= !libc::ECHO;
            settings.cc[libc::VINTR] = 7;
            tty::set_termios(slave.as_fd(), settings).unwrap();
            let size = tty::Winsize { row: 33, col: 77, xpixel: 1, ypixel: 2 };
            tty::set_winsize(slave.as_fd(), size).unwrap();
            nix::unistd::write(master.as_fd(), b"typed\nnot yet").unwrap();
            nix::unistd::write(&second, b"printed\n").unwrap();
            at(std::fs::File::from(OwnedFd::from(master)), FREE, true);
            at(slave, FREE + 1, false);
            at(second, FREE + 2, false);
        },
        |folder| {
            let name = std::fs::read_to_string(folder.join("name")).unwrap();
            assert_eq!((link(FREE + 1), link(FREE + 2)), (name.clone(), name));
            let flags = |n| pos_and_flags(n).1.cast_signed() & !0o100_000;
            assert_eq!(flags(FREE), libc::O_RDWR | libc::O_CLOEXEC);
            assert_eq!(flags(FREE + 1), libc::O_RDWR | libc::O_NONBLOCK);
            assert_eq!(flags(FREE + 2), libc::O_WRONLY);
            let settings = tty::termios(get(FREE + 1)).unwrap();
            assert!(settings.lflag & libc::ICANON != 0 && settings.lflag & libc::ECHO == 0);
            assert_eq!(settings.cc[libc::VINTR], 7);
            let size = tty::Winsize { row: 33, col: 77, xpixel: 1, ypixel: 2 };
            assert_eq!(tty::winsize(get(FREE + 1)).unwrap(), size);
            let file = |n| std::fs::File::from(get(n).try_clone_to_owned().unwrap());
            let mut bytes = [0; 100];
            let got = file(FREE).read(&mut bytes).unwrap();
            assert_eq!(&bytes[..got], b"printed\r\n");
            assert_eq!(file(FREE + 1).read(&mut bytes).unwrap(), 6);
            assert_eq!(file(FREE + 1).read(&mut bytes).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
            file(FREE).write_all(b"!\n").unwrap();
            let got = file(FREE + 1).read(&mut bytes).unwrap();
            assert_eq!(&bytes[..got], b"not yet!\n");
        },
    )
    .run();
}

#[test]
fn a_terminal_of_somebody_outside_needs_shell_job() {
    let mut trip = Trip::new(
        concat!(module_path!(), "::a_terminal_of_somebody_outside_needs_shell_job"),
        |_| {
            let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
            unlockpt(&master).unwrap();
            let name = ptsname_r(&master).unwrap();
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
            at(open(name.as_str(), flags, Mode::empty()).unwrap(), FREE, false);
            // The master stays open in a process that is not dumped.
            let mut sleep = std::process::Command::new("sleep");
            let master = std::fs::File::from(OwnedFd::from(master));
            std::mem::forget(sleep.arg("2").stdin(master).spawn().unwrap());
        },
        |_| {},
    );
    if let Some(e) = trip.refusal() {
        assert!(e.contains("belongs to somebody outside") && e.contains("--shell-job"), "{e}");
    }
    if std::env::var_os("RCRIU_TEST_ROLE").is_none() {
        trip.dump = |opts| opts.common.shell_job = true;
        trip.restore = |opts| opts.common.shell_job = true;
        let e = std::panic::catch_unwind(|| trip.run()).unwrap_err();
        let e = e.downcast_ref::<String>().unwrap();
        assert!(e.contains("somebody outside") || e.contains("no terminal to use"), "{e}");
    }
}
