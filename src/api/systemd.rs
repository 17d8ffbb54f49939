//! The one question to systemd: is this host going down?

use std::time::Duration;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    /// initializing, starting, running, degraded, maintenance or stopping.
    #[zbus(property(emits_changed_signal = "false"))]
    fn system_state(&self) -> zbus::Result<String>;
}

/// Whether systemd says "stopping". No answer within `within` counts as no.
pub async fn going_down(within: Duration) -> bool {
    match tokio::time::timeout(within, state()).await {
        Ok(Ok(state)) => state == "stopping",
        Ok(Err(error)) => {
            tracing::warn!("systemd does not say whether this host goes down: {error}");
            false
        }
        Err(_) => {
            tracing::warn!("systemd does not say within {within:?} whether this host goes down");
            false
        }
    }
}

async fn state() -> zbus::Result<String> {
    let connection = zbus::Connection::system().await?;
    ManagerProxy::new(&connection).await?.system_state().await
}
