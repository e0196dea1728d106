//! A connection whose bytes are slowed, or do not pass at all though it stays open.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// So often a share of the bytes passes, and it is looked whether a dead direction lives again.
const TICK: Duration = Duration::from_millis(20);
const TICKS_A_SECOND: u64 = 50;

/// How wide all connections of a proxy are.
#[derive(Debug, Default)]
pub(super) struct Width {
    /// Bytes a second in each direction of each connection; 0 is no limit.
    pub(super) rate: AtomicU64,
    pub(super) is_dead_to_server: AtomicBool,
    pub(super) is_dead_to_client: AtomicBool,
}

impl Width {
    /// How many bytes may pass now; `None` when none do.
    fn share(&self, is_dead: &AtomicBool) -> Option<usize> {
        if is_dead.load(Ordering::SeqCst) {
            return None;
        }
        match self.rate.load(Ordering::SeqCst) {
            0 => Some(usize::MAX),
            rate => Some(usize::try_from(rate / TICKS_A_SECOND).unwrap_or(usize::MAX).max(1)),
        }
    }
}

/// The client's side of a connection.
pub(super) struct Narrow<S> {
    inner: S,
    width: Arc<Width>,
    reads_again: Option<Pin<Box<Sleep>>>,
    writes_again: Option<Pin<Box<Sleep>>>,
}

impl<S> Narrow<S> {
    pub(super) fn new(inner: S, width: Arc<Width>) -> Self {
        Self { inner, width, reads_again: None, writes_again: None }
    }
}

/// Waits until `again`, and for as long as nothing passes; then says how much may.
fn poll_share(
    width: &Width,
    is_dead: &AtomicBool,
    again: &mut Option<Pin<Box<Sleep>>>,
    context: &mut Context<'_>,
) -> Poll<usize> {
    loop {
        if let Some(sleep) = again {
            ready!(sleep.as_mut().poll(context));
            *again = None;
        }
        match width.share(is_dead) {
            Some(share) => return Poll::Ready(share),
            None => *again = Some(Box::pin(tokio::time::sleep(TICK))),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Narrow<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let dead = &this.width.is_dead_to_server;
        let share = ready!(poll_share(&this.width, dead, &mut this.reads_again, context));
        if share == usize::MAX {
            return Pin::new(&mut this.inner).poll_read(context, buffer);
        }
        let mut piece = vec![0; share.min(buffer.remaining())];
        let mut small = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut this.inner).poll_read(context, &mut small))?;
        buffer.put_slice(small.filled());
        this.reads_again = Some(Box::pin(tokio::time::sleep(TICK)));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Narrow<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let dead = &this.width.is_dead_to_client;
        let share = ready!(poll_share(&this.width, dead, &mut this.writes_again, context));
        let piece = bytes.get(..share).unwrap_or(bytes);
        let written = ready!(Pin::new(&mut this.inner).poll_write(context, piece))?;
        if share != usize::MAX {
            this.writes_again = Some(Box::pin(tokio::time::sleep(TICK)));
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::{Instant, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    #[allow(clippy::disallowed_methods)] // the clock of the test, which stands still
    async fn so_many_bytes_a_second_and_then_none() {
        let width = Arc::new(Width::default());
        let (mut far, near) = tokio::io::duplex(1 << 16);
        let mut near = Narrow::new(near, Arc::clone(&width));
        let mut got = vec![0; 3_000];

        width.rate.store(1_000, Ordering::SeqCst);
        let started = Instant::now();
        near.write_all(&[7; 3_000]).await.unwrap();
        far.read_exact(&mut got).await.unwrap();
        assert!((2..=4).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
        let started = Instant::now();
        far.write_all(&[8; 3_000]).await.unwrap();
        near.read_exact(&mut got).await.unwrap();
        assert!((2..=4).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());

        width.rate.store(0, Ordering::SeqCst);
        width.is_dead_to_server.store(true, Ordering::SeqCst);
        far.write_all(b"x").await.unwrap();
        let silence = timeout(Duration::from_secs(3_600), near.read_exact(&mut got[..1])).await;
        assert!(silence.is_err());
        // The other direction lives.
        near.write_all(b"y").await.unwrap();
        far.read_exact(&mut got[..1]).await.unwrap();
        // What waited passes when it is over.
        width.is_dead_to_server.store(false, Ordering::SeqCst);
        near.read_exact(&mut got[..1]).await.unwrap();
        assert_eq!(got[0], b'x');
        width.is_dead_to_client.store(true, Ordering::SeqCst);
        let silence = timeout(Duration::from_secs(3_600), near.write_all(b"z")).await;
        assert!(silence.is_err());
    }
}
