//! Dumps a tree into a folder: `dump PID DIR [run|stop|kill] [shell-job]`. For work on the engine without a
//! front end.

use rcriu_engine::{
    dump,
    kernel::Kernel,
    options::{Afterwards, Dir, DumpOptions},
};

struct Stderr;
impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{:5} {}: {}", record.level(), record.target(), record.args());
    }
    fn flush(&self) {}
}

fn main() -> std::process::ExitCode {
    let _ = log::set_logger(&Stderr);
    log::set_max_level(log::LevelFilter::Info);
    let args: Vec<String> = std::env::args().collect();
    let [_, pid, dir, rest @ ..] = args.as_slice() else {
        eprintln!("usage: dump PID DIR [run|stop|kill] [shell-job] [freezer=DIR]");
        return 2.into();
    };
    let mut options =
        DumpOptions::new(Dir::open(dir).expect("DIR is a folder"), pid.parse().expect("PID is a number"));
    for word in rest {
        match word.as_str() {
            "run" => options.afterwards = Afterwards::Run,
            "stop" => options.afterwards = Afterwards::Stop,
            "kill" => options.afterwards = Afterwards::Kill,
            "shell-job" => options.common.shell_job = true,
            "quiet" => log::set_max_level(log::LevelFilter::Warn),
            other => match other.strip_prefix("freezer=") {
                Some(folder) => options.freeze_cgroup = Some(folder.into()),
                None => eprintln!("not understood: {other}"),
            },
        }
    }
    let result = Kernel::probe().and_then(|kernel| dump::dump(&options, &kernel));
    match result {
        Ok(()) => 0.into(),
        Err(e) => {
            eprintln!("{e}");
            1.into()
        }
    }
}
