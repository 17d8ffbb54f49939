//! Fence devices are asked past the core: by people, and by the doctor. That switches nothing and decides nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::api::dbus::AskReply;
use crate::exec::doctor::DeviceFact;
use crate::exec::{clock, power};
use crate::types::control::Denial;
use crate::types::power::{FenceDevice, PowerAnswer, PowerOrder};

/// A device's time to answer; people wait for it.
const ANSWER: Duration = Duration::from_secs(10);

/// Asks one device whether its host is on.
pub(crate) fn test(name: &str, device: Option<FenceDevice>, answer: oneshot::Sender<AskReply>) {
    let Some(device) = device else {
        let why = format!("no fence device is named {name}; 'mainstay host fence-device list' shows them");
        let _ = answer.send(AskReply::Denied(Denial::Contradiction(why)));
        return;
    };
    let asked = clock::now();
    power::ask(device, PowerOrder::Status, ANSWER, Arc::default(), move |said| {
        let took = clock::now().since(asked).as_secs_f64();
        let _ = answer.send(match said {
            Ok(PowerAnswer::On | PowerAnswer::Done) => AskReply::Done(format!("answers: its host is on ({took:.2} s)")),
            Ok(PowerAnswer::Off) => AskReply::Done(format!("answers: its host is off ({took:.2} s)")),
            Err(why) => AskReply::Failed(why),
        });
    });
}

/// Asks every device at once whether it answers at all.
pub(crate) async fn monitor(facts: &mut [DeviceFact], devices: Vec<FenceDevice>) {
    let ask = |device: FenceDevice| {
        let (sender, receiver) = oneshot::channel();
        let name = device.name.clone();
        power::ask(device, PowerOrder::Monitor, ANSWER, Arc::default(), move |said| {
            let _ = sender.send(said.map(drop));
        });
        (name, receiver)
    };
    let asked: Vec<_> = devices.into_iter().map(ask).collect();
    for (name, receiver) in asked {
        let said = receiver.await.unwrap_or_else(|_| Err("it gave no answer".to_owned()));
        if let Some(fact) = facts.iter_mut().find(|fact| fact.name == name) {
            fact.answers = said;
        }
    }
}
