//! Carries out the core's actions: one line of translation each. Answers come back as events.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::oneshot;

use super::Events;
use super::answers::Answers;
use super::pump;
use crate::api::control::{Asked, Control};
use crate::config::{Config, Here};
use crate::core::action::{Action, Output};
use crate::core::event::{Event, Outcome};
use crate::core::note::{Level, Note};
use crate::core::verdicts::Given;
use crate::exec::cluster::{self, Cluster};
use crate::exec::datastore::Datastore;
use crate::exec::doctor::system;
use crate::exec::evidence::Evidence;
use crate::exec::failures::Failures;
use crate::exec::glance::Glances;
use crate::exec::guard_client::{GuardClient, GuardEvent};
use crate::exec::hook::{HookAsk, HookServer, write_unprotected};
use crate::exec::libvirt::{Libvirt, What};
use crate::exec::means::Bridges;
use crate::exec::net::BeatReceiver;
use crate::exec::program::Stop;
use crate::exec::reading::{self, Reader};
use crate::exec::{access, clock, echo, fence, health, means, power};
use crate::types::control::{Reply, Request, VmCommand};
use crate::types::failure::FailureAsk;
use crate::types::guard::{GuardConfig, GuardDatastore, GuardOrder};
use crate::types::guests::{GuestWord, Inside};
use crate::types::settings::ClusterSettings;
use crate::types::store::{StoreAnswer, StoreFailure, StoreOrder};
use crate::types::verdict::{VerdictAsk, VerdictView};
use crate::types::view::NoteView;
use crate::types::vm::{DomainAnswer, DomainOrder};
use crate::types::{DatastoreId, HostId, Incarnation, Ticket, VerdictId, VmId};

/// For another host to read of its disk what it has kept of failures.
const FAILURES: Duration = Duration::from_secs(5);

/// For libvirt to give a VM a port.
const PORT: Duration = Duration::from_secs(30);

/// Everything that acts.
pub(crate) struct Executors {
    me: HostId,
    name: String,
    state: PathBuf,
    run: PathBuf,
    cluster: Cluster,
    here: Here,
    events: Events,
    guard: GuardClient,
    libvirt: Libvirt,
    evidence: Evidence,
    glances: Glances,
    answers: Answers,
    control: Control,
    stores: BTreeMap<DatastoreId, Datastore>,
    /// Power switches that are being asked, and some that have answered.
    power: BTreeMap<Ticket, Arc<Stop>>,
    receiver: BeatReceiver,
    /// What leads to verdicts that are given now is going to be there.
    recording: Option<PathBuf>,
    _hook: HookServer,
}

impl Executors {
    /// Starts everything that listens.
    pub(crate) async fn start(
        config: &Config,
        here: &Here,
        cluster: &Cluster,
        answers: &Answers,
        events: Events,
    ) -> anyhow::Result<Self> {
        let run = config.paths.run.clone();
        let to_pump = pump::start(events.clone(), answers.clone());
        let libvirt = Libvirt::spawn(&config.libvirt.uri, {
            let to_pump = to_pump.clone();
            move |event| to_pump.libvirt(event)
        });
        look_at_host(&libvirt, &run, &events).context("starting to look at what this host has")?;
        let reader = Arc::new(Reader::new(&reading::PROGRAMS));
        let evidence = evidence(&libvirt, &here.name, answers.failures(), Arc::clone(&reader));
        let glances = Glances::new(reader, {
            let libvirt = libvirt.clone();
            move |vm, what, within| libvirt.look(vm, what, within)
        });
        let guard = GuardClient::spawn(run.join("guard.sock"), {
            let events = events.clone();
            move |event| {
                let _ = events.send(match event {
                    GuardEvent::Connected => Event::GuardConnected,
                    GuardEvent::Report(report) => Event::Guard(report),
                    GuardEvent::Lost(why) => Event::GuardLost(why),
                });
            }
        });
        let listen = SocketAddr::new(here.control.ip(), here.control.port());
        let control = Control::serve(cluster, listen, {
            let (answers, events) = (answers.clone(), events.clone());
            move |Asked { from, request, answer, .. }| {
                if let Some(event) = answers.agent(from, request, answer) {
                    let _ = events.send(event);
                }
            }
        })
        .await
        .with_context(|| format!("listening for other agents on {listen}"))?;
        let hook = HookServer::spawn(&run.join("hook.sock"), {
            let to_pump = to_pump.clone();
            move |ask: HookAsk| to_pump.hook(ask)
        })
        .with_context(|| format!("listening for libvirt's hook in {}", run.display()))?;
        let receiver = Self::receive(cluster, here, &events)?;
        Ok(Self {
            me: cluster.host,
            name: here.name.clone(),
            state: config.paths.state.clone(),
            run,
            cluster: cluster.clone(),
            here: here.clone(),
            events,
            guard,
            libvirt,
            evidence,
            glances,
            answers: answers.clone(),
            control,
            stores: BTreeMap::new(),
            power: BTreeMap::new(),
            receiver,
            recording: None,
            _hook: hook,
        })
    }

    /// The guard's incarnation: a higher one under our host id is another machine.
    pub(crate) fn own(&self, incarnation: Incarnation) {
        self.receiver.own(incarnation);
    }

    fn receive(cluster: &Cluster, here: &Here, events: &Events) -> anyhow::Result<BeatReceiver> {
        let (heard, twice) = (events.clone(), events.clone());
        BeatReceiver::spawn(
            cluster.settings.cluster,
            cluster.keys.clone(),
            cluster.host,
            here.interfaces.clone(),
            !here.peers.is_empty(),
            move |beat| {
                let _ = heard.send(Event::Heard(Box::new(beat.beat)));
            },
            move |beat| {
                let _ = twice.send(Event::HeardTwice(Box::new(beat)));
            },
        )
        .context("listening for beats")
    }

    /// Saves first, then does everything in order. What led to verdicts of this output will be in `recording`.
    pub(crate) fn carry_out(&mut self, output: Output, recording: Option<PathBuf>) {
        self.recording = recording;
        if let Some(settings) = output.save
            && let Err(error) = cluster::save_settings(&self.state, &settings)
        {
            let text = format!("the cluster's settings cannot be saved on this host: {error}");
            self.note(Note::alarm("settings", text));
        }
        for action in output.actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Guard(ticket, order) => self.guard.order(ticket, order),
            Action::Store { ticket, datastore, order, within } => self.store(ticket, datastore, order, within),
            Action::Domain { ticket, order, within } => self.domain(ticket, order, within),
            Action::Send { ticket, to, request, within } => self.send(ticket, to, *request, within),
            Action::Fence { ticket, program, host, name, within } => {
                let done = self.done(ticket);
                fence::command(program, name, host, within, move |result| done(Outcome::Fenced(result)));
            }
            Action::AskNetwork { ticket, within } => {
                let (done, addresses) = (self.done(ticket), self.here.to_ask());
                tokio::spawn(async move { done(Outcome::Network(echo::anybody(addresses, within).await)) });
            }
            Action::Power { device, order, within, ticket } => {
                let (done, stop) = (self.done(ticket), Arc::new(Stop::default()));
                self.power.retain(|_, stop| 1 < Arc::strong_count(stop)); // Those that have ended.
                self.power.insert(ticket, Arc::clone(&stop));
                power::ask(*device, order, within, stop, move |answer| done(Outcome::Power(answer)));
            }
            Action::CallOffPower(ticket) => {
                if let Some(stop) = self.power.remove(&ticket) {
                    stop.stop();
                }
            }
            Action::ProbeLocks { ticket, paths, within } => self.probe_locks(ticket, paths, within),
            Action::ProbeAccess { ticket, paths, within } => {
                let done = self.done(ticket);
                access::probe(paths, within, move |result| done(Outcome::Access(result)));
            }
            Action::Answer(ask, reply) => self.answers.reply(ask, reply),
            Action::HookAnswer(ask, result) => self.answers.hook(ask, result),
            Action::OpenDatastore(id, path) => self.open(id, &path),
            Action::Apply(settings) => self.apply(&settings),
            Action::Unprotected(vms) => {
                if let Err(error) = write_unprotected(&self.run.join("unprotected"), &vms) {
                    tracing::warn!("cannot write {}: {error}", self.run.join("unprotected").display());
                }
            }
            Action::Underway(list) => {
                if let Err(error) = super::underway::write(&self.run, &list) {
                    tracing::warn!("cannot write {}: {error}", self.run.join("underway").display());
                }
            }
            Action::Note(note) => self.note(note),
            Action::Verdict(given) => self.answers.verdict(self.verdict(*given)),
        }
    }

    fn done(&self, ticket: Ticket) -> impl FnOnce(Outcome) + Send + 'static {
        let events = self.events.clone();
        move |outcome| {
            let _ = events.send(Event::Done(ticket, outcome));
        }
    }

    fn store(&self, ticket: Ticket, datastore: DatastoreId, mut order: StoreOrder, within: Duration) {
        let done = self.done(ticket);
        if let StoreOrder::CreateClaim { claim, .. } = &mut order {
            claim.made_unix_ms = clock::unix_ms(); // For people only; the core has no clock of day.
        }
        match self.stores.get(&datastore) {
            Some(store) => store.ask(order, within, move |answer| done(Outcome::Store(answer))),
            None => {
                let why = "this datastore is not open on this host".to_owned();
                done(Outcome::Store(StoreAnswer::Failed(StoreFailure::Missing { path: datastore.to_string(), why })));
            }
        }
    }

    fn domain(&self, ticket: Ticket, order: DomainOrder, within: Duration) {
        let done = self.done(ticket);
        if order == DomainOrder::List {
            // By the watcher: it takes a list again that an event has overtaken, so that what is told never goes back.
            self.libvirt.relist();
            return done(Outcome::Domain(DomainAnswer::Done));
        }
        self.libvirt.ask(order, within, move |answer| done(Outcome::Domain(answer)));
    }

    fn send(&self, ticket: Ticket, to: HostId, request: Request, within: Duration) {
        let done = self.done(ticket);
        self.control.send(to, ticket, request, within, move |reply| {
            done(Outcome::Reply(reply.map_err(|error| error.to_string())));
        });
    }

    /// Asks another host for its notes; used by `answers`, past the core.
    pub(crate) fn notes_of(&self, to: HostId, since_unix_ms: u64, ticket: Ticket) -> oneshot::Receiver<Vec<NoteView>> {
        let (sender, receiver) = oneshot::channel();
        self.control.send(to, ticket, Request::Notes { since_unix_ms }, Duration::from_secs(2), move |reply| {
            if let Ok(Reply::Notes(notes)) = reply {
                let _ = sender.send(notes);
            }
        });
        receiver
    }

    /// Asks another host for its verdicts; used by `answers`, past the core.
    pub(crate) fn verdicts_of(&self, to: HostId, ask: VerdictAsk) -> oneshot::Receiver<Vec<VerdictView>> {
        let (sender, receiver) = oneshot::channel();
        let ticket = Ticket(clock::nonce().0 as u64);
        self.control.send(to, ticket, Request::Verdicts(ask), Duration::from_secs(2), move |reply| {
            if let Ok(Reply::Verdicts(verdicts)) = reply {
                let _ = sender.send(verdicts);
            }
        });
        receiver
    }

    fn probe_locks(&self, ticket: Ticket, paths: Vec<String>, within: Duration) {
        let done = self.done(ticket);
        tokio::spawn(async move {
            for path in paths {
                let (sender, receiver) = oneshot::channel();
                fence::probe(PathBuf::from(&path), within, move |result| {
                    let _ = sender.send(result);
                });
                match receiver.await {
                    Ok(Ok(None)) => {}
                    Ok(Ok(Some(holder))) => return done(Outcome::Locks(Ok(Some(format!("{path}: {holder}"))))),
                    Ok(Err(error)) => return done(Outcome::Locks(Err(format!("{path}: {error}")))),
                    Err(_) => return done(Outcome::Locks(Err(format!("{path}: the probe gave no answer")))),
                }
            }
            done(Outcome::Locks(Ok(None)));
        });
    }

    fn open(&mut self, id: DatastoreId, path: &str) {
        let (cluster, me) = (self.cluster.settings.cluster, self.me);
        self.stores.entry(id).or_insert_with(|| Datastore::open(cluster, id, me, Path::new(path).to_path_buf()));
    }

    fn apply(&mut self, settings: &ClusterSettings) {
        for datastore in &settings.datastores {
            self.open(datastore.id, &datastore.path);
        }
        self.look_at_leases(settings);
        self.control.set_peers(settings);
        self.answers.settings(settings);
        self.cluster.settings = settings.clone();
        let Some(member) = settings.member(self.me) else { return };
        let datastores = settings.datastores.iter().zip(0_u8..).map(|(datastore, position)| GuardDatastore {
            id: datastore.id,
            position,
            path: datastore.path.clone(),
            accepted: datastore.accepted,
        });
        let config = GuardConfig {
            cluster: settings.cluster,
            host: self.me,
            index: member.index,
            keys: self.cluster.keys.clone(),
            timing: settings.timing,
            interfaces: self.here.interfaces.clone(),
            peers: self.here.peers.clone(),
            datastores: datastores.collect(),
        };
        self.guard.order(Ticket(0), GuardOrder::Configure(Box::new(config)));
    }

    /// How long servers keep locks of a dead host. On a thread: the kernel answers for mounts that may hang.
    fn look_at_leases(&self, settings: &ClusterSettings) {
        let paths: Vec<_> =
            settings.datastores.iter().map(|datastore| (datastore.id, datastore.path.clone())).collect();
        let events = self.events.clone();
        let look = move || {
            let _ = events.send(Event::LockLeases(system::lock_leases(&paths)));
        };
        if let Err(error) = std::thread::Builder::new().name("leases".into()).spawn(look) {
            tracing::warn!("cannot look at the leases of mounts: {error}");
        }
    }

    /// This host.
    pub(crate) fn me(&self) -> HostId {
        self.me
    }

    /// Gives orders to libvirt past the core: remedies for guests.
    pub(crate) fn libvirt(&self) -> Libvirt {
        self.libvirt.clone()
    }

    /// Asks the core for something that people ask for as well; the answer goes to the guests' part.
    pub(crate) fn ask_core(&self, ticket: Ticket, command: VmCommand) {
        let ask = self.answers.guest_waits(ticket);
        let _ = self.events.send(Event::Asked { ask, from: None, request: Box::new(Request::Vm(command)) });
    }

    /// Collects and keeps failure information.
    pub(crate) fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    pub(crate) fn glances(&self) -> &Glances {
        &self.glances
    }

    /// Failures of guests that are kept on this host.
    pub(crate) fn failures(&self) -> Arc<Failures> {
        self.answers.failures()
    }

    /// Asks another host about those that it keeps.
    pub(crate) fn ask_about_failures(
        &self,
        to: HostId,
        ask: FailureAsk,
        told: impl FnOnce(Result<Reply, String>) + Send + 'static,
    ) {
        let ticket = Ticket(clock::nonce().0 as u64);
        let request = Request::Guest(Box::new(GuestWord::Failures(ask)));
        self.control.send(to, ticket, request, FAILURES, move |reply| told(reply.map_err(|error| error.to_string())));
    }

    /// Has a host, which may be this one, give a VM the port of Mainstay's agent.
    pub(crate) fn enable_port(
        &self,
        host: HostId,
        vm: VmId,
        told: impl FnOnce(Result<Reply, String>) + Send + 'static,
    ) {
        if host == self.me {
            return self.libvirt.add_port(vm, PORT, move |result| told(Ok(super::ports::reply_of(result))));
        }
        let ticket = Ticket(clock::nonce().0 as u64);
        let request = Request::Guest(Box::new(GuestWord::EnablePort { vm }));
        self.control.send(host, ticket, request, PORT, move |reply| told(reply.map_err(|error| error.to_string())));
    }

    /// The core hears how far a VM of this host is inside.
    pub(crate) fn inside(&self, vm: VmId, inside: Inside) {
        let _ = self.events.send(Event::Inside { vm, inside });
    }

    /// Another agent hears of a guest's request. It is said again if that was lost.
    pub(crate) fn tell_of_guests(&self, to: HostId, word: GuestWord) {
        let ticket = Ticket(clock::nonce().0 as u64);
        self.control.send(to, ticket, Request::Guest(Box::new(word)), Duration::from_secs(2), |_| {});
    }

    pub(crate) fn note(&self, note: Note) {
        let (kind, text) = (&*note.kind, note.text.as_str());
        match note.level {
            Level::Info => tracing::info!(kind, vm = note.vm, "{text}"),
            Level::Warning => tracing::warn!(kind, vm = note.vm, "{text}"),
            Level::Alarm => tracing::error!(kind, vm = note.vm, "{text}"),
        }
        self.answers.note(NoteView {
            unix_ms: clock::unix_ms(),
            host: self.name.clone(),
            level: note.level.name().to_owned(),
            kind: note.kind.into_owned(),
            vm: note.vm,
            text: note.text,
            verdict: note.verdict.map(|id| self.verdict_id(id)),
        });
    }

    /// As people know it: numbers are those of one host.
    fn verdict_id(&self, id: VerdictId) -> String {
        format!("{}-{id}", self.name)
    }

    fn verdict(&self, given: Given) -> VerdictView {
        let Given { id, kind, host, vm, text, evidence } = given;
        let (id, kind, by) = (self.verdict_id(id), kind.name(), self.name.clone());
        let recording = self.recording.as_ref().map(|path| path.display().to_string());
        VerdictView { id, unix_ms: clock::unix_ms(), by, kind, host, vm, text, evidence, recording }
    }
}

/// What this host has for VMs, and what is wrong with it.
fn look_at_host(libvirt: &Libvirt, run: &Path, events: &Events) -> std::io::Result<()> {
    let (means, findings, bridges) = (events.clone(), events.clone(), Bridges::default());
    means::spawn(libvirt.clone(), Arc::clone(&bridges), move |has| means.send(Event::Means(has)).is_ok())?;
    health::spawn(run, bridges, move |all| findings.send(Event::Health(all)).is_ok())
}

/// What collects failure information, by libvirt.
fn evidence(libvirt: &Libvirt, name: &str, failures: Arc<Failures>, reader: Arc<Reader>) -> Evidence {
    let (looker, dumper) = (libvirt.clone(), libvirt.clone());
    Evidence::new(
        name,
        failures,
        reader,
        move |vm, within| looker.look(vm, What::Everything, within),
        Box::new(move |vm, to, format, most, within| dumper.dump(vm, to, format, most, within)),
    )
}
