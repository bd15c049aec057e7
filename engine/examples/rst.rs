use rcriu_engine::{kernel::Kernel, options::*, restore};
struct L;
impl log::Log for L {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, r: &log::Record) {
        eprintln!(
            "{:6}: {} {}: {}",
            std::process::id(),
            r.level(),
            r.target().rsplit("::").next().unwrap_or(""),
            r.args()
        );
    }
    fn flush(&self) {}
}
static LL: L = L;
fn main() {
    log::set_logger(&LL).unwrap();
    log::set_max_level(if std::env::var("V").is_ok() {
        log::LevelFilter::Debug
    } else {
        log::LevelFilter::Warn
    });
    let args: Vec<String> = std::env::args().collect();
    let mut opts = RestoreOptions::new(Dir::open(&args[1]).unwrap());
    opts.detached = args.contains(&"-d".to_string());
    opts.common.shell_job = args.contains(&"-j".to_string());
    opts.sibling = args.contains(&"-S".to_string());
    opts.leave_stopped = args.contains(&"-s".to_string());
    rcriu_engine::process::prepare_signals().unwrap();
    let kernel = Kernel::probe().unwrap();
    if args.contains(&"--dry".to_string()) {
        println!("{}", serde_json::to_string_pretty(&restore::dry_run(&opts, &kernel).unwrap()).unwrap());
        return;
    }
    match restore::restore(&opts, &kernel) {
        Ok(r) => {
            println!("OK {}", r.root);
            if !opts.detached {
                restore::wait_for_all().unwrap();
            }
        }
        Err(e) => {
            println!("FAILED {e}");
            std::process::exit(1)
        }
    }
}
