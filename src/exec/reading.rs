//! Text on pictures of screens, read by tesseract, where that is installed. Nothing depends on it.
//!
//! ```text
//!   picture ── a page: dark letters on white, twice as large ──► file in memory ──► tesseract ──► file in memory ──► text
//! ```
//!
//! What is on a picture comes from a guest, which is hostile by assumption: the program gets plain pixels that we have written,
//! runs as nobody, has limits of memory, CPU time and output, lives for `TIME` at most, and goes first when memory is short.
//! `AT_ONCE` run at the same time, niced; who waits for longer than `TIME` goes without. Measured: 0.3 s for a screen of 80 × 25
//! letters, 3.5 s for 1920 × 1080 pixels full of them.
//!
//! Deliberately not here: how a page is made (`page`), what the text means (`core::guests::classify`).

mod page;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::program::{Ended, run_on};

/// Where the program may be.
pub const PROGRAMS: [&str; 2] = ["/usr/bin/tesseract", "/usr/local/bin/tesseract"];
/// The package that has it.
pub const PACKAGE: &str = "tesseract-ocr";
/// One picture takes this long at most; and so long one waits for one's turn.
pub const TIME: Duration = Duration::from_secs(10);
/// Programs that run at the same time.
const AT_ONCE: usize = 2;
/// Longest text that is kept, in bytes.
const TEXT_MAX: usize = 64 * 1024;
/// What the program may use; a page of 4K needs 150 MB of memory.
const LIMITS: [&str; 4] = ["--as=536870912", "--cpu=10", "--fsize=1048576", "--core=0"];
/// User and group of the program: nobody.
const NOBODY: u32 = 65534;

/// Reads pictures; few at once.
pub struct Reader {
    programs: Vec<PathBuf>,
    running: Mutex<usize>,
    ended: Condvar,
}

impl Reader {
    /// With the program at the first of these places where there is one.
    #[must_use]
    pub fn new(programs: &[&str]) -> Self {
        Self { programs: programs.iter().map(PathBuf::from).collect(), running: Mutex::new(0), ended: Condvar::new() }
    }

    /// Whether there is a program that reads.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.program().is_some()
    }

    fn program(&self) -> Option<&Path> {
        self.programs.iter().map(PathBuf::as_path).find(|path| path.exists())
    }

    /// The text on a picture (PNG or PPM), in lines. Takes `TIME` twice at most.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub fn read(&self, picture: &[u8]) -> Result<String, String> {
        let program = self
            .program()
            .ok_or_else(|| format!("the picture was not read: tesseract is not installed (package {PACKAGE})"))?;
        let page = page::page(picture)?;
        let _turn = self.turn().ok_or_else(|| format!("the picture was not read: {AT_ONCE} others are being read"))?;
        let bytes = run(program, &page).map_err(|error| format!("the picture was not read: tesseract: {error}"))?;
        let text: String =
            String::from_utf8_lossy(&bytes).chars().filter(|letter| *letter == '\n' || !letter.is_control()).collect();
        match text.trim_end() {
            "" => Err("no text was found on the picture".to_owned()),
            text => Ok(format!("{text}\n")),
        }
    }

    fn turn(&self) -> Option<Turn<'_>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.wait_timeout_while(running, TIME, |running| AT_ONCE <= *running);
        let (mut running, late) = waited.unwrap_or_else(PoisonError::into_inner);
        if late.timed_out() {
            return None;
        }
        *running += 1;
        Some(Turn(self))
    }
}

/// One of those that run.
struct Turn<'a>(&'a Reader);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.ended.notify_one();
    }
}

fn run(program: &Path, page: &[u8]) -> io::Result<Vec<u8>> {
    let (mut input, output) = (in_memory()?, in_memory()?);
    input.write_all(page)?;
    io::Seek::rewind(&mut input)?;
    // The agent is kept when memory is short; this is not.
    let mut command = Command::new("choom");
    command.args(["-n", "500", "--", "prlimit"]).args(LIMITS).args(["nice", "-n", "15"]).arg(program);
    // One block of text, by the recogniser that Debian ships.
    command.args(["stdin", "stdout", "-l", "eng", "--psm", "6"]);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
    command.env("OMP_THREAD_LIMIT", "1"); // With more it is ten times slower on a busy machine.
    if nix::unistd::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    match run_on(command, input, output.try_clone()?, TIME)? {
        Ended::Itself(status) if status.success() => {}
        Ended::Itself(status) => return Err(io::Error::other(status.to_string())),
        Ended::Killed | Ended::Stopped | Ended::NotEven => {
            return Err(io::Error::other(format!("it took more than {} s", TIME.as_secs())));
        }
        Ended::Unknown(error) => return Err(error),
    }
    let length = output.metadata()?.len().min(TEXT_MAX as u64);
    let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
    let read = output.read_at(&mut text, 0)?;
    text.truncate(read);
    Ok(text)
}

fn in_memory() -> io::Result<File> {
    Ok(File::from(memfd_create("mainstay-page", MFdFlags::MFD_CLOEXEC)?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A reader whose program is this script, which a folder keeps.
    fn reader(script: &str) -> (Reader, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tesseract");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        for path in [folder.path(), &path] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        (Reader::new(&["/nowhere", path.to_str().unwrap()]), folder)
    }

    fn picture() -> Vec<u8> {
        [&b"P6 2 1 255\n"[..], &[0, 0, 0, 255, 255, 255]].concat()
    }

    #[test]
    fn what_the_program_says_is_the_text() {
        for (script, expected) in [
            ("head -c 2; printf ' read\\n\\033[1m\\n\\n'", Ok("P5 read\n[1m\n".to_owned())),
            ("cat >/dev/null", Err("no text was found on the picture")),
            ("exit 3", Err("the picture was not read: tesseract: exit status: 3")),
            ("kill -9 $$", Err("the picture was not read: tesseract: signal: 9 (SIGKILL)")),
        ] {
            let (reader, _folder) = reader(script);
            assert_eq!(reader.read(&picture()), expected.map_err(str::to_owned), "{script}");
        }
        let none = Reader::new(&["/nowhere"]);
        assert!(!none.is_there());
        let why = "the picture was not read: tesseract is not installed (package tesseract-ocr)";
        assert_eq!(none.read(&picture()), Err(why.to_owned()));
    }

    #[test]
    fn it_runs_as_nobody_within_limits() {
        let (reader, _folder) = reader("id -u; nice; ulimit -v; ulimit -t; cat /proc/self/oom_score_adj");
        let text = reader.read(&picture()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let user =
            if nix::unistd::geteuid().is_root() { "65534".to_owned() } else { nix::unistd::geteuid().to_string() };
        assert_eq!((lines[0], &lines[2..]), (user.as_str(), &["524288", "10", "500"][..]));
        let own = std::process::Command::new("nice").output().unwrap();
        let own: i32 = String::from_utf8(own.stdout).unwrap().trim().parse().unwrap();
        assert_eq!(lines[1].parse::<i32>().unwrap(), (own + 15).min(19), "{text}");
    }

    #[test]
    fn what_has_no_end_is_cut_off() {
        let (reader, _folder) = reader("exec yes");
        assert_eq!(reader.read(&picture()).unwrap_err(), "the picture was not read: tesseract: signal: 25 (SIGXFSZ)");
    }
}
