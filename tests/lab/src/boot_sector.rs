//! Disks whose boot sector paints one screen and stops, without a system: what a guest shows that has failed.
//!
//! ```text
//! sector 0    loads the next ones, sets the video mode, fills the screen with a colour, writes the text, halts
//! sector 1 …  the text, in code page 437, ended by a zero
//! ```
//!
//! The firmware writes the letters, in graphics modes with the font of its 8 × 16 cells.

/// Bytes of a sector.
const SECTOR: usize = 512;
/// Sectors of text.
const TEXT_SECTORS: u8 = 8;
/// Bytes of a disk.
pub const DISK: usize = 1024 * 1024;

/// How the screen is painted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 80 × 25 letters.
    Text,
    /// 640 × 480 pixels in 16 colours.
    Graphics,
}

/// What it looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paint {
    /// Grey on black.
    Dark,
    /// White on blue.
    Blue,
}

/// A disk that shows this text. Lines end in `\n`.
///
/// # Panics
/// If the text is longer than what is loaded of it.
#[must_use]
pub fn disk(mode: Mode, paint: Paint, text: &str) -> Vec<u8> {
    let (number, last_row) = match mode {
        Mode::Text => (0x03, 24),
        Mode::Graphics => (0x12, 29),
    };
    // The fill is an attribute in the text mode, a colour in the other. There, bit 7 of the letters' colour has them mixed with the
    // backdrop (exclusive or), which they would blacken otherwise: yellow and blue make white.
    let (fill, letters) = match (mode, paint) {
        (Mode::Text, Paint::Dark) => (0x07, 0),
        (Mode::Text, Paint::Blue) => (0x1f, 0),
        (Mode::Graphics, Paint::Dark) => (0x00, 0x07),
        (Mode::Graphics, Paint::Blue) => (0x01, 0x8e),
    };
    let mut disk = program(number, fill, last_row, letters);
    let text = text.replace('\n', "\r\n").into_bytes();
    assert!(text.len() < SECTOR * usize::from(TEXT_SECTORS), "a text that is loaded as a whole");
    disk.extend(text);
    disk.resize(DISK, 0);
    disk
}

/// The boot sector.
fn program(mode: u8, fill: u8, last_row: u8, letters: u8) -> Vec<u8> {
    let mut code = vec![
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 0x7c00
        0xfb, // sti
        0xfc, // cld
        0xbe, 0x00, 0x7d, // mov si, 0x7d00: what to load
        0xb4, 0x42, // mov ah, 0x42: read sectors; dl is the disk already
        0xcd, 0x13, // int 0x13
        0xb8, mode, 0x00, // mov ax, mode: set the video mode
        0xcd, 0x10, // int 0x10
        0xb8, 0x00, 0x06, // mov ax, 0x0600: clear a window
        0xb7, fill, // mov bh, fill
        0x31, 0xc9, // xor cx, cx: from the first cell
        0xba, 79, last_row, // mov dx: to the last one
        0xcd, 0x10, // int 0x10
        0xbe, 0x00, 0x7e, // mov si, 0x7e00: the text
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x09, // jz done
        0xb4, 0x0e, // mov ah, 0x0e: write as a terminal does
        0xbb, letters, 0x00, // mov bx, letters
        0xcd, 0x10, // int 0x10
        0xeb, 0xf2, // jmp next
        0xfa, // done: cli
        0xf4, // hlt
        0xeb, 0xfc, // jmp done
    ];
    code.resize(0x100, 0);
    // Size of this list, sectors, to 0000:7e00, from sector 1.
    code.extend([0x10, 0, TEXT_SECTORS, 0, 0x00, 0x7e, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    code.resize(SECTOR - 2, 0);
    code.extend([0x55, 0xaa]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_can_be_booted_and_holds_its_text() {
        let disk = disk(Mode::Text, Paint::Dark, "a\nb");
        assert_eq!((disk.len(), &disk[510..512], &disk[512..517]), (DISK, &[0x55, 0xaa][..], &b"a\r\nb\0"[..]));
    }
}
