//! Serving on a listener until told to stop, then leaving nothing half done.

use std::{future::Future, io, time::Duration};

use tokio::{net::TcpListener, sync::oneshot, time};

use super::{AppState, app};

/// How often the histograms' samples are summed up: until then each one is kept.
const UPKEEP: Duration = Duration::from_secs(5);

/// How the server leaves.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    /// How long requests are still taken while `/readyz` already says 503, so that load balancers
    /// notice before connections are refused.
    pub delay: Duration,
    /// How long accepted requests may then take to finish.
    pub timeout: Duration,
}

/// Serves until `shutdown` resolves, then drains: `/readyz` says 503, requests are taken for
/// `drain.delay` more, the listener closes, and accepted work has `drain.timeout` to finish. What
/// is not done by then is abandoned with a warning in the log.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    drain: Drain,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let (close, closing) = oneshot::channel::<()>();
    let app = app(state.clone());
    let server = axum::serve(listener, app).with_graceful_shutdown(async {
        // A dropped sender closes too.
        let _ = closing.await;
    });
    let mut server = std::pin::pin!(async {
        tokio::select! {
            result = server.into_future() => result,
            () = upkeep(&state) => unreachable!("it has no end"),
        }
    });
    tokio::select! {
        // Only an error of the listener ends the server before it is told to.
        result = &mut server => return result,
        () = shutdown => {}
    }
    tracing::info!(delay_s = drain.delay.as_secs_f64(), "shutting down");
    state.start_draining();
    tokio::select! {
        result = &mut server => return result,
        () = time::sleep(drain.delay) => {}
    }
    let painter = state.painter().ok().cloned();
    if let Some(painter) = &painter {
        painter.drain();
    }
    // The server still holds the other end: this cannot fail while it runs.
    let _ = close.send(());
    let finish = async {
        server.await?;
        if let Some(painter) = &painter {
            painter.drained().await;
        }
        Ok(())
    };
    match time::timeout(drain.timeout, finish).await {
        Ok(result) => {
            tracing::info!("all work is done");
            result
        }
        Err(_) => {
            let timeout_s = drain.timeout.as_secs_f64();
            tracing::warn!(
                timeout_s,
                "work was abandoned: it outlasted the drain timeout"
            );
            Ok(())
        }
    }
}

/// Keeps the metrics in bounded memory where nobody asks for them.
async fn upkeep(state: &AppState) {
    loop {
        time::sleep(UPKEEP).await;
        state.metrics().run_upkeep();
    }
}
