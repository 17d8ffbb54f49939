//! Standard output and error: tables, colour only on a terminal, progress only on a terminal, errors of writing given
//! back instead of a panic.

use std::io::{IsTerminal, Write, stderr, stdout};
use std::time::Duration;

use comfy_table::{Attribute, Cell, Color, ColumnConstraint, ContentArrangement, Table, Width, presets};
use serde::Serialize;

/// Where there is no terminal.
const PLAIN_COLUMNS: u16 = 80;
/// A wider one makes lines hard to read.
const WIDEST_COLUMNS: u16 = 160;
/// Names are cut to this in tables, so that every table fits.
const NAME_COLUMNS: usize = 24;
const SPIN: [&str; 4] = ["|", "/", "-", "\\"];
const SPIN_PERIOD: Duration = Duration::from_millis(200);

/// Where the answer goes.
#[derive(Debug)]
pub struct Out {
    colour: bool,
    terminal: bool,
    columns: u16,
}

/// Meaning of a word, shown as its colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Doubtful,
    /// Wrong.
    Bad,
    /// Neither.
    Plain,
}

impl Out {
    /// For this process.
    pub fn new(no_colour: bool) -> Self {
        let terminal = stdout().is_terminal();
        let colour = terminal && !no_colour && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let columns = if terminal { Table::new().width().unwrap_or(PLAIN_COLUMNS) } else { PLAIN_COLUMNS };
        Self { colour, terminal, columns: columns.clamp(PLAIN_COLUMNS / 2, WIDEST_COLUMNS) }
    }

    /// Standard output is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes text and a newline.
    pub fn line(&mut self, text: &str) -> std::io::Result<()> {
        let mut out = stdout().lock();
        out.write_all(text.as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// Writes JSON on one line.
    pub fn json(&mut self, value: &impl Serialize) -> std::io::Result<()> {
        let text = serde_json::to_string(value).map_err(std::io::Error::other)?;
        self.line(&text)
    }

    /// Writes a line to standard error; one that cannot be written has no other place to go.
    pub fn error(&self, text: &str) {
        let _ = writeln!(stderr(), "{text}");
    }

    /// A table without rules, its last column as wide as there is room.
    pub fn table(&self, header: &[&str], rows: Vec<Vec<Word>>) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_width(self.columns);
        if self.colour {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(header.iter().map(|name| Cell::new(name).add_attribute(Attribute::Dim)));
        for row in rows {
            table.add_row(row.into_iter().map(Word::cell));
        }
        let last = header.len() - 1;
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, if index == last { 0 } else { 2 }));
            if index != last {
                column.set_constraint(ColumnConstraint::ContentWidth);
            } else {
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(6)));
            }
        }
        table.trim_fmt()
    }

    /// `key  value` lines, values aligned and wrapped.
    pub fn fields(&self, fields: &[(&str, Word)]) -> String {
        let fields: Vec<&(&str, Word)> = fields.iter().filter(|(_, word)| !word.text.is_empty()).collect();
        let width = fields.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 2;
        let room = usize::from(self.columns).saturating_sub(width).max(20);
        let mut lines = Vec::new();
        for (key, word) in fields {
            for (index, part) in wrap(&word.text, room).into_iter().enumerate() {
                let key = if index == 0 { *key } else { "" };
                lines.push(format!("{key:<width$}{}", self.paint(&part, word.tone)));
            }
        }
        lines.join("\n")
    }

    /// Text wrapped behind a first part; further lines are indented by as much.
    pub fn wrapped(&self, first: &str, text: &str) -> String {
        let indent = first.chars().count();
        let room = usize::from(self.columns).saturating_sub(indent).max(20);
        let mut lines = wrap(text, room).into_iter();
        let mut whole = format!("{first}{}", lines.next().unwrap_or_default());
        for line in lines {
            whole.push_str(&format!("\n{:indent$}{line}", ""));
        }
        whole
    }

    /// The text in the colour of its tone, where there is colour.
    pub fn paint(&self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Doubtful => "33",
            Tone::Bad => "31",
            Tone::Plain => return text.to_owned(),
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Waits for work and shows on a terminal that it goes on.
    pub async fn progress<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        if !stderr().is_terminal() {
            return work.await;
        }
        let mut work = std::pin::pin!(work);
        let mut ticks = 0;
        loop {
            tokio::select! {
                done = &mut work => {
                    let _ = write!(stderr(), "\r\x1b[K");
                    return done;
                }
                () = tokio::time::sleep(SPIN_PERIOD) => {
                    ticks += 1;
                    let seconds = ticks * SPIN_PERIOD.as_millis() as usize / 1000;
                    let _ = write!(stderr(), "\r\x1b[K{} {what} … {seconds} s", SPIN[ticks % SPIN.len()]);
                }
            }
        }
    }
}

/// A piece of text with a meaning.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Word {
    text: String,
    tone: Tone,
}

impl Word {
    /// With a meaning.
    pub fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }
    /// Without.
    pub fn plain(text: impl Into<String>) -> Self {
        Self::new(text, Tone::Plain)
    }
    /// A name, cut if it is very long.
    pub fn name(text: &str) -> Self {
        Self::plain(cut(text, NAME_COLUMNS))
    }
    /// The text, or `-`.
    pub fn or_dash(text: Option<&str>) -> Self {
        Self::plain(text.unwrap_or("-"))
    }
    fn cell(self) -> Cell {
        let cell = Cell::new(self.text);
        match self.tone {
            Tone::Good => cell.fg(Color::Green),
            Tone::Doubtful => cell.fg(Color::Yellow),
            Tone::Bad => cell.fg(Color::Red),
            Tone::Plain => cell,
        }
    }
}

fn cut(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    text.chars().take(columns - 1).chain(['…']).collect()
}

/// At blanks; a longer word gets a line of its own.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("begins with one line and only grows");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= columns {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
