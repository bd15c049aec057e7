use rcriu_images::testing::SmallSet;

use super::*;

const PLAIN: Style = Style { colour: false, terminal: false };
const TERMINAL: Style = Style { colour: true, terminal: true };

fn overview(small: &SmallSet, style: Style) -> String {
    let report = report::Report::gather(small.write(), CENSUS_LIMIT).unwrap();
    let mut out = Vec::new();
    overview::print(&report, style, &mut out).unwrap();
    let dir = small.tmp.path().display().to_string();
    // The time and the folder differ from run to run.
    let lines = String::from_utf8(out).unwrap().replace(&dir, "DIR");
    lines.lines().filter(|l| !l.contains(" UTC")).map(|l| format!("{l}\n")).collect()
}

#[test]
fn the_overview_says_what_is_there() {
    let expected = "\
DIR: complete
  on          x86_64
  processes   2 processes, 2 threads, 1 zombie
  memory      8.0K of 24.0K mapped, 8.0K stored, 2 of 2 pages unique, 1 zero
  descriptors 3 (inetsk 1, pipe 1, reg 1) of 4 open files
  sockets     1 tcp established

Processes
    10 /bin/prog --flag 'a b' (2 threads, 8.0K)
    12   [prog] (zombie)

Restore
  rcriu restore -D DIR --tcp-established
    --tcp-established: there are TCP connections
";
    assert_eq!(overview(&SmallSet::new(), PLAIN), expected);
}

#[test]
fn damage_is_shown_and_no_restore_is_offered() {
    let mut small = SmallSet::new();
    small.cores.remove(1);
    small.cores.remove(0);
    let text = overview(&small, PLAIN);
    assert!(text.starts_with("DIR: truncated\n  core-10.img: there is no such image\n"), "{text}");
    assert!(text.contains("\nDamage\n  core-10.img: there is no such image\n"), "{text}");
    assert!(!text.contains("Restore"), "{text}");
}

/// Text as it appears on the screen.
fn visible(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + part.split_once('m').map_or(part, |(_, rest)| rest))
}

#[test]
fn a_terminal_gets_lines_and_colours_within_80_columns() {
    let mut small = SmallSet::new();
    small.pages[..4000].fill(b'x');
    small.pages[2000] = b' ';
    small.mm.mm_arg_end = small.mm.mm_arg_start + 4000;
    for at in 0..40 {
        let zombie = small.cores[2].1.clone();
        small.cores.push((100 + at, zombie));
        let pid = 100 + at as u32;
        let ppid = if at == 0 { 10 } else { pid - 1 };
        small.pstree.push(rcriu_images::pb::PstreeEntry { pid, ppid, pgid: 1, sid: 1, threads: vec![0] });
    }
    let text = overview(&small, TERMINAL);
    assert!(text.contains("\x1b[1;32mcomplete\x1b[0m"), "{text}");
    assert!(text.contains("├─") && text.contains("└─"), "{text}");
    for line in text.lines().map(visible).filter(|l| !l.contains("rcriu restore")) {
        assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
        assert!(!line.ends_with(' '), "{line:?}");
    }
    let all: String = text.lines().map(visible).collect();
    assert_eq!(all.matches('x').count(), text.matches("x").count());
    assert!(all.matches('x').count() >= 3999, "the command line is not whole");
}

#[test]
fn command_lines_cannot_control_the_terminal() {
    let mut small = SmallSet::new();
    small.pages[..8].copy_from_slice(b"\x1b]0;evil\x07"[..8].try_into().unwrap());
    let text = overview(&small, PLAIN);
    assert!(!text.contains('\x1b'), "{text:?}");
}

#[test]
fn the_json_form_is_stable() {
    let small = SmallSet::new();
    let report = report::Report::gather(small.write(), 0).unwrap();
    let json = serde_json::to_value(&report).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        keys,
        [
            "format",
            "dir",
            "verdict",
            "image_version",
            "dumped_at",
            "times",
            "hostname",
            "architecture",
            "cpu",
            "tasks",
            "thread_count",
            "memory",
            "descriptors",
            "open_files",
            "sockets",
            "namespaces",
            "needs",
            "restore",
            "findings"
        ]
    );
    assert_eq!(json["tasks"][0]["cmdline"], serde_json::json!(["/bin/prog", "--flag", "a b"]));
    assert_eq!(json["tasks"][1]["state"], "zombie");
    assert_eq!(json["memory"]["stored"], 8192);
    assert_eq!(json["memory"]["zero_pages"], serde_json::Value::Null);
    assert_eq!(json["needs"][0]["option"], "--tcp-established");
}

#[test]
fn check_answers_with_text_and_exit_code() {
    let check = |small: &SmallSet, json| {
        let mut out = Vec::new();
        let code = verify::verify(small.write(), json, PLAIN, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap().replace(&small.tmp.path().display().to_string(), "DIR");
        (format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS), text)
    };
    let mut small = SmallSet::new();
    assert_eq!(check(&small, false), (true, "DIR: sound\n".into()));
    small.pages.push(0);
    assert_eq!(
        check(&small, false),
        (true, "warning: pages-1.img: 1 bytes that pagemap-10.img does not refer to\nDIR: sound\n".into())
    );
    small.fds[0].id = 9;
    let (sound, text) = check(&small, false);
    assert!(
        !sound && text.starts_with("error: fdinfo-2.img: REG file 0x9 of fd 0 is not in the set\n"),
        "{text}"
    );
    assert!(text.ends_with("DIR: 1 error\n"), "{text}");
    let (_, json) = check(&small, true);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["sound"], &json["findings"][0]["image"]), (&false.into(), &"fdinfo-2.img".into()));
}

#[test]
fn explorers_print_what_crit_prints() {
    let small = SmallSet::new();
    let explore = |what| {
        let mut out = Vec::new();
        explore::explore(small.write(), what, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    assert_eq!(
        explore(What::Ps),
        "    PID   PGID    SID   COMM\n     10     10     10   prog\n     12     10     10       prog\n"
    );
    assert_eq!(
        explore(What::Fds),
        "10\n\t      0: /bin/prog\n\t      3: pipe[77]\n\t      4: INETSK.4\n\t    cwd: /\n\t   root: /\n12\n"
    );
    let mems = explore(What::Mems);
    assert!(mems.contains("\texe                                     /bin/prog\n"), "{mems}");
    assert!(mems.contains("\t6fff0000-6fff4000                   --- /bin/prog *\n"), "{mems}");
    let rss = explore(What::Rss);
    assert!(rss.contains("\t70000000 / 2            70000000 / 2       \n\t"), "{rss:?}");
}

#[test]
fn images_go_to_json_files_and_back() {
    let small = SmallSet::new();
    small.write();
    let path = |name: &str| small.tmp.path().join(name);
    let words = |words: &[&str]| {
        let parser = ShowArgs::augment_args(Command::new("x").no_binary_name(true));
        run(ShowArgs::from_arg_matches(&parser.try_get_matches_from(words).unwrap()).unwrap())
    };
    let text = |p: &PathBuf| p.to_str().unwrap().to_owned();
    let (image, json, back) = (path("core-10.img"), path("json"), path("back"));
    words(&["--decode", "--pretty", "-i", &text(&image), "-o", &text(&json)]).unwrap();
    assert!(std::fs::read_to_string(&json).unwrap().starts_with("{\n    \"magic\": \"CORE\",\n"));
    words(&["--encode", "-i", &text(&json), "-o", &text(&back)]).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&image).unwrap());

    let raw =
        words(&["--decode", "-i", &text(&path("pages-1.img")), "-o", &text(&path("none"))]).unwrap_err();
    assert!(format!("{raw:#}").contains("pages-1.img: unknown magic"), "{raw:#}");
    assert!(!path("none").exists());
    let image_as_json = words(&["--encode", "-i", &text(&image), "-o", &text(&back)]).unwrap_err();
    assert!(format!("{image_as_json:#}").ends_with("is an image already; JSON is wanted"));
    assert!(words(&[]).is_err());
    assert!(words(&["a", "b"]).is_err());
    assert!(words(&["x", "DIR", "nonsense"]).is_err());
}
