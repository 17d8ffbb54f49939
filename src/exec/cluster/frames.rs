//! Frames of `wire/frame.rs` on an asynchronous stream. Deadlines are the caller's.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::wire::frame::{BadFrame, FRAME_HEADER, FrameCodec, FrameError};

/// The next frame's body; `None` when the stream ended between two frames.
///
/// # Errors
/// When the stream fails, or what comes is no frame of at most `limit` bytes; the stream is then of no further use.
pub async fn read(from: &mut (impl AsyncRead + Unpin), limit: usize) -> Result<Option<Vec<u8>>, FrameError> {
    let mut header = [0; FRAME_HEADER];
    match from.read(&mut header[..1]).await {
        Ok(0) => return Ok(None),
        // Not every TLS peer says goodbye.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
        Ok(_) => {}
    }
    fill(from, &mut header[1..]).await?;
    let len = FrameCodec::header(&header)?;
    if limit < len {
        return Err(BadFrame::Long { len }.into());
    }
    let mut body = vec![0; len];
    fill(from, &mut body).await?;
    Ok(Some(body))
}

async fn fill(from: &mut (impl AsyncRead + Unpin), into: &mut [u8]) -> Result<(), FrameError> {
    match from.read_exact(into).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(FrameError::Cut),
        Err(error) => Err(error.into()),
    }
}

/// Sends one whole frame.
///
/// # Errors
/// When the stream fails; it is then of no further use.
pub async fn write(to: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    to.write_all(frame).await?;
    to.flush().await
}
