//! The program as scripts and container managers meet it: words in, text and exit code out.

mod tool;

use std::fs;
use tool::{Tool, is_root};

#[test]
fn version_has_the_line_that_liblxc_parses() {
    for args in [&["--version"][..], &["-V"], &["-dV"], &["dump", "--version"]] {
        let out = Tool::new().run(args);
        assert_eq!(out.code, 0, "{args:?}");
        assert_eq!(out.stdout.lines().next(), Some("Version: 4.2"));
    }
}

#[test]
fn version_works_without_standard_input_and_error() {
    let out = Tool::new().shell("exec 2>&- 0<&-; exec \"$TOOL\" --version");
    assert_eq!((out.code, out.stdout.lines().next()), (0, Some("Version: 4.2")));
}

#[test]
fn called_as_criu_it_is_the_same() {
    let tool = Tool::new();
    let link = tool.dir().join("criu");
    std::os::unix::fs::symlink(tool.path(), &link).unwrap();
    let out = tool.shell(&format!("exec {} --version", link.display()));
    assert_eq!(out.stdout.lines().next(), Some("Version: 4.2"));
}

#[test]
fn help_fits_eighty_columns() {
    for args in [&["--help"][..], &["-h"], &["restore", "-h"], &["--nonsense", "--help"]] {
        let out = Tool::new().run(args);
        assert_eq!(out.code, 0);
        let fits = out.stdout.lines().all(|l| l.chars().count() <= 80);
        assert!(fits && out.stdout.contains("Usage:"), "{args:?}");
    }
    assert!(!Tool::new().run(&["restore", "-h"]).stdout.contains("--leave-running"));
    let out = Tool::new().run(&[]);
    assert_eq!(out.code, 1);
    assert!(out.stdout.contains("Usage:"));
}

#[test]
fn mistakes_are_named_and_exit_code_is_1() {
    for (args, word) in [
        (&["fly"][..], "fly"),
        (&["dump", "--wings"], "--wings"),
        (&["dump", "-t", "me"], "me"),
        (&["--leave"], "--leave-running"),
        (&["cpuinfo"], "cpuinfo"),
        (&["-v4"], "command"),
    ] {
        let out = Tool::new().run(args);
        assert_eq!((out.code, out.stdout.as_str()), (1, ""), "{args:?}");
        assert!(out.stderr.starts_with("rcriu: ") && out.stderr.contains(word), "{args:?}: {}", out.stderr);
    }
}

#[test]
fn man_page_and_completions_are_printed() {
    let out = Tool::new().run(&["man"]);
    assert!(out.code == 0 && out.stdout.contains(".TH rcriu 8"));
    let out = Tool::new().run(&["completions", "bash"]);
    assert!(out.code == 0 && out.stdout.contains("complete -F"));
    assert_eq!(Tool::new().run(&["completions", "cobol"]).code, 1);
}

#[test]
fn an_unserved_option_is_refused_by_name_in_the_log_and_on_stderr() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    let out = tool.run(&["dump", "-t", "1", "--stream", "-o", "dump.log", "-D", "."]);
    assert_eq!(out.code, 1);
    assert!(out.stderr.contains("--stream is not supported by dump yet"), "{}", out.stderr);
    assert_eq!(out.stderr.lines().count(), 1);
    let log = fs::read_to_string(tool.dir().join("dump.log")).unwrap();
    assert!(log.starts_with("Error (") && log.contains("--stream"), "{log}");
}

#[test]
fn a_log_is_made_in_the_work_folder_with_crius_first_lines() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let tool = Tool::new();
    fs::create_dir(tool.dir().join("work")).unwrap();
    tool.run(&["check", "-W", "work", "-o", "check.log", "-v4", "--feature", "mnt_id"]);
    let log = fs::read_to_string(tool.dir().join("work/check.log")).unwrap();
    let mut lines = log.lines().filter(|l| !l.contains("Parsing config"));
    let first = lines.next().unwrap();
    assert!(first.starts_with("(00.") && first.contains(") Version: 4.2 "), "{first}");
    assert!(lines.next().unwrap().contains(") Running on "));
}

#[test]
fn a_folder_that_is_missing_is_named() {
    let out = Tool::new().run(&["dump", "-t", "1", "-D", "/nonexistent/images"]);
    assert_eq!(out.code, 1);
    assert!(
        out.stderr.contains("/nonexistent/images") && out.stderr.contains("must exist"),
        "{}",
        out.stderr
    );
}

#[test]
fn configuration_files_come_before_the_command_line() {
    let tool = Tool::new();
    let conf = tool.dir().join("my.conf");
    fs::write(&conf, "# mine\ntree 0\n").unwrap();
    let out = tool.run(&["dump", "--config", conf.to_str().unwrap()]);
    assert_eq!(out.code, 1);
    assert!(out.stderr.contains("my.conf") && out.stderr.contains("tree"), "{}", out.stderr);

    fs::create_dir(tool.dir().join(".criu")).unwrap();
    fs::write(tool.dir().join(".criu/default.conf"), "images-dir /nonexistent/home\n").unwrap();
    let out = tool.run(&["dump", "-t", "1"]);
    assert!(out.stderr.contains("/nonexistent/home"), "{}", out.stderr);
    let out = tool.run(&["dump", "-t", "1", "-D", "/nonexistent/argv"]);
    assert!(out.stderr.contains("/nonexistent/argv"), "{}", out.stderr);
    let out = tool.run(&["dump", "-t", "1", "--no-default-config", "-D", "."]);
    assert!(!out.stderr.contains("/nonexistent/home"), "{}", out.stderr);

    let env = tool.dir().join("env.conf");
    fs::write(&env, "images-dir /nonexistent/env\n").unwrap();
    let out = tool.env("CRIU_CONFIG_FILE", env.to_str().unwrap()).run(&["dump", "-t", "1"]);
    assert!(out.stderr.contains("/nonexistent/env"), "{}", out.stderr);
}

#[test]
fn check_answers_as_tools_expect() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let out = Tool::new().run(&["check"]);
    assert_eq!((out.code, out.stdout.as_str()), (0, "Looks good.\n"), "{}", out.stderr);
    let out = Tool::new().run(&["check", "--feature", "mnt_id"]);
    assert_eq!((out.code, out.stdout.as_str()), (0, "mnt_id is supported\n"));
    let out = Tool::new().run(&["check", "--feature", "nftables"]);
    assert_eq!((out.code, out.stdout.as_str()), (1, ""));
    assert!(out.stderr.starts_with("Warn  ("), "{}", out.stderr);
    let out = Tool::new().run(&["check", "--feature", "list"]);
    assert_eq!((out.code, out.stdout.lines().count()), (0, 45));
    let out = Tool::new().run(&["check", "--feature", "flight"]);
    assert!(out.code == 1 && out.stderr.contains("flight"));
    let out = Tool::new().run(&["check", "--all"]);
    let good = out.stdout == "Looks good.\n";
    let maybe = out.stdout.starts_with("Looks good but some kernel features are missing\n");
    assert!(good || maybe, "{}", out.stdout);
    assert_eq!(out.code, i32::from(!good));
}

#[test]
fn the_old_action_exec_says_what_to_use() {
    let out = Tool::new().run(&["exec", "-t", "1"]);
    assert!(out.code == 1 && out.stderr.contains("compel"), "{}", out.stderr);
}

#[test]
fn the_demo_loses_nothing() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let out = Tool::new().run(&["demo"]);
    assert_eq!(out.code, 0, "{}{}", out.stdout, out.stderr);
    assert!(out.stdout.contains("Nothing was lost."), "{}", out.stdout);
    assert_eq!(out.stderr, "");
}
