//! Screenshots as PNG. Pure.
//!
//! QEMU gives PNG if it was built with it, else raw pixels (PPM, `P6`). Both come from the host's QEMU, but what is on them from the
//! guest: sizes are checked before anything is allocated by them.

/// The longest that is kept, in bytes.
const MAX: usize = 8 * 1024 * 1024;
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// As PNG.
///
/// # Errors
/// Why it cannot be kept.
pub fn png(picture: Vec<u8>) -> Result<Vec<u8>, String> {
    let png = if picture.starts_with(PNG) { picture } else { from_ppm(&picture)? };
    if MAX < png.len() {
        return Err(format!("the picture has {} KiB, more than {} are not kept", png.len() >> 10, MAX >> 10));
    }
    Ok(png)
}

fn from_ppm(ppm: &[u8]) -> Result<Vec<u8>, String> {
    let bad = || "the picture is neither PNG nor PPM".to_owned();
    let (width, height, pixels) = header(ppm).ok_or_else(bad)?;
    let length = u64::from(width) * u64::from(height) * 3;
    if width == 0 || height == 0 || u64::try_from(pixels.len()) != Ok(length) {
        return Err(format!("the picture is cut off: {width} × {height} pixels in {} bytes", pixels.len()));
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(pixels));
    written.map_err(|error| format!("the picture cannot be written as PNG: {error}"))?;
    Ok(out)
}

/// Of a PPM: width, height, pixels: `P6 WIDTH HEIGHT 255`, one white space after each.
#[must_use]
pub fn header(ppm: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = ppm.strip_prefix(b"P6")?;
    let mut numbers = [0_u32; 3];
    for number in &mut numbers {
        let from = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        let length = rest[from..].iter().take(6).position(u8::is_ascii_whitespace)?;
        *number = std::str::from_utf8(&rest[from..from + length]).ok()?.parse().ok()?;
        rest = &rest[from + length..];
    }
    let [width, height, 255] = numbers else { return None };
    Some((width, height, rest.get(1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_pixels_become_png() {
        let mut ppm = b"P6\n3 2\n255\n".to_vec();
        ppm.extend(0..18);
        let bytes = png(ppm).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!((reader.info().width, reader.info().height, pixels), (3, 2, (0..18).collect()));
        assert_eq!(png(bytes.clone()), Ok(bytes), "what is PNG stays as it is");
    }

    #[test]
    fn junk_is_refused() {
        for junk in [
            &b""[..],
            b"P6",
            b"P5\n1 1\n255\n\0",
            b"P6\n1 1\n255",
            b"P6\n1 1\n65535\n\0\0\0",
            b"P6\n2 1\n255\n\0\0\0",
            b"P6\n0 0\n255\n",
            b"P6\n99999 99999\n255\n\0",
            b"P6\n9999999999 1\n255\n\0",
            b"P6\n-1 1\n255\n\0\0\0",
        ] {
            assert!(png(junk.to_vec()).is_err(), "{junk:?}");
        }
        assert!(png([PNG, &vec![0; MAX]].concat()).unwrap_err().contains("more than 8192"));
    }
}
