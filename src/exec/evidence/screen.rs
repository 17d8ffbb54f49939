//! The text screen of a PC, from the memory of its video card. Pure.
//!
//! ```text
//!   32 KiB ──► rows of 80 cells (letter in code page 437, colour) ──► text that can be one? ──► UTF-8, oldest row first
//! ```
//!
//! Linux scrolls by moving its window through these 32 KiB and starts again at their beginning, so all of them are read: the rows
//! above the window are what has scrolled off. Where the window stands only the card knows; the kernel's time at the beginning of
//! its lines shows where the oldest row is.

/// Cells of a row.
const COLUMNS: usize = 80;
/// Rows that are seen at once.
const ROWS: usize = 25;
/// Rows on the first page that may hold something else than text.
const ODD_ROWS: usize = 3;

/// Code page 437 from 128 on.
const HIGH: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ";
/// Code page 437 below the blank.
const LOW: &str = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";

/// The text on it.
///
/// # Errors
/// Why it shows none: the screen is blank, or in a graphics mode.
pub fn text(memory: &[u8]) -> Result<String, String> {
    let rows: Vec<Option<String>> = memory.chunks_exact(2 * COLUMNS).map(row).collect();
    if ODD_ROWS < rows.iter().take(ROWS).filter(|row| row.is_none()).count() {
        return Err("the screen is in a graphics mode".to_owned());
    }
    let mut rows: Vec<String> = rows.into_iter().map(Option::unwrap_or_default).collect();
    while rows.pop_if(|row| row.is_empty()).is_some() {}
    if rows.is_empty() {
        return Err("the text screen is blank".to_owned());
    }
    if let Some(oldest) = oldest(&rows) {
        rows.rotate_left(oldest);
    }
    Ok(rows.join("\n") + "\n")
}

/// None: no text that anybody would write.
fn row(cells: &[u8]) -> Option<String> {
    let letters = cells.iter().step_by(2);
    let plain = |letter: &u8| matches!(letter, 0 | 0x20..=0x7e | 0xb0..=0xdf | 0xff);
    if letters.clone().filter(|letter| !plain(letter)).count() * 4 > COLUMNS {
        return None;
    }
    Some(letters.map(|letter| character(*letter)).collect::<String>().trim_end().to_owned())
}

fn character(letter: u8) -> char {
    let from = |table: &str, at: u8| table.chars().nth(at.into()).unwrap_or(' ');
    match letter {
        0..=0x1f => from(LOW, letter),
        0x20..=0x7e => char::from(letter),
        0x7f => '⌂',
        0x80..=0xff => from(HIGH, letter - 0x80),
    }
}

/// The first row after the newest whose time is smaller: from there on an earlier pass goes on.
fn oldest(rows: &[String]) -> Option<usize> {
    let times: Vec<(usize, f64)> = rows.iter().enumerate().filter_map(|(at, row)| Some((at, time(row)?))).collect();
    let newest = times.iter().max_by(|(_, a), (_, b)| a.total_cmp(b))?.0;
    times.iter().find(|(at, _)| newest < *at).map(|(at, _)| *at)
}

/// The kernel's time: `[   12.345678] `.
fn time(row: &str) -> Option<f64> {
    row.strip_prefix('[')?.split_once(']')?.0.trim().parse().ok().filter(|time: &f64| time.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card's memory with these rows, grey on black.
    fn memory(rows: &[&str]) -> Vec<u8> {
        let mut memory = [b' ', 7].repeat(0x4000);
        for (at, row) in rows.iter().enumerate() {
            for (column, letter) in row.bytes().enumerate() {
                memory[2 * (at * COLUMNS + column)] = letter;
            }
        }
        memory
    }

    #[test]
    fn what_is_written_is_read() {
        let two = "SeaBIOS (version 1.16.2)\n\nNo bootable device.\n";
        assert_eq!(text(&memory(&["SeaBIOS (version 1.16.2)", "", "No bootable device."])).as_deref(), Ok(two));
        let mut box_of_grub = memory(&[""]);
        for (at, letter) in [0xda, 0xc4, 0xbf, 0xe1, 0x81, 0xff, 0x00].into_iter().enumerate() {
            box_of_grub[2 * at] = letter;
        }
        assert_eq!(text(&box_of_grub).as_deref(), Ok("┌─┐ßü\n"));
        assert_eq!((LOW.chars().count(), HIGH.chars().count()), (0x20, 0x80));
    }

    #[test]
    fn what_is_no_text_is_said_to_be_none() {
        let noise: Vec<u8> = (0..0x8000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let graphics = Err("the screen is in a graphics mode".to_owned());
        let blank = Err("the text screen is blank".to_owned());
        for (memory, expected) in [
            (noise, &graphics),
            (vec![0x80; 0x8000], &graphics),
            (vec![0; 0x8000], &blank),
            (vec![0xff; 0x8000], &blank),
            (memory(&[]), &blank),
            (Vec::new(), &blank),
            (vec![b'x'; 159], &blank),
        ] {
            assert_eq!(&text(&memory), expected);
        }
    }

    #[test]
    fn a_window_that_began_anew_is_put_in_order() {
        let rows =
            ["[   20.0] newest but one", "[   21.0] newest", "  without a time", "[    3.0] oldest", "[    4.0] old"];
        let expected =
            "[    3.0] oldest\n[    4.0] old\n[   20.0] newest but one\n[   21.0] newest\n  without a time\n";
        assert_eq!(text(&memory(&rows)).as_deref(), Ok(expected));
        let in_order = "[    1.0] a\n[    1.0] b\n[nan] c\n";
        assert_eq!(text(&memory(&["[    1.0] a", "[    1.0] b", "[nan] c"])).as_deref(), Ok(in_order));
    }
}
