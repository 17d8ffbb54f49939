//! Stand-in for the storage layer: every host sees the same folder by a bind mount; there are no faults and no locks
//! of its own. It has the interface of the real one.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::mounts;

/// What the storage of one host does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    Hang,
    Eio,
    Enospc,
    Estale,
    Slow(Duration),
    Torn,
    Late(Duration),
    DropSync,
}

/// How far locks of a host reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    Local,
    Server { lease: Duration },
}

/// Serves until it is ended.
pub fn run_daemon(dir: &Path, run: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::create_dir_all(run.join("mounts"))?;
    for name in ["expire.sock", "control.sock"] {
        let _ = fs::remove_file(run.join(name));
    }
    let expire = UnixListener::bind(run.join("expire.sock"))?;
    let control = UnixListener::bind(run.join("control.sock"))?;
    std::thread::spawn(move || serve(&expire, |_| Ok(())));
    let (dir, run) = (dir.to_owned(), run.to_owned());
    serve(&control, move |line| match line.split_once(' ') {
        Some(("mount", host)) => {
            let point = run.join("mounts").join(host);
            if mounts::is_mounted(&point) { Ok(()) } else { mounts::bind(&dir, &point) }
        }
        Some(("unmount", host)) => mounts::detach(&run.join("mounts").join(host)),
        _ => Ok(()),
    });
    Ok(())
}

fn serve(socket: &UnixListener, act: impl Fn(&str) -> Result<()>) {
    for stream in socket.incoming().flatten() {
        let mut line = String::new();
        let _ = BufReader::new(&stream).read_line(&mut line);
        let answer = match act(line.trim()) {
            Ok(()) => "ok\n".to_owned(),
            Err(err) => format!("error {err:#}\n"),
        };
        let _ = (&stream).write_all(answer.as_bytes());
    }
}

/// The storage daemon, as its client sees it.
pub struct Storage {
    run: PathBuf,
}

impl Storage {
    pub fn connect(run: &Path) -> Result<Self> {
        UnixStream::connect(run.join("control.sock")).context("no storage daemon answers")?;
        Ok(Storage { run: run.to_owned() })
    }

    pub fn mount(&self, host: &str) -> Result<PathBuf> {
        self.ask(&format!("mount {host}"))?;
        Ok(self.run.join("mounts").join(host))
    }

    pub fn unmount(&self, host: &str) -> Result<()> {
        self.ask(&format!("unmount {host}"))
    }

    pub fn dead(&self, host: &str) -> Result<()> {
        self.ask(&format!("dead {host}"))
    }

    pub fn alive(&self, host: &str) -> Result<()> {
        self.ask(&format!("alive {host}"))
    }

    pub fn fault(&self, _host: &str, _fault: Fault) -> Result<()> {
        bail!("the stand-in storage has no faults")
    }

    pub fn locks(&self, _mode: LockMode) -> Result<()> {
        bail!("the stand-in storage has no locks")
    }

    pub fn expire(&self, host: &str) -> Result<()> {
        self.ask(&format!("expire {host}"))
    }

    pub fn status(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "kind": "stand-in" }))
    }

    pub fn stop(&self) -> Result<()> {
        Ok(())
    }

    fn ask(&self, line: &str) -> Result<()> {
        let stream = UnixStream::connect(self.run.join("control.sock")).context("no storage daemon answers")?;
        (&stream).write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        match answer.trim() {
            "ok" => Ok(()),
            other => bail!("storage, {line}: {other}"),
        }
    }
}
