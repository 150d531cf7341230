//! The real binary, in a process of its own.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
};

use crate::support::PATIENCE;

const BINARY: &str = env!("CARGO_BIN_EXE_lorikeet");
const SERVE: [&str; 3] = ["serve", "--listen", "127.0.0.1:0"];

/// The real binary, serving.
pub struct Process {
    pub child: Child,
    pub url: String,
    log: mpsc::Receiver<String>,
}

impl Process {
    pub fn serve(options: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        Self::start(command.args(SERVE).args(options))
    }

    /// One that cannot make a file longer than so many times 512 bytes: a disk that is full for the
    /// large and has room for the small.
    pub fn serve_on_a_full_disk(blocks: u32, options: &[&str]) -> Self {
        // Without the trap the first byte too many would end it.
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, BINARY]);
        Self::start(command.args(SERVE).args(options))
    }

    fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let (lines, log) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        // Reads to the end: a full pipe would stop the server.
        thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .try_for_each(|l| lines.send(l))
        });
        let mut process = Self {
            child,
            url: String::new(),
            log,
        };
        let ready = process.line("ready at ");
        process.url = ready
            .split("ready at ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .into();
        process
    }

    /// The next line of the log that holds `text`.
    pub fn line(&self, text: &str) -> String {
        loop {
            let line = self.log.recv_timeout(PATIENCE).unwrap();
            assert!(!line.contains('\u{1b}'), "no colours in a pipe: {line}");
            if line.contains(text) {
                return line;
            }
        }
    }

    pub fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.child.id());
        assert!(
            Command::new("sh")
                .args(["-c", &command])
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
