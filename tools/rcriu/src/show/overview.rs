//! The overview as text: 80 columns, lines and colours on a terminal only.

use std::io::{self, Write};

use rcriu_images::set::MAX_BARS;

use super::{
    report::{Report, TaskReport},
    style::{self, Colour, Style, WIDTH},
};

/// Findings that are printed before the rest is only counted.
const MAX_FINDINGS: usize = 5;

pub fn print(report: &Report, style: Style, out: &mut impl Write) -> io::Result<()> {
    verdict(report, style, out)?;
    facts(report, style, out)?;
    if !report.tasks.is_empty() {
        heading("Processes", style, out)?;
        report.tasks.iter().try_for_each(|task| self::task(task, style, out))?;
    }
    findings(report, style, out)?;
    restore(report, style, out)
}

fn heading(text: &str, style: Style, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\n{}", style.paint(Colour::Heading, text))
}

fn verdict(report: &Report, style: Style, out: &mut impl Write) -> io::Result<()> {
    let verdict = &report.verdict;
    let parent = verdict.parent.as_deref().unwrap_or_default();
    let (colour, text) = match verdict.state {
        "complete" => (Colour::Good, "complete".to_owned()),
        "with-parent" => (Colour::Good, format!("complete together with its parent {parent}")),
        "pre-dump" => (Colour::Doubt, "memory of a pre-dump, to be the parent of a dump".to_owned()),
        "needs-parent" => (Colour::Bad, format!("needs its parent {parent}, which is not there")),
        _ => (Colour::Bad, "truncated".to_owned()),
    };
    let dir = style.paint(Colour::Heading, &style::printable(&report.dir));
    writeln!(out, "{dir}: {}", style.paint(colour, &style::printable(&text)))?;
    if let Some(reason) = &verdict.reason {
        folded("  ", &style::printable(reason), style, out)?;
    }
    Ok(())
}

/// One fact a line, its name in front.
fn facts(report: &Report, style: Style, out: &mut impl Write) -> io::Result<()> {
    let mut fact = |name: &str, text: String| {
        if text.is_empty() {
            return Ok(());
        }
        let lines = if style.terminal { style::fold(&text, WIDTH - 14) } else { vec![text] };
        for (at, line) in lines.iter().enumerate() {
            let name = if at == 0 { name } else { "" };
            writeln!(out, "  {} {line}", style.paint(Colour::Faint, &format!("{name:<11}")))?;
        }
        Ok(())
    };
    let mut when: Vec<String> = report.dumped_at.map(style::date).into_iter().collect();
    when.extend(report.times.as_ref().map(|t| format!("frozen for {}", style::duration(t.frozen))));
    fact("dumped", when.join(", "))?;
    let place = [report.hostname.clone(), report.architecture.clone(), report.cpu.clone()];
    fact("on", style::printable(&place.into_iter().flatten().collect::<Vec<_>>().join(", ")))?;
    fact("namespaces", report.namespaces.join(", "))?;
    fact("processes", processes(report))?;
    fact("memory", memory(report))?;
    let total: usize = report.descriptors.values().sum();
    if total > 0 {
        let kinds: Vec<_> =
            report.descriptors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        fact("descriptors", format!("{total} ({}) of {} open files", kinds.join(", "), report.open_files))?;
    }
    let sockets: Vec<_> =
        report.sockets.iter().map(|s| format!("{} {} {}", s.count, s.kind, s.state)).collect();
    fact("sockets", sockets.join(", "))
}

fn processes(report: &Report) -> String {
    if report.tasks.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "{}, {}",
        plural(report.tasks.len(), "process", "processes"),
        plural(report.thread_count, "thread", "threads")
    );
    for state in ["stopped", "zombie"] {
        let count = report.tasks.iter().filter(|t| t.state == state).count();
        if count > 0 {
            text.push_str(&format!(", {count} {state}"));
        }
    }
    text
}

fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn memory(report: &Report) -> String {
    let memory = &report.memory;
    let mut parts = vec![format!("{} of {} mapped", style::size(memory.rss), style::size(memory.mapped))];
    let kinds = [
        (memory.stored, "stored"),
        (memory.in_parent, "in parent"),
        (memory.lazy, "lazy"),
        (memory.missing, "missing"),
    ];
    parts.extend(
        kinds
            .iter()
            .filter(|(size, _)| *size > 0)
            .map(|(size, what)| format!("{} {what}", style::size(*size))),
    );
    if memory.shared > 0 {
        parts.push(format!("{} shared", style::size(memory.shared)));
    }
    if let (Some(unique), Some(zero), Some(pages)) = (memory.unique_pages, memory.zero_pages, memory.pages)
        && pages > 0
    {
        parts.push(format!("{unique} of {pages} pages unique, {zero} zero"));
    }
    parts.join(", ")
}

fn task(task: &TaskReport, style: Style, out: &mut impl Write) -> io::Result<()> {
    let (first, rest) = branches(task, style);
    let pid = format!("{:>6} ", task.pid);
    let command = match &task.cmdline {
        Some(words) => style::words(words),
        None => format!("[{}]", style::printable(&task.comm)),
    };
    let mut notes = Vec::new();
    if task.threads.len() > 1 {
        notes.push(format!("{} threads", task.threads.len()));
    }
    if task.memory.rss > 0 {
        notes.push(style::size(task.memory.rss));
    }
    if task.state != "alive" {
        notes.push(task.state.into());
    }
    let notes = if notes.is_empty() { String::new() } else { format!("({})", notes.join(", ")) };
    let indent = pid.len() + first.chars().count().max(rest.chars().count());
    let painted = style.paint(Colour::Number, &pid);
    if !style.terminal {
        return writeln!(out, "{}", format!("{pid}{first}{command} {notes}").trim_end());
    }
    let lines = style::fold(&format!("{command} {notes}"), WIDTH.saturating_sub(indent));
    for (at, line) in lines.iter().enumerate() {
        let line = line.trim_end();
        if at == 0 {
            writeln!(out, "{painted}{}{line}", style.paint(Colour::Faint, &first))?;
        } else {
            writeln!(out, "{:7}{}{line}", "", style.paint(Colour::Faint, &rest))?;
        }
    }
    Ok(())
}

/// What stands before a task's first line, and before its other lines.
fn branches(task: &TaskReport, style: Style) -> (String, String) {
    if !style.terminal {
        let indent = "  ".repeat(task.depth.min(MAX_BARS + 1));
        return (indent.clone(), indent);
    }
    let bars: String = task.bars.iter().map(|&bar| if bar { "│ " } else { "  " }).collect();
    match (task.depth, task.last) {
        (0, _) => (String::new(), "  ".into()),
        (_, false) => (format!("{bars}├─"), format!("{bars}│   ")),
        (_, true) => (format!("{bars}└─"), format!("{bars}    ")),
    }
}

fn findings(report: &Report, style: Style, out: &mut impl Write) -> io::Result<()> {
    if report.findings.is_empty() {
        return Ok(());
    }
    heading("Damage", style, out)?;
    for finding in report.findings.iter().take(MAX_FINDINGS) {
        folded("  ", &style::printable(&format!("{}: {}", finding.image, finding.text)), style, out)?;
    }
    if report.findings.len() > MAX_FINDINGS {
        writeln!(out, "  and {} more: see rcriu show --check", report.findings.len() - MAX_FINDINGS)?;
    }
    Ok(())
}

fn restore(report: &Report, style: Style, out: &mut impl Write) -> io::Result<()> {
    if !matches!(report.verdict.state, "complete" | "with-parent") {
        return Ok(());
    }
    heading("Restore", style, out)?;
    // Never folded: it is there to be pasted.
    writeln!(out, "  {}", report.restore)?;
    for need in &report.needs {
        folded("    ", &style::printable(&format!("{}: {}", need.option, need.why)), style, out)?;
    }
    Ok(())
}

fn folded(indent: &str, text: &str, style: Style, out: &mut impl Write) -> io::Result<()> {
    if !style.terminal {
        return writeln!(out, "{indent}{text}");
    }
    style::fold(text, WIDTH - indent.len()).iter().try_for_each(|line| writeln!(out, "{indent}{line}"))
}
