//! The tracer is killed at random moments; the process it had stopped must live on.

use std::time::{Duration, Instant, SystemTime};

use rcriu_engine::faults;

use crate::target::{Target, possible};

/// So many, or as many as fit into the time: under emulation each takes long.
const KILLS: u32 = 200;
const TIME: Duration = Duration::from_secs(60);

#[test]
fn the_target_outlives_its_tracer() {
    if !possible("the_target_outlives_its_tracer") {
        return;
    }
    let mut random = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    let mut harmed = Vec::new();
    let mut shortened = 0;
    let mut target = Target::start("victim");
    let start = Instant::now();
    let mut kills = 0;
    while kills < KILLS && start.elapsed() < TIME {
        kills += 1;
        let tracer = Target::start(&format!("tracer {}", target.pid()));
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(random % 20_000));
        drop(tracer);
        if let Some(how) = harm(&target) {
            harmed.push(format!("kill {kills}: {how}"));
            target = Target::start("victim");
        } else {
            shortened = target.word(target.words[1].parse().unwrap());
        }
    }
    eprintln!(
        "{} of {kills} kills of the tracer harmed the target {harmed:?}; {shortened} sleeps ended early",
        harmed.len()
    );
    // The two system calls that make and remove the mapping have no net.
    assert!(harmed.len() as u32 * 50 <= kills, "{harmed:?}");
    if harmed.is_empty() {
        target.finish();
    }
}

/// Every point of a visit, with an error there and with our death there.
#[test]
fn the_target_outlives_every_failure_of_a_visit() {
    if !possible("the_target_outlives_every_failure_of_a_visit") {
        return;
    }
    let target = Target::start("victim");
    let mut points = 0;
    for point in faults::POINTS.iter().filter(|p| p.starts_with("infect-")) {
        for end in ["", ":kill"] {
            let fault = format!("{point}{end}");
            let mut tracer =
                Target::spawn(&format!("tracer-once {}", target.pid()), &[(faults::FAULT, fault.as_str())]);
            match tracer.line("ready") {
                Some(said) => assert!(end.is_empty() && said.contains("fault injected"), "{fault}: {said}"),
                None => assert_eq!(end, ":kill", "{fault}: it died"),
            }
            assert_eq!(harm(&target), None, "{fault}");
            points += 1;
        }
    }
    assert!(points >= 16);
    target.finish();
}

/// What is wrong with the target, if anything: all its workers must make progress.
fn harm(target: &Target) -> Option<String> {
    let rounds: u64 = target.words[0].parse().unwrap();
    let read = |i: u64| {
        let mut bytes = [0; 8];
        rcriu_engine::sys::vm::read(target.pid(), rounds + 8 * i, &mut bytes).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    for worker in 0..4 {
        let Some(before) = read(worker) else { return Some("it is dead".into()) };
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match read(worker) {
                None => return Some("it died".into()),
                Some(now) if now != before => break,
                _ if Instant::now() > end => {
                    return Some(format!("worker {worker} hangs in state {}", target.state()));
                }
                _ => std::thread::yield_now(),
            }
        }
    }
    None
}
