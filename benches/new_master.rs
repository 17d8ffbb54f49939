//! A new master with 10,000 VMs on one datastore: from its first read to a complete view. Budgets: 1 s on a local disk, 3 s where each
//! operation takes 1 ms.
//!
//! `cargo bench --bench new_master [-- FOLDER]`: on a temporary folder, or on a folder of any other mount. `cargo lab bench new-master`
//! does both, with a mount whose requests take 1 ms longer.

#[allow(dead_code)] // It has more than is used here.
mod cluster;

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cluster::{HOSTS, claim, host, settings, store};
use mainstay::core::action::Action;
use mainstay::core::event::{Event, Outcome};
use mainstay::exec::datastore::{Datastore, prepare};
use mainstay::types::store::{ClaimsOf, StoreAnswer, StoreOrder};
use mainstay::types::*;
use mainstay::wire::record;

const VMS: u32 = 10_000;
const RUNS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let given = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let mount = given.as_ref().map_or(folder.path(), Path::new);
    lay(mount);
    println!("{VMS} VMs of {HOSTS} hosts on {}", mount.display());
    for _ in 0..RUNS {
        let (read, all) = measure(mount);
        println!("claims read {:.2} s, view complete {:.2} s", read.as_secs_f64(), all.as_secs_f64());
    }
}

/// What that many VMs leave on a datastore; what is there already stays.
fn lay(mount: &Path) {
    let members = (0..HOSTS).map(|index| RosterEntry { index: HostIndex(index), host: host(index) }).collect();
    let cluster = settings().cluster;
    prepare(mount, &Roster { cluster, datastore: store(), generation: 1, members }, host(0)).expect("a datastore");
    let claims = mount.join(".mainstay").join(cluster.to_string()).join("claims");
    if std::fs::read_dir(&claims).is_ok_and(|there| there.count() == VMS as usize) {
        return;
    }
    for n in 0..VMS {
        let claim = claim((n % u32::from(HOSTS)) as u8, n);
        let folder = claims.join(claim.tenure.vm.to_string());
        std::fs::create_dir_all(&folder).expect("a folder of claims");
        let block = record::encode_claim(&claim).expect("a claim");
        std::fs::write(folder.join("1"), block).expect("a claim is written");
    }
}

/// With an agent that knows nothing yet: until the claims are read, and until its view has every VM.
fn measure(mount: &Path) -> (Duration, Duration) {
    let agent = Datastore::open(settings().cluster, store(), host(0), mount.to_owned());
    let begun = Instant::now();
    let now = |begun: Instant| Time(1_000_000_000) + begun.elapsed();
    let mut core = cluster::core(now(begun));
    let (send, answers) = mpsc::channel::<(Ticket, StoreAnswer)>();
    let order = |ticket, order: StoreOrder| {
        let send = send.clone();
        agent.ask(order, PATIENCE, move |answer| drop(send.send((ticket, answer))));
    };
    let (mut read, mut due) = (None, core.next_due());
    loop {
        let event = match (answers.try_recv(), due) {
            (Ok((ticket, answer)), _) => {
                match &answer {
                    StoreAnswer::Claims { .. } => drop(read.get_or_insert(begun.elapsed())),
                    StoreAnswer::Failed(why) => eprintln!("{:.2} s: {why:?}", begun.elapsed().as_secs_f64()),
                    _ => {}
                }
                Event::Done(ticket, Outcome::Store(answer))
            }
            (Err(_), at) if at.is_some_and(|at| at <= now(begun)) => Event::Due,
            (Err(_), _) => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        let output = core.step(now(begun), event);
        due = core.next_due();
        for action in output.actions {
            if let Action::Store { ticket, order: what, .. } = action
                && matches!(what, StoreOrder::ReadAll | StoreOrder::ReadClaims(ClaimsOf::All))
            {
                order(ticket, what);
            }
        }
        if let Some(read) = read
            && core.view(now(begun)).vms.len() == VMS as usize
        {
            return (read, begun.elapsed());
        }
        assert!(begun.elapsed() < PATIENCE, "a view in time");
    }
}
