//! The agent's D-Bus interface, on a private bus with the installed policy.

mod bus;

use std::future::Future;
use std::time::{Duration, Instant};

use bus::{FakeAgent, PATIENCE, PrivateBus, example, example_failures, example_file, example_notes, findings};
use mainstay::api::dbus::client::{Agent, AgentError, Followed};
use mainstay::api::dbus::{Ask, AskMessage, Bus, ServeError, serve};
use mainstay::types::StorageFence;
use mainstay::types::control::{Mover, VmCommand};
use mainstay::types::failure::FailureFile;
use mainstay::types::settings::{OnDoubt, SettingsChange, Timing};
use tokio::sync::{broadcast, mpsc};

fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("within the test's patience") })
}

#[test]
fn questions_are_answered() {
    let bus = PrivateBus::started();
    let fake = FakeAgent::on(&bus);
    run(async {
        let agent = Agent::connect(&bus.bus()).await.unwrap();
        assert_eq!(agent.view().await.unwrap(), example());
        assert_eq!(agent.notes(0, None, None).await.unwrap(), example_notes());
        assert_eq!(agent.notes(0, Some("db"), Some("b")).await.unwrap(), example_notes()[2..]);
        assert_eq!(agent.doctor().await.unwrap(), findings());
        assert_eq!(agent.version().await.unwrap(), env!("CARGO_PKG_VERSION"));
        let db = example().vms[1].clone();
        assert_eq!(agent.explain("db").await.unwrap(), db);
        assert_eq!(agent.explain(&db.id.to_string()).await.unwrap(), db);
        let list = agent.failures("web").await.unwrap();
        assert_eq!(list, example_failures());
        let console = agent.failure_file(&list.failures[0], FailureFile::Console).await.unwrap();
        assert_eq!(console, example_file(FailureFile::Console));
        let gone = agent.failure_file(&list.failures[0], FailureFile::Statistics).await.unwrap_err();
        assert!(matches!(gone, AgentError::Failed(text) if text.starts_with("cannot read statistics.txt")));
    });
    let asked = fake.asked.lock().unwrap();
    let narrow = Ask::Notes { since_unix_ms: 0, vm: Some("db".into()), host: Some("b".into()) };
    assert!(asked.contains(&narrow), "{asked:?}");
}

#[test]
fn wishes_reach_the_agent_as_said() {
    let bus = PrivateBus::started();
    let fake = FakeAgent::on(&bus);
    let (web, b) = (example().vms[0].id, example().hosts[1].id);
    let changes = [
        SettingsChange::SetTiming(Timing::FAST),
        SettingsChange::ChangeDatastore {
            name: "nfs1".into(),
            fence: Some(StorageFence::Command { program: "/usr/sbin/expire".into() }),
            late_writes: None,
        },
    ];
    run(async {
        let agent = Agent::connect(&bus.bus()).await.unwrap();
        agent.start("web").await.unwrap();
        agent.stop("web").await.unwrap();
        agent.stop_by_force(&web.to_string()).await.unwrap();
        agent.set_on_doubt("web", Some(OnDoubt::RunUntilStop)).await.unwrap();
        agent.set_on_doubt("web", None).await.unwrap();
        agent.enable_guest("web").await.unwrap();
        agent.move_to("web", None).await.unwrap();
        agent.move_to("web", Some("b")).await.unwrap();
        for change in &changes {
            assert_eq!(agent.change(change).await.unwrap(), "settings 8 are in force on 3 hosts");
        }
    });
    let expected = [
        Ask::Vm(VmCommand::Start { vm: web }),
        Ask::Vm(VmCommand::Stop { vm: web, force: false }),
        Ask::Vm(VmCommand::Stop { vm: web, force: true }),
        Ask::Vm(VmCommand::SetOnDoubt { vm: web, on_doubt: Some(OnDoubt::RunUntilStop) }),
        Ask::Vm(VmCommand::SetOnDoubt { vm: web, on_doubt: None }),
        Ask::EnableGuest { vm: web },
        Ask::Vm(VmCommand::Move { vm: web, to: None, by: Mover::Person }),
        Ask::Vm(VmCommand::Move { vm: web, to: Some(b), by: Mover::Person }),
        Ask::Change(Box::new(changes[0].clone())),
        Ask::Change(Box::new(changes[1].clone())),
    ];
    assert_eq!(*fake.asked.lock().unwrap(), expected);
}

#[test]
fn refusals_keep_their_kind() {
    let bus = PrivateBus::started();
    let _fake = FakeAgent::on(&bus);
    run(async {
        let agent = Agent::connect(&bus.bus()).await.unwrap();
        let denied = agent.start("db").await.unwrap_err();
        assert_eq!(denied, AgentError::Denied("no place: no host has 64 GiB free".into()));
        let unknown = agent.start("wbe").await.unwrap_err();
        assert_eq!(unknown, AgentError::Usage("no VM \"wbe\"; did you mean \"web\"?".into()));
        let unknown = agent.move_to("web", Some("z")).await.unwrap_err();
        assert!(matches!(unknown, AgentError::Usage(text) if text.starts_with("no host \"z\"")));
        let mute = agent.start("mute").await.unwrap_err();
        assert!(matches!(mute, AgentError::Failed(text) if text.contains("may still take effect")));
    });
}

#[test]
fn notes_are_signalled() {
    let bus = PrivateBus::started();
    let fake = FakeAgent::on(&bus);
    // A runtime cannot end inside another one: the agents begin and end on other threads.
    let _again = run(async {
        let agent = Agent::connect(&bus.bus()).await.unwrap();
        let mut follow = agent.follow().await.unwrap();
        for note in example_notes() {
            fake.notes.send(note.clone()).unwrap();
            assert_eq!(follow.next().await, Followed::Note(note));
        }
        std::thread::scope(|scope| scope.spawn(|| drop(fake)).join().unwrap());
        assert_eq!(follow.next().await, Followed::NoAgent);
        let again = std::thread::scope(|scope| scope.spawn(|| FakeAgent::on(&bus)).join().unwrap());
        assert_eq!(follow.next().await, Followed::NewAgent);
        again
    });
}

#[test]
fn without_an_agent_or_a_bus_it_is_unreachable() {
    let mut bus = PrivateBus::started();
    run(async {
        let agent = Agent::connect(&bus.bus()).await.unwrap();
        let error = agent.view().await.unwrap_err();
        assert!(matches!(error, AgentError::Unreachable(text) if text.contains("not running")));
    });
    bus.stop();
    assert!(matches!(run(Agent::connect(&bus.bus())), Err(AgentError::Unreachable(_))));
}

/// The agent does not wait for a bus, and outlives its restart.
#[test]
fn a_late_or_restarted_bus_is_served() {
    let mut bus = PrivateBus::prepared();
    let _fake = FakeAgent::begun(&bus);
    for _ in 0..2 {
        bus.start();
        let address = bus.bus();
        run(async move {
            let start = Instant::now();
            while Agent::connect(&address).await.unwrap().view().await.is_err() {
                assert!(start.elapsed() < PATIENCE);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        bus.stop();
    }
}

#[test]
fn a_busy_agent_says_so_at_once() {
    let bus = PrivateBus::started();
    let address = bus.bus();
    run(async move {
        let (asks, mut asking) = mpsc::channel::<AskMessage>(1);
        let (_notes, heard) = broadcast::channel(1);
        let served = tokio::spawn(serve(address.clone(), asks, heard));
        let first = {
            let address = address.clone();
            tokio::spawn(async move {
                loop {
                    match Agent::connect(&address).await.unwrap().doctor().await {
                        Err(AgentError::Unreachable(_)) => tokio::task::yield_now().await,
                        other => return other,
                    }
                }
            })
        };
        // The first question lies in the channel, which has room for no other.
        while asking.is_empty() {
            tokio::task::yield_now().await;
        }
        let second = Agent::connect(&address).await.unwrap().doctor().await.unwrap_err();
        assert!(matches!(second, AgentError::Failed(text) if text.contains("busy")));
        drop(asking.recv().await);
        assert!(matches!(first.await.unwrap(), Err(AgentError::Failed(_))));
        // The agent ends: so does its service.
        drop(asking);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn an_address_that_can_never_work_is_told() {
    let (asks, _asking) = mpsc::channel(1);
    let (_notes, heard) = broadcast::channel(1);
    let served = run(serve(Bus::Address("nonsense".into()), asks, heard));
    assert!(matches!(served, Err(ServeError::Address { .. })));
}
