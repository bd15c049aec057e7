//! Namespaces that may not make the trip.

use super::*;

/// The refusal names the mount and has the words.
fn refused(said: Option<String>, words: &[&str]) {
    let Some(said) = said else { return };
    for word in words {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn a_part_of_what_is_mounted_nowhere_is_refused() {
    let trip = Trip::new(name!("a_part_of_what_is_mounted_nowhere_is_refused"), || {
        mount("tmpfs", "/t", 0, "");
        fs::create_dir("/t/sub").unwrap();
        bind(Path::new("/t/sub"), Path::new("/part"));
        umount2("/t", MntFlags::empty()).unwrap();
    });
    refused(trip.refusal(), &[" on /part", "/sub", "--external mnt[/part]:NAME"]);
}

#[test]
fn messages_in_a_queue_are_refused() {
    let trip = Trip::new(name!("messages_in_a_queue_are_refused"), || {
        mount("mqueue", "/mq", 0, "");
        fs::File::create("/mq/queue").unwrap();
    });
    refused(trip.refusal(), &[" on /mq", "queue is in it"]);
}

#[test]
fn a_removed_file_with_content_is_refused() {
    let trip = Trip::new(name!("a_removed_file_with_content_is_refused"), || {
        mount("tmpfs", "/t", 0, "");
        fs::write("/t/file", "content").unwrap();
        bind(Path::new("/t/file"), Path::new("/file"));
        fs::remove_file("/t/file").unwrap();
    });
    refused(trip.refusal(), &[" on /file", "was removed, and has content"]);
}

#[test]
fn what_is_on_a_mount_that_is_left_out_is_refused() {
    let trip = Trip {
        dump: |opts, _| opts.common.skip_mnt.push("/t".into()),
        ..Trip::new(name!("what_is_on_a_mount_that_is_left_out_is_refused"), || {
            mount("tmpfs", "/t", 0, "");
            mount("tmpfs", "/t/on", 0, "");
        })
    };
    refused(trip.refusal(), &[" on /t/on", "--skip-mnt /t/on"]);
}

#[test]
fn a_task_below_a_hidden_root_is_refused() {
    let trip = Trip::new(name!("a_task_below_a_hidden_root_is_refused"), || mount("tmpfs", "/", 0, ""));
    refused(trip.refusal(), &["is hidden behind the root"]);
}
