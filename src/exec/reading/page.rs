//! A screen as a page for text recognition. Pure.
//!
//! ```text
//!   PNG, PPM ──► grey ──► how far from the most frequent grey ──► dark on white ──► twice as large, with a margin ──► PGM
//! ```
//!
//! Recognisers are made for paper. Of a screen's font of 8 × 16 cells they read twice the size best, smoothed: with hard edges, or
//! three times as large, more letters are wrong (tried with the font of the firmware, white on blue and grey on black).

/// Pixels of the largest picture that is read: 3840 × 2160.
const PIXELS_MAX: usize = 3840 * 2160;
/// Larger ones are not scaled: 1920 × 1200.
const SCALED_MAX: usize = 1920 * 1200;
/// White around the text.
const MARGIN: usize = 20;
const WHITE: u8 = 255;

/// The page, as PGM.
///
/// # Errors
/// Why this cannot be read.
pub fn page(picture: &[u8]) -> Result<Vec<u8>, String> {
    let grey = if picture.starts_with(b"\x89PNG") { from_png(picture)? } else { from_ppm(picture)? };
    let inked = grey.inked().ok_or("the picture shows one colour only")?;
    let scaled = if SCALED_MAX < inked.pixels.len() { inked } else { inked.doubled() };
    Ok(scaled.pgm())
}

/// One byte a pixel.
struct Grey {
    width: usize,
    pixels: Vec<u8>,
}

fn from_ppm(picture: &[u8]) -> Result<Grey, String> {
    let (width, height, pixels) =
        crate::exec::evidence::picture::header(picture).ok_or("the picture is neither PNG nor PPM")?;
    of(width as usize, height as usize, pixels, 3)
}

fn from_png(picture: &[u8]) -> Result<Grey, String> {
    let bad = |error: png::DecodingError| format!("the picture cannot be read: {error}");
    let mut decoder = png::Decoder::new(std::io::Cursor::new(picture));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(bad)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    let length = reader.output_buffer_size().filter(|_| width.saturating_mul(height) <= PIXELS_MAX);
    let mut pixels = vec![0; length.ok_or("the picture is too large to be read")?];
    let shape = reader.next_frame(&mut pixels).map_err(bad)?;
    of(width, height, &pixels, shape.color_type.samples())
}

fn of(width: usize, height: usize, pixels: &[u8], samples: usize) -> Result<Grey, String> {
    let count = width.checked_mul(height).filter(|count| (1..=PIXELS_MAX).contains(count));
    let count = count.ok_or_else(|| format!("a picture of {width} × {height} pixels is not read"))?;
    if pixels.len() != count * samples {
        return Err("the picture is cut off".to_owned());
    }
    let grey = |pixel: &[u8]| match *pixel {
        [red, green, blue, ..] => ((77 * u32::from(red) + 150 * u32::from(green) + 29 * u32::from(blue)) >> 8) as u8,
        [grey, ..] => grey,
        [] => 0,
    };
    Ok(Grey { width, pixels: pixels.chunks_exact(samples).map(grey).collect() })
}

impl Grey {
    /// The backdrop white, what differs from it most black; none if nothing differs.
    fn inked(mut self) -> Option<Self> {
        let mut count = [0_usize; 256];
        self.pixels.iter().for_each(|grey| count[usize::from(*grey)] += 1);
        let backdrop = (0..=WHITE).max_by_key(|grey| count[usize::from(*grey)])?;
        let most = self.pixels.iter().map(|grey| grey.abs_diff(backdrop)).max().filter(|most| 0 < *most)?;
        let scale = |grey: u8| u32::from(grey.abs_diff(backdrop)) * u32::from(WHITE) / u32::from(most);
        self.pixels.iter_mut().for_each(|grey| *grey = WHITE - scale(*grey) as u8);
        Some(self)
    }

    /// Twice as large, each pixel smoothed with its neighbours.
    fn doubled(self) -> Self {
        let (width, height) = (self.width, self.pixels.len() / self.width);
        // The nearer pixel counts three times as much.
        let pair = |at: usize, most: usize| {
            let far = if at.is_multiple_of(2) { (at / 2).saturating_sub(1) } else { (at / 2 + 1).min(most - 1) };
            [(at / 2, 3), (far, 1)]
        };
        let columns: Vec<[(usize, u32); 2]> = (0..2 * width).map(|x| pair(x, width)).collect();
        let mut pixels = Vec::with_capacity(4 * self.pixels.len());
        for y in 0..2 * height {
            let rows = pair(y, height).map(|(y, weight)| (&self.pixels[y * width..][..width], weight));
            for column in &columns {
                let mut sum = 0;
                for (row, weight) in rows {
                    for (x, more) in column {
                        sum += u32::from(row[*x]) * weight * more;
                    }
                }
                pixels.push((sum / 16) as u8);
            }
        }
        Self { width: 2 * width, pixels }
    }

    fn pgm(&self) -> Vec<u8> {
        let (width, height) = (self.width + 2 * MARGIN, self.pixels.len() / self.width + 2 * MARGIN);
        let mut bytes = format!("P5\n{width} {height}\n255\n").into_bytes();
        let white = |bytes: &mut Vec<u8>, count: usize| bytes.resize(bytes.len() + count, WHITE);
        white(&mut bytes, MARGIN * width);
        for row in self.pixels.chunks_exact(self.width) {
            white(&mut bytes, MARGIN);
            bytes.extend_from_slice(row);
            white(&mut bytes, MARGIN);
        }
        white(&mut bytes, MARGIN * width);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of 3 × 1: backdrop, backdrop, letter.
    fn ppm(backdrop: [u8; 3], letter: [u8; 3]) -> Vec<u8> {
        [&b"P6 3 1 255\n"[..], &backdrop, &backdrop, &letter].concat()
    }

    #[test]
    fn letters_are_dark_on_white_whatever_they_were() {
        for (backdrop, letter) in
            [([0; 3], [170; 3]), ([255; 3], [0; 3]), ([0, 0, 170], [255; 3]), ([0, 120, 215], [255; 3])]
        {
            let raw = ppm(backdrop, letter);
            let page = super::page(&raw).unwrap();
            assert!(page.starts_with(b"P5\n46 42\n255\n"));
            let row = &page[b"P5\n46 42\n255\n".len() + MARGIN * 46..][..46];
            assert_eq!(&row[MARGIN..][..6], [255, 255, 255, 191, 63, 0], "{backdrop:?}");
            let png = crate::exec::evidence::picture::png(raw).unwrap();
            assert_eq!(super::page(&png), Ok(page), "the same as PNG");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (picture, expected) in [
            (&b""[..], "neither PNG nor PPM"),
            (b"\x89PNG\r\n\x1a\n junk", "cannot be read"),
            (b"P6 2 1 255\nabc", "cut off"),
            (b"P6 99999 99999 255\n", "not read"),
            (b"P6 2 1 255\nabcabc", "one colour"),
        ] {
            let why = page(picture).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
    }
}
