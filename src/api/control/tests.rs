//! Over real TLS on the loopback, each server on a port of its own.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::*;
use crate::config::Here;
use crate::exec::cluster::{JoinError, Token, admit, frames, join, with_member};
use crate::types::control::ReplyEnvelope;
use crate::types::settings::Timing;

/// No test waits longer for anything that must come.
const SOON: Duration = Duration::from_secs(20);

struct Host {
    dir: tempfile::TempDir,
    cluster: Cluster,
}

fn here(name: &str, port: u16) -> Here {
    Here {
        name: name.into(),
        control: SocketAddr::new("127.0.0.1".parse().unwrap(), port),
        migration_uri: "qemu+tcp://127.0.0.1/system".into(),
        interfaces: Vec::new(),
        peers: Vec::new(),
        isolation_addresses: Vec::new(),
    }
}

fn first(name: &str) -> Host {
    let dir = tempfile::tempdir().unwrap();
    let (cluster, _) = Cluster::init(dir.path(), "c1", &here(name, 1), Timing::DEFAULT).unwrap();
    Host { dir, cluster }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Serves as the agent does: admits joiners, hands everything else to `asked`.
async fn serve(cluster: &Cluster, listen: SocketAddr, asked: impl Fn(Asked) + Send + Sync + 'static) -> Control {
    let members = Mutex::new(cluster.clone());
    let answers = move |ask: Asked| {
        let Request::Join(join) = &ask.request else { return asked(ask) };
        let mut cluster = members.lock().unwrap();
        let reply = match admit(&cluster, join) {
            Ok((member, certificate)) => {
                cluster.settings = with_member(&cluster.settings, member);
                Reply::Joined(Box::new(cluster.joined(cluster.settings.clone(), certificate)))
            }
            Err(why) => Reply::Denied(why),
        };
        ask.answer.send(reply);
    };
    Control::serve(cluster, listen, answers).await.unwrap()
}

async fn joined(token: &Token, name: &str, port: u16) -> Result<Host, JoinError> {
    let dir = tempfile::tempdir().unwrap();
    let cluster = join(dir.path(), token, &here(name, port)).await?;
    Ok(Host { dir, cluster })
}

/// Two members; the second knows where the first listens.
async fn pair(asked: impl Fn(Asked) + Send + Sync + 'static) -> (Host, Control, Host, Control) {
    let a = first("a");
    let serving = serve(&a.cluster, any_port(), asked).await;
    let b = joined(&a.cluster.token(serving.address()), "b", 2).await.unwrap();
    let asking = asker(&b, &a, serving.address()).await;
    (a, serving, b, asking)
}

async fn asker(from: &Host, to: &Host, address: SocketAddr) -> Control {
    let control = Control::serve(&from.cluster, any_port(), |_| ()).await.unwrap();
    let mut settings = from.cluster.settings.clone();
    settings.members.iter_mut().filter(|m| m.host == to.cluster.host).for_each(|m| m.control = address);
    control.set_peers(&settings);
    control
}

fn ask(control: &Control, to: &Host, ticket: u64, within_ms: u64) -> oneshot::Receiver<Result<Reply, ControlError>> {
    let (tell, told) = oneshot::channel();
    let within = Duration::from_millis(within_ms);
    control.send(to.cluster.host, Ticket(ticket), Request::FetchSettings, within, |answer| drop(tell.send(answer)));
    told
}

async fn told(answer: oneshot::Receiver<Result<Reply, ControlError>>) -> Result<Reply, ControlError> {
    timeout(SOON, answer).await.expect("every request is answered by its deadline").expect("and never forgotten")
}

#[tokio::test]
async fn joins_and_asks_with_its_certificate() {
    let (seen, mut asked) = mpsc::unbounded_channel();
    let (a, _serving, b, asking) = pair(move |ask: Asked| {
        seen.send(ask.from).unwrap();
        ask.answer.send(Reply::AlreadySo);
    })
    .await;
    assert_eq!(b.cluster.settings.version, 2);
    assert_eq!(b.cluster.me().unwrap().index.0, 1);
    assert_eq!(b.cluster.keys, a.cluster.keys);
    let loaded = Cluster::load(b.dir.path()).unwrap().unwrap();
    assert_eq!((loaded.host, &loaded.settings), (b.cluster.host, &b.cluster.settings));
    assert_eq!(loaded.token(any_port()), a.cluster.token(any_port()), "every member can let others join");
    assert_eq!(told(ask(&asking, &a, 1, 10_000)).await, Ok(Reply::AlreadySo));
    assert_eq!(asked.recv().await, Some(Some(b.cluster.host)));
}

#[tokio::test]
async fn joins_are_refused_with_the_reason() {
    let a = first("a");
    let serving = serve(&a.cluster, any_port(), |_| ()).await;
    let token = a.cluster.token(serving.address());
    let why = |error: Result<Host, JoinError>| error.err().unwrap().to_string();

    let mut wrong = token.clone();
    wrong.secret[0] ^= 1;
    let text = why(joined(&wrong, "b", 2).await);
    assert!(text.contains("refused: not allowed: the token's secret is not that of this cluster"), "{text}");

    let mut tampered = token.clone();
    tampered.authority.0[0] ^= 1;
    let text = why(joined(&tampered, "b", 2).await);
    assert!(text.contains("is not the cluster that this token is of"), "{text}");

    let text = why(joined(&token, "a", 2).await);
    assert!(text.contains("host name \"a\" is in use"), "{text}");

    let mut other = token.clone();
    other.cluster = crate::types::ClusterId(uuid::Uuid::nil());
    let text = why(joined(&other, "b", 2).await);
    assert!(text.contains("it is of another cluster than the token"), "{text}");

    let again = join(a.dir.path(), &token, &here("b", 2)).await.unwrap_err().to_string();
    assert_eq!(again, "this host is a member of cluster \"c1\" already; nothing was changed");

    drop(serving);
    let mut nobody = token.clone();
    nobody.control.set_port(1);
    let text = why(joined(&nobody, "b", 2).await);
    assert!(text.contains("127.0.0.1:1: cannot be reached: ") && text.contains("TCP port 1 open?"), "{text}");
}

#[tokio::test]
async fn a_lost_answer_to_a_join_costs_no_place() {
    let a = first("a");
    let serving = serve(&a.cluster, any_port(), |_| ()).await;
    let token = a.cluster.token(serving.address());
    let dir = tempfile::tempdir().unwrap();
    let one = join(dir.path(), &token, &here("b", 2)).await.unwrap();
    // As if the answer had never come.
    std::fs::remove_file(dir.path().join("settings.json")).unwrap();
    let two = join(dir.path(), &token, &here("b", 2)).await.unwrap();
    assert_eq!((one.host, one.me()), (two.host, two.me()));
    assert_eq!(two.settings.version, 2);
}

#[tokio::test]
async fn too_many_joins_at_once_are_told_to_come_again() {
    let a = first("a");
    let serving = serve(&a.cluster, any_port(), |_| ()).await;
    let mut token = a.cluster.token(serving.address());
    token.secret[0] ^= 1;
    // However slow this machine is, some burst is faster than the limit.
    for _ in 0..10 {
        let tries: Vec<_> = (0..12)
            .map(|n| {
                let token = token.clone();
                tokio::spawn(async move { joined(&token, "b", 2 + n).await.err().unwrap().to_string() })
            })
            .collect();
        let mut told = false;
        for text in tries {
            told |= text.await.unwrap().contains("too many hosts join at once");
        }
        if told {
            return;
        }
    }
    panic!("nobody was told");
}

#[tokio::test]
async fn asking_twice_gives_the_first_answer() {
    let count = Arc::new(AtomicUsize::new(0));
    let (kept, mut keep) = mpsc::unbounded_channel();
    let counting = Arc::clone(&count);
    let (a, _serving, b, asking) = pair(move |ask: Asked| {
        counting.fetch_add(1, Ordering::SeqCst);
        kept.send(ask.answer).unwrap();
    })
    .await;
    let (one, two) = (ask(&asking, &a, 7, 15_000), ask(&asking, &a, 7, 15_000));
    keep.recv().await.unwrap().send(Reply::AlreadySo);
    assert_eq!((told(one).await, told(two).await), (Ok(Reply::AlreadySo), Ok(Reply::AlreadySo)));
    assert_eq!(told(ask(&asking, &a, 7, 15_000)).await, Ok(Reply::AlreadySo), "also later");
    assert_eq!(count.load(Ordering::SeqCst), 1);

    // The same ticket with another question is no repetition.
    let (tell, other) = oneshot::channel();
    asking.send(a.cluster.host, Ticket(7), Request::View, SOON, |answer| drop(tell.send(answer)));
    assert!(matches!(told(other).await, Ok(Reply::Denied(Denial::NotAllowed(_)))));

    // Another run of the agent has tickets of its own.
    let restarted = asker(&b, &a, _serving.address()).await;
    let new = ask(&restarted, &a, 7, 15_000);
    keep.recv().await.unwrap().send(Reply::Done);
    assert_eq!(told(new).await, Ok(Reply::Done));
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_slow_request_holds_up_no_other() {
    let (kept, mut keep) = mpsc::unbounded_channel();
    let (a, _serving, _b, asking) =
        pair(
            move |ask: Asked| {
                if ask.request == Request::View { ask.answer.send(Reply::Done) } else { kept.send(ask.answer).unwrap() }
            },
        )
        .await;
    let slow = ask(&asking, &a, 1, 15_000);
    let slow_answer = keep.recv().await.unwrap();
    let (tell, quick) = oneshot::channel();
    asking.send(a.cluster.host, Ticket(2), Request::View, SOON, |answer| drop(tell.send(answer)));
    assert_eq!(told(quick).await, Ok(Reply::Done));
    slow_answer.send(Reply::AlreadySo);
    assert_eq!(told(slow).await, Ok(Reply::AlreadySo));
    let dropped = ask(&asking, &a, 3, 15_000);
    drop(keep.recv().await.unwrap());
    assert!(matches!(told(dropped).await, Ok(Reply::Denied(Denial::Unable(_)))));
}

#[tokio::test]
async fn deadlines_hold_when_nobody_answers() {
    let kept = Mutex::new(Vec::new());
    let (a, serving, b, asking) = pair(move |ask: Asked| kept.lock().unwrap().push(ask.answer)).await;
    let within = Duration::from_millis(300);
    let mut tickets = 100..200;
    // The first may pass before there is a connection.
    while told(ask(&asking, &a, tickets.next().unwrap(), 300)).await != Err(ControlError::NoAnswer { within }) {}

    // Accepts and says nothing.
    let silent = tokio::net::TcpListener::bind(any_port()).await.unwrap();
    let asking = asker(&b, &a, silent.local_addr().unwrap()).await;
    assert!(matches!(told(ask(&asking, &a, 1, 300)).await, Err(ControlError::Unreached { .. })));
    let mut nobody = first("a");
    nobody.cluster.host = HostId(uuid::Uuid::nil());
    let unknown = Err(ControlError::Unknown(nobody.cluster.host));
    assert_eq!(told(ask(&asking, &nobody, 1, 300)).await, unknown);

    // Removed from the document: given up at once.
    let waits = ask(&asking, &a, 2, 60_000);
    let mut settings = a.cluster.settings.clone();
    settings.members.clear();
    asking.set_peers(&settings);
    assert_eq!(told(waits).await, Err(ControlError::GivenUp));
    drop(serving);
}

#[tokio::test]
async fn finds_a_restarted_server_again() {
    let (a, serving, b, asking) = pair(|ask: Asked| ask.answer.send(Reply::Done)).await;
    let address = serving.address();
    assert_eq!(told(ask(&asking, &a, 1, 10_000)).await, Ok(Reply::Done));
    drop(serving);
    // Asked while it is away, answered when it is back.
    let waits = ask(&asking, &a, 2, 15_000);
    let serving = loop {
        let asked = |ask: Asked| ask.answer.send(Reply::AlreadySo);
        match Control::serve(&a.cluster, address, asked).await {
            Ok(serving) => break serving,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(told(waits).await, Ok(Reply::AlreadySo));

    // It moved: the next document says where to.
    let moved = serve(&a.cluster, any_port(), |ask: Asked| ask.answer.send(Reply::Done)).await;
    drop(serving);
    let mut settings = b.cluster.settings.clone();
    settings.members.iter_mut().for_each(|member| member.control = moved.address());
    asking.set_peers(&settings);
    assert_eq!(told(ask(&asking, &a, 3, 15_000)).await, Ok(Reply::Done));
}

#[tokio::test]
async fn another_clusters_certificate_is_refused_by_both_sides() {
    let count = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&count);
    let (a, serving, _b, _asking) = pair(move |ask: Asked| {
        counting.fetch_add(1, Ordering::SeqCst);
        ask.answer.send(Reply::Done);
    })
    .await;
    let stranger = first("a");
    let mut asking_cluster = stranger.cluster.clone();
    asking_cluster.settings = a.cluster.settings.clone();
    let asking = asker(&Host { cluster: asking_cluster, dir: stranger.dir }, &a, serving.address()).await;
    let mut tickets = 1..100;
    let why = loop {
        match told(ask(&asking, &a, tickets.next().unwrap(), 300)).await {
            Err(ControlError::Unreached { why: Some(why), .. }) => break why,
            Err(ControlError::Unreached { why: None, .. }) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(why.contains("UnknownIssuer"), "{why}");

    // A client that believes our authority, but shows a certificate of its own.
    let roots = tls::client(&a.cluster).unwrap();
    let mut config = (*roots).clone();
    config.client_auth_cert_resolver = tls::client(&first("x").cluster).unwrap().client_auth_cert_resolver.clone();
    let stream = TcpStream::connect(serving.address()).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(tls::server_name(a.cluster.host), stream).await.unwrap();
    let refused = timeout(SOON, stream.read(&mut [0; 1])).await.unwrap();
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn without_a_certificate_only_joining_is_possible() {
    let count = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&count);
    let (a, serving, ..) = pair(move |_| {
        let _ = counting.fetch_add(1, Ordering::SeqCst);
    })
    .await;
    let mut config = (*tls::client(&a.cluster).unwrap()).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let stream = TcpStream::connect(serving.address()).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(tls::server_name(a.cluster.host), stream).await.unwrap();
    let envelope = Envelope { protocol: CONTROL_PROTOCOL, ticket: Ticket(5), request: Request::View };
    frames::write(&mut stream, &frame::encode(&envelope).unwrap()).await.unwrap();
    let body = timeout(SOON, frames::read(&mut stream, frame::MAX_FRAME)).await.unwrap().unwrap().unwrap();
    let reply: ReplyEnvelope = frame::decode(&body).unwrap();
    assert!(matches!(reply.reply, Reply::Denied(Denial::NotAllowed(_))), "{reply:?}");
    assert_eq!(reply.ticket, Ticket(5));
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn junk_on_the_port_changes_nothing() {
    let (a, serving, b, asking) = pair(|ask: Asked| ask.answer.send(Reply::Done)).await;
    let mut open = Vec::new();
    for junk in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0x16, 3, 1, 0xff, 0xff, 1], b""] {
        for _ in 0..40 {
            let mut stream = TcpStream::connect(serving.address()).await.unwrap();
            let _ = stream.write_all(junk).await; // May be closed already.
            open.push(stream);
        }
    }
    assert_eq!(told(ask(&asking, &a, 1, 15_000)).await, Ok(Reply::Done));

    // Junk from a member, inside TLS: that connection ends, a new one works.
    let stream = TcpStream::connect(serving.address()).await.unwrap();
    let connector = TlsConnector::from(tls::client(&b.cluster).unwrap());
    let mut stream = connector.connect(tls::server_name(a.cluster.host), stream).await.unwrap();
    stream.write_all(&[0xff; 64]).await.unwrap();
    let end = timeout(SOON, stream.read(&mut [0; 16])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    assert_eq!(told(ask(&asking, &a, 2, 15_000)).await, Ok(Reply::Done));
}

#[tokio::test]
async fn a_request_of_a_newer_version_is_answered() {
    let (a, serving, b, _asking) = pair(|ask: Asked| ask.answer.send(Reply::Done)).await;
    let stream = TcpStream::connect(serving.address()).await.unwrap();
    let connector = TlsConnector::from(tls::client(&b.cluster).unwrap());
    let mut stream = connector.connect(tls::server_name(a.cluster.host), stream).await.unwrap();
    let unknown = (9u16, Ticket(77), 250u32, "something new");
    frames::write(&mut stream, &frame::encode(&unknown).unwrap()).await.unwrap();
    let body = timeout(SOON, frames::read(&mut stream, frame::MAX_FRAME)).await.unwrap().unwrap().unwrap();
    let reply: ReplyEnvelope = frame::decode(&body).unwrap();
    let Reply::Denied(Denial::NotAllowed(why)) = reply.reply else { panic!("{reply:?}") };
    assert!(why.starts_with("control protocol 9 is asked, 5 is spoken here: "), "{why}");
    assert_eq!(reply.ticket, Ticket(77));
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_cure() {
    let a = first("a");
    let taken = std::net::TcpListener::bind(any_port()).unwrap();
    let error = Control::serve(&a.cluster, taken.local_addr().unwrap(), |_| ()).await.err().unwrap().to_string();
    assert!(error.contains("is another mainstayd running"), "{error}");
    // An address that this host does not have yet is no error.
    Control::serve(&a.cluster, "192.0.2.77:0".parse().unwrap(), |_| ()).await.unwrap();
    assert!(Path::new(a.dir.path()).exists());
}
