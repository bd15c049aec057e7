//! How things look on a terminal and elsewhere: colours, tree lines, sizes, dates, quoted words.

use std::{env, io::IsTerminal};

/// Columns of the overview.
pub const WIDTH: usize = 80;

/// What the output can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Colours are wanted.
    pub colour: bool,
    /// Lines are drawn and long ones are folded.
    pub terminal: bool,
}

/// Colours by meaning.
#[derive(Debug, Clone, Copy)]
pub enum Colour {
    Good,
    Bad,
    Doubt,
    Heading,
    Number,
    Faint,
}

impl Style {
    /// Of standard output. `NO_COLOR` is honoured.
    pub fn of_stdout() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let no_color = env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { colour: terminal && !no_color, terminal }
    }

    /// Text in a colour.
    pub fn paint(self, colour: Colour, text: &str) -> String {
        if !self.colour {
            return text.into();
        }
        let code = match colour {
            Colour::Good => "1;32",
            Colour::Bad => "1;31",
            Colour::Doubt => "1;33",
            Colour::Heading => "1",
            Colour::Number => "36",
            Colour::Faint => "2",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// A size with one decimal and a unit of 1024: `22.9M`.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["K", "M", "G", "T", "P", "E"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" || value >= 100.0 { format!("{value:.0}{unit}") } else { format!("{value:.1}{unit}") }
}

/// Microseconds as a duration: `45 ms`.
pub fn duration(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

/// Seconds since 1970 as a date in UTC.
pub fn date(seconds: i64) -> String {
    let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years that begin in March, so that the leap day is the last; eras of 400 of them.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Words as a shell would take them; what cannot be printed is written as `\xNN` or `\u{NN}`.
pub fn words<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    words.into_iter().map(|w| word(w.as_ref())).collect::<Vec<_>>().join(" ")
}

fn word(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", printable(word).replace('\'', "'\\''"))
    }
}

/// Text with nothing in it that would move the cursor or change colours.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

/// Folds text at blanks to lines of at most `width` characters; words longer than that are cut.
pub fn fold(text: &str, width: usize) -> Vec<String> {
    let width = width.max(8);
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut rest: Vec<char> = word.chars().collect();
        let used = lines.last().map_or(0, |l| l.chars().count());
        if used > 0 && used + 1 + rest.len() <= width {
            if let Some(line) = lines.last_mut() {
                line.push(' ');
            }
        } else if used > 0 {
            lines.push(String::new());
        }
        loop {
            let used = lines.last().map_or(0, |l| l.chars().count());
            let take = rest.len().min(width - used.min(width));
            if let Some(line) = lines.last_mut() {
                line.extend(rest.drain(..take));
            }
            if rest.is_empty() {
                break;
            }
            lines.push(String::new());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_dates_and_durations() {
        assert_eq!((size(0), size(4096), size(23_998_464)), ("0B".into(), "4.0K".into(), "22.9M".into()));
        assert_eq!((size(150 << 20), size(u64::MAX)), ("150M".into(), "16.0E".into()));
        assert_eq!(
            (duration(999), duration(45_300), duration(2_500_000)),
            ("999 us".into(), "45.3 ms".into(), "2.50 s".into())
        );
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(date(951_868_800), "2000-03-01 00:00:00 UTC");
        assert_eq!(date(1_795_400_325), "2026-11-23 02:18:45 UTC");
        assert_eq!(date(-1), "1969-12-31 23:59:59 UTC");
    }

    #[test]
    fn words_are_safe_to_print_and_paste() {
        assert_eq!(words(["a", "-b=c", "d e", "", "it's"]), r"a -b=c 'd e' '' 'it'\''s'");
        assert_eq!(words(["\x1b[31mred"]), r"'\u{1b}[31mred'");
        assert_eq!(printable("a\tb"), r"a\tb");
    }

    #[test]
    fn long_lines_fold_at_blanks() {
        assert_eq!(fold("aa bb cc", 8), ["aa bb cc"]);
        assert_eq!(fold("aaaa bbbb cc", 9), ["aaaa bbbb", "cc"]);
        assert_eq!(fold("a bbbbbbbbbbbbbbbbbb c", 8), ["a", "bbbbbbbb", "bbbbbbbb", "bb c"]);
        assert_eq!(fold("", 8), [""]);
    }
}
