//! Help, man page and shell completions, all made from the definitions in `options` and `actions`.

use clap::{Arg, ArgAction, Command};

use super::actions::Action;
use super::options::{self, Opt, Takes};
use super::own;

/// Columns of help.
const WIDTH: usize = 80;

const ABOUT: &str = "Freezes running processes, saves them in files and brings them back";

const AFTER: &str = "Options may stand before or after the command, long names may be abbreviated.\n\
    Those marked [no-] are taken back by --no-NAME.";

/// Text of `--help`, about one action or all.
pub fn text(action: Option<Action>) -> String {
    let command = match action {
        Some(action) => one(action, false),
        None => whole(false),
    };
    let mut command = command.term_width(WIDTH);
    command.render_help().to_string()
}

/// Page rcriu(8).
pub fn man() -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(whole(true)).section("8").manual("Checkpoint and restore").render(&mut page)?;
    Ok(page)
}

/// Completions for a shell, for both names of the program.
pub fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut text = Vec::new();
    for name in ["rcriu", "criu"] {
        clap_complete::generate(shell, &mut with_subcommands(), name, &mut text);
    }
    text
}

fn base(name: &'static str) -> Command {
    Command::new(name)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .disable_help_subcommand(true)
        .version(env!("CARGO_PKG_VERSION"))
}

/// Every option in one list, as CRIU's help has it.
fn whole(long: bool) -> Command {
    let mut commands = String::from("Commands:");
    let width = 15;
    let own = own::listed().map(|own| (own.name, own.help));
    for (name, help) in Action::LISTED.iter().map(|a| (a.name(), a.help())).chain(own) {
        commands.push_str(&format!("\n  {name:<width$}{help}"));
    }
    base("rcriu")
        .about(ABOUT)
        .override_usage(
            "rcriu dump -t PID [-D DIR] [OPTIONS]\n       rcriu restore [-D DIR] [OPTIONS]\n       rcriu COMMAND \
             [OPTIONS]",
        )
        .help_template(format!("{{about}}\n\n{{usage-heading}} {{usage}}\n\n{commands}\n\n{{all-args}}{{after-help}}"))
        .after_help(AFTER)
        .args(sorted(|_| true).map(|o| arg(o, long)))
}

/// The options of one action.
fn one(action: Action, long: bool) -> Command {
    base("rcriu")
        .about(action.help())
        .override_usage(format!("rcriu {} [OPTIONS]", action.name()))
        .after_help(AFTER)
        .args(sorted(|o| o.on.contains(&action)).map(|o| arg(o, long)))
}

/// The shape that completion scripts are made from.
fn with_subcommands() -> Command {
    let mut root = base("rcriu").args(sorted(|_| true).map(|o| arg(o, false).global(true)));
    let mut cpuinfo = Command::new("cpuinfo").about("Features of the CPU");
    for action in Action::LISTED {
        match action.name().split_once(' ') {
            None => root = root.subcommand(Command::new(action.name()).about(action.help())),
            Some((_, sub)) => cpuinfo = cpuinfo.subcommand(Command::new(sub).about(action.help())),
        }
    }
    for own in own::listed() {
        root = root.subcommand(Command::new(own.name).about(own.help));
    }
    root.subcommand(cpuinfo)
}

fn sorted(wanted: impl Fn(&Opt) -> bool) -> impl Iterator<Item = &'static Opt> {
    let mut list: Vec<_> = options::all().filter(|o| !o.on.is_empty() && wanted(o)).collect();
    list.sort_by_key(|o| o.group);
    list.into_iter()
}

fn arg(opt: &'static Opt, long: bool) -> Arg {
    let mut help = opt.help.to_owned();
    if opt.takes == Takes::Switch {
        help.push_str(" [no-]");
    }
    if long && !opt.more.is_empty() {
        help.push_str(". ");
        help.push_str(opt.more);
    }
    let mut arg = Arg::new(opt.long).long(opt.long).help(help).help_heading(opt.group.title());
    if let Some(short) = opt.short {
        arg = arg.short(short);
    }
    match opt.takes {
        Takes::Nothing | Takes::Switch => arg.action(ArgAction::SetTrue),
        Takes::One(what) => arg.action(ArgAction::Append).value_name(what),
        Takes::Maybe(what) => {
            arg.action(ArgAction::Append).value_name(what).num_args(0..=1).require_equals(true)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_fits_eighty_columns_and_names_every_option() {
        let text = text(None);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        for opt in options::all().filter(|o| !o.on.is_empty()) {
            assert!(text.contains(&format!("--{}", opt.long)), "--{}", opt.long);
        }
        for action in Action::LISTED {
            assert!(text.contains(action.name()));
        }
    }

    #[test]
    fn help_about_an_action_has_its_options_only() {
        for action in Action::LISTED {
            for line in text(Some(*action)).lines() {
                assert!(line.chars().count() <= WIDTH, "{line}");
            }
        }
        let text = text(Some(Action::Restore));
        assert!(text.contains("--restore-sibling") && !text.contains("--leave-running"));
    }

    #[test]
    fn the_man_page_has_every_option_and_its_longer_text() {
        let page = String::from_utf8(man().unwrap()).unwrap();
        assert!(page.contains(".TH"));
        let plain = page.replace("\\-", "-");
        for opt in options::all().filter(|o| !o.on.is_empty()) {
            assert!(plain.contains(&format!("--{}", opt.long)), "--{}", opt.long);
        }
    }

    #[test]
    fn completions_know_actions_and_options_under_both_names() {
        use clap_complete::Shell;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let text = String::from_utf8(completions(shell)).unwrap();
            assert!(text.contains("pre-dump") && text.contains("images-dir"), "{shell}");
            assert!(text.contains("rcriu") && text.contains(" criu"), "{shell}");
        }
    }
}
