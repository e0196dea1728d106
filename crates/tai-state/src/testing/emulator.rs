//! Google's Firestore emulator for tests: found, started, paused, killed, and gone with the process.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::clock::{self, Stopwatch};

/// How long a start may take. Two busy cores need three seconds.
const START: Duration = Duration::from_secs(60);
/// How long to wait for one that somebody else has started, perhaps just now.
const FOREIGN: Duration = Duration::from_secs(10);
/// How long one request to it may take, and the pause between two.
const ANSWER: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// A free port can be taken by another program before the emulator binds it.
const PORTS_TRIED: usize = 5;
/// So many of its last lines are kept, to be quoted in an error.
const LINES_KEPT: usize = 20;

/// Where the Google Cloud SDK usually is, below `/` or the home directory.
const SDK_ROOTS: [&str; 5] = [
    "/usr/lib/google-cloud-sdk",
    "/usr/share/google-cloud-sdk",
    "/opt/google-cloud-sdk",
    "/snap/google-cloud-sdk/current",
    "/snap/google-cloud-cli/current",
];
const COMPONENT: &str = "platform/cloud-firestore-emulator/cloud-firestore-emulator.jar";

/// What to do where there is none.
const HOW_TO_GET_IT: &str = "install it with `gcloud components install cloud-firestore-emulator`, \
    `apt-get install google-cloud-cli-firestore-emulator` or \
    `npx firebase-tools setup:emulators:firestore` (and Java 17 or later), \
    or point FIRESTORE_EMULATOR_HOST at a running one or TAI_FIRESTORE_EMULATOR_JAR at its jar";

/// The shell holds the other end of a pipe from this process: when this process ends, however it
/// ends, `read` ends too. Java keeps no end of that pipe, or of the one that the pid comes through.
/// The `wait` takes the dead process off the process table.
const KEEPER: &str = r#"
"$@" </dev/null 1>&2 &
pid=$!
trap '' HUP INT TERM
echo "$pid"
exec 1>&- 2>&-
read -r _
kill -9 "$pid"
wait "$pid"
"#;

/// Where an emulator is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// Somebody runs it at this `host:port`; it is not ours to pause or to stop.
    Running(String),
    /// This jar can be started.
    Jar(PathBuf),
}

/// A Firestore emulator. One that was started here ends when this is dropped or when the process
/// ends, also by `SIGKILL`.
///
/// It keeps everything in memory, and tests share it: each takes a [`fresh_project`] for itself.
#[derive(Debug)]
pub struct Emulator {
    address: String,
    ours: Option<Ours>,
}

/// What is known of an emulator that was started here.
#[derive(Debug, Clone)]
struct Ours {
    jar: PathBuf,
    port: u16,
    server: Arc<Mutex<Option<Server>>>,
}

impl Emulator {
    /// Where an emulator is: `FIRESTORE_EMULATOR_HOST`, or else a jar: the one that
    /// `TAI_FIRESTORE_EMULATOR_JAR` names, the Google Cloud SDK's, or the newest that the Firebase
    /// tools have downloaded.
    #[must_use]
    pub fn find() -> Option<Place> {
        find(&|name| std::env::var_os(name))
    }

    /// The jar of an emulator that can be started, also where `FIRESTORE_EMULATOR_HOST` is set.
    #[must_use]
    pub fn find_jar() -> Option<PathBuf> {
        find_jar(&|name| std::env::var_os(name))
    }

    /// The emulator that all tests of this process share, started by whoever asks first.
    ///
    /// `None` where there is none or it does not start; one line on the standard error then says so
    /// and how to get one.
    ///
    /// # Panics
    ///
    /// Instead of answering `None`, where `TAI_REQUIRE_EMULATOR=1` is set.
    pub async fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Result<Emulator, String>> = OnceLock::new();
        // A lock that belongs to no runtime: each test has its own.
        let first = || match Self::find() {
            Some(place) => start(place).map_err(|error| error.to_string()),
            None => Err("no Firestore emulator was found".into()),
        };
        let shared = tokio::task::spawn_blocking(move || SHARED.get_or_init(first)).await;
        present(
            shared.as_ref().map_or(Err("the start was cut off"), |shared| {
                shared.as_ref().map_err(String::as_str)
            }),
        )
    }

    /// An emulator of the caller's own, which may be paused and killed. Absent as in
    /// [`Emulator::shared`].
    ///
    /// # Panics
    ///
    /// As [`Emulator::shared`].
    pub async fn own() -> Option<Self> {
        let started = match Self::find_jar() {
            Some(jar) => Self::start(Place::Jar(jar)).await.map_err(|error| error.to_string()),
            None => Err("no Firestore emulator that can be started was found".into()),
        };
        present(started)
    }

    /// Starts the emulator, or looks at the running one, and returns when it answers.
    ///
    /// # Errors
    ///
    /// It does not answer within 60 seconds, or it ends; the error quotes its last lines.
    pub async fn start(place: Place) -> io::Result<Self> {
        blocking(move || start(place)).await
    }

    /// Where it listens: `host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its process; none of a foreign emulator, or while it is killed.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.ours.as_ref().and_then(|ours| lock(&ours.server).as_ref().map(|server| server.pid))
    }

    /// Stops its process, so that it keeps its connections and answers nothing.
    ///
    /// # Errors
    ///
    /// It is not ours, or not running.
    pub fn pause(&self) -> io::Result<()> {
        self.signal("STOP")
    }

    /// Lets a paused process go on.
    ///
    /// # Errors
    ///
    /// As [`Emulator::pause`].
    pub fn resume(&self) -> io::Result<()> {
        self.signal("CONT")
    }

    /// Ends its process with `SIGKILL`, and returns when it is gone.
    ///
    /// # Errors
    ///
    /// It is not ours, or not running.
    pub fn kill(&self) -> io::Result<()> {
        let server = lock(&self.ours()?.server).take();
        server.map(drop).ok_or_else(not_running)
    }

    /// Kills it if it runs, and starts it anew on the same port: it comes back empty.
    ///
    /// # Errors
    ///
    /// It is not ours, it does not start, or another program took the port meanwhile.
    pub async fn restart(&self) -> io::Result<()> {
        let ours = self.ours()?.clone();
        blocking(move || {
            let mut server = lock(&ours.server);
            *server = None;
            *server = Some(Server::start(&ours.jar, ours.port)?);
            Ok(())
        })
        .await
    }

    fn ours(&self) -> io::Result<&Ours> {
        self.ours.as_ref().ok_or_else(|| {
            io::Error::new(io::ErrorKind::Unsupported, "this emulator was started by someone else")
        })
    }

    fn signal(&self, name: &str) -> io::Result<()> {
        let server = lock(&self.ours()?.server);
        let pid = server.as_ref().ok_or_else(not_running)?.pid.to_string();
        // The shell's own `kill`: small systems have no program of that name.
        let sent =
            Command::new("sh").args(["-c", "kill \"$@\"", "sh", "-s", name, &pid]).status()?;
        if sent.success() { Ok(()) } else { Err(not_running()) }
    }
}

/// A project that no other test uses: `demo-` and 80 random bits.
#[must_use]
pub fn fresh_project() -> String {
    format!("demo-{:020x}", clock::random_id().as_u128() >> 48)
}

fn not_running() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the emulator is not running")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The emulator if there is one. If not, it must not go unnoticed that tests were skipped.
#[allow(clippy::panic)]
fn present<T>(started: Result<T, impl std::fmt::Display>) -> Option<T> {
    static SAID: OnceLock<()> = OnceLock::new();
    let missing = match started {
        Ok(emulator) => return Some(emulator),
        Err(missing) => missing,
    };
    if std::env::var_os("TAI_REQUIRE_EMULATOR").is_some_and(|required| required == "1") {
        panic!("{missing}; {HOW_TO_GET_IT}");
    }
    SAID.get_or_init(|| {
        let missing = missing.to_string().replace('\n', " | ");
        let line = format!("\nSKIPPED: tests of Firestore: {missing}; {HOW_TO_GET_IT}\n");
        // Not `eprintln!`, which a test runner keeps to itself as long as the test passes.
        let _ = io::stderr().write_all(line.as_bytes());
    });
    None
}

type Environment<'a> = dyn Fn(&str) -> Option<OsString> + 'a;

fn find(variable: &Environment<'_>) -> Option<Place> {
    let running = variable("FIRESTORE_EMULATOR_HOST").and_then(|host| host.into_string().ok());
    match running.filter(|host| !host.is_empty()) {
        Some(host) => Some(Place::Running(host)),
        None => find_jar(variable).map(Place::Jar),
    }
}

fn find_jar(variable: &Environment<'_>) -> Option<PathBuf> {
    if let Some(jar) = variable("TAI_FIRESTORE_EMULATOR_JAR").filter(|jar| !jar.is_empty()) {
        return Some(PathBuf::from(jar));
    }
    let home = variable("HOME").map(PathBuf::from);
    let path = variable("PATH").unwrap_or_default();
    // In the SDK, and where packages link to it, `gcloud` is at `bin/gcloud` below the root.
    let gcloud = std::env::split_paths(&path)
        .filter_map(|folder| folder.join("gcloud").canonicalize().ok())
        .filter_map(|gcloud| Some(gcloud.parent()?.parent()?.to_path_buf()));
    let named = ["CLOUDSDK_ROOT_DIR", "GOOGLE_CLOUD_SDK"].into_iter().filter_map(variable);
    let usual = SDK_ROOTS.into_iter().map(PathBuf::from);
    let mut roots = gcloud
        .chain(named.map(PathBuf::from))
        .chain(usual)
        .chain(home.as_ref().map(|home| home.join("google-cloud-sdk")));
    let sdk = roots.find_map(|root| Some(root.join(COMPONENT)).filter(|jar| jar.is_file()));
    let firebase = || {
        let named = variable("FIREBASE_EMULATORS_PATH").map(PathBuf::from);
        let usual = home.as_ref().map(|home| home.join(".cache/firebase/emulators"));
        named.into_iter().chain(usual).find_map(|folder| newest_jar(&folder))
    };
    sdk.or_else(firebase)
}

/// The highest version in the Firebase tools' cache.
fn newest_jar(folder: &Path) -> Option<PathBuf> {
    let version = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let version = name.strip_prefix("cloud-firestore-emulator-v")?.strip_suffix(".jar")?;
        version.split('.').map(|part| part.parse().ok()).collect::<Option<Vec<u64>>>()
    };
    let entries = std::fs::read_dir(folder).ok()?.filter_map(Result::ok);
    let jars = entries.filter_map(|entry| Some((version(&entry.path())?, entry.path())));
    jars.max().map(|(_, path)| path)
}

fn start(place: Place) -> io::Result<Emulator> {
    let jar = match place {
        Place::Running(address) => {
            await_answer(&Output::default(), &address, FOREIGN)?;
            return Ok(Emulator { address, ours: None });
        }
        Place::Jar(jar) => jar,
    };
    let mut tried = 0;
    loop {
        tried += 1;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        match Server::start(&jar, port) {
            Ok(server) => {
                let server = Arc::new(Mutex::new(Some(server)));
                let address = format!("127.0.0.1:{port}");
                return Ok(Emulator { address, ours: Some(Ours { jar, port, server }) });
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tried < PORTS_TRIED => {}
            Err(error) => return Err(error),
        }
    }
}

/// The emulator's process, and the shell that keeps it. Dropping it ends both.
#[derive(Debug)]
struct Server {
    pid: u32,
    shell: Child,
    /// Open as long as the emulator may live.
    leash: Option<ChildStdin>,
}

impl Server {
    fn start(jar: &Path, port: u16) -> io::Result<Self> {
        let java = std::env::var_os("JAVA_HOME").map(|home| Path::new(&home).join("bin/java"));
        let java = java.filter(|java| java.is_file()).unwrap_or_else(|| PathBuf::from("java"));
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).arg(java);
        // Its own refusals are read below. The rest is for a quick start and a small process.
        command.args(["-Duser.language=en", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]);
        command.args(["-Xmx1g", "-cp"]).arg(jar);
        command.arg("com.google.cloud.datastore.emulator.firestore.CloudFirestore");
        command.args(["start", "--host=127.0.0.1", &format!("--port={port}")]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A signal for the whole group of the test (Ctrl-C) must not end the shell before Java.
        command.process_group(0);
        let mut shell = command.spawn()?;
        let leash = shell.stdin.take();
        let (stdout, stderr) = (shell.stdout.take(), shell.stderr.take());
        let mut server = Self { pid: 0, shell, leash };
        let mut pid = String::new();
        BufReader::new(stdout.ok_or_else(not_running)?).read_line(&mut pid)?;
        server.pid = pid.trim().parse().map_err(io::Error::other)?;
        let output = Output::follow(stderr.ok_or_else(not_running)?);
        await_answer(&output, &format!("127.0.0.1:{port}"), START)?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.leash.take());
        let _ = self.shell.wait();
    }
}

/// What the emulator has printed lately, and whether it has ended.
#[derive(Debug, Default)]
struct Output {
    tail: Mutex<Tail>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<String>,
    ended: bool,
}

impl Output {
    fn follow(output: impl Read + Send + 'static) -> Arc<Self> {
        let followed = Arc::new(Self::default());
        let followers = Arc::clone(&followed);
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let mut tail = lock(&followers.tail);
                tail.lines.push_back(String::from_utf8_lossy(&line).into_owned());
                if tail.lines.len() > LINES_KEPT {
                    tail.lines.pop_front();
                }
            }
            lock(&followers.tail).ended = true;
            followers.ended.notify_all();
        });
        followed
    }

    /// Waits for its end, but no longer than `most`; whether it has ended, and its last lines.
    fn ended_within(&self, most: Duration) -> (bool, String) {
        let tail = lock(&self.tail);
        let waited = self.ended.wait_timeout_while(tail, most, |tail| !tail.ended);
        let (tail, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = tail.lines.iter().map(String::as_str).collect();
        (tail.ended, lines.join("\n"))
    }
}

fn await_answer(output: &Output, address: &str, most: Duration) -> io::Result<()> {
    let from = Stopwatch::start();
    loop {
        let (ended, lines) = output.ended_within(PAUSE);
        if ended {
            let taken = lines.contains("Address already in use") || lines.contains("BindException");
            let kind = if taken { io::ErrorKind::AddrInUse } else { io::ErrorKind::Other };
            let what = format!("the Firestore emulator ended at its start:\n{lines}");
            return Err(io::Error::new(kind, what));
        }
        if answers(address) {
            return Ok(());
        }
        if from.elapsed() > most {
            let what = format!("no Firestore emulator answers at {address} in {most:?}\n{lines}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
    }
}

/// Whether it is ready: it accepts connections earlier than it answers. The empty commit makes it
/// load what the first call needs, which takes seconds on a busy machine and would end the deadline
/// of a test's first call.
fn answers(address: &str) -> bool {
    const WARM: &str = "POST /v1/projects/demo-warm/databases/(default)/documents:commit";
    asked(address, "GET /", "") && asked(address, WARM, r#"{"writes":[]}"#)
}

fn asked(address: &str, what: &str, body: &str) -> bool {
    let request = format!(
        "{what} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nAuthorization: Bearer owner\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let status = || -> io::Result<String> {
        let mut stream = connect(address)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        stream.write_all(request.as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    status().is_ok_and(|line| line.trim_end().ends_with(" 200 OK"))
}

fn connect(address: &str) -> io::Result<TcpStream> {
    use std::net::ToSocketAddrs;
    let addresses: Vec<SocketAddr> = address.to_socket_addrs()?.collect();
    let mut last = io::Error::other("the name of the host has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, ANSWER) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What is found where only these variables are set. `PATH` has no `gcloud` unless it is given.
    fn found(variables: &[(&str, &Path)]) -> Option<Place> {
        find(&|name| {
            let set = variables.iter().find(|(known, _)| *known == name);
            set.map(|(_, value)| value.as_os_str().to_owned())
        })
    }

    fn put(path: PathBuf) -> PathBuf {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        path
    }

    #[test]
    fn a_running_one_comes_before_a_named_jar_before_an_installed_one() {
        let folder = tempfile::tempdir().unwrap();
        let installed = put(folder.path().join("sdk").join(COMPONENT));
        let (host, jar) = (Path::new("localhost:1"), Path::new("named.jar"));
        let all = [
            ("FIRESTORE_EMULATOR_HOST", host),
            ("TAI_FIRESTORE_EMULATOR_JAR", jar),
            ("PATH", &folder.path().join("bin")),
            ("CLOUDSDK_ROOT_DIR", &folder.path().join("sdk")),
        ];
        put(folder.path().join("sdk/bin/gcloud"));
        std::os::unix::fs::symlink("sdk/bin", folder.path().join("bin")).unwrap();
        assert_eq!(found(&all), Some(Place::Running("localhost:1".into())));
        assert_eq!(found(&all[1..]), Some(Place::Jar("named.jar".into())));
        let by_gcloud = found(&all[2..3]);
        let real = folder.path().canonicalize().unwrap().join("sdk").join(COMPONENT);
        assert_eq!(by_gcloud, Some(Place::Jar(real)));
        // Where an SDK is installed on this machine the variable still comes first.
        assert_eq!(found(&all[3..]), Some(Place::Jar(installed)));
        assert_eq!(found(&[("FIRESTORE_EMULATOR_HOST", Path::new("")), all[1]]), found(&all[1..]));
    }

    #[test]
    fn the_newest_jar_is_so_by_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["1.9.1", "1.19.8", "1.19.10", "1.18.2"] {
            put(folder.path().join(format!("cloud-firestore-emulator-v{version}.jar")));
        }
        put(folder.path().join("cloud-storage-rules-runtime-v9.9.9.jar"));
        put(folder.path().join("cloud-firestore-emulator-vnext.jar"));
        let newest = folder.path().join("cloud-firestore-emulator-v1.19.10.jar");
        assert_eq!(newest_jar(folder.path()), Some(newest));
        assert_eq!(newest_jar(&folder.path().join("absent")), None);
    }

    #[test]
    fn a_failed_start_quotes_the_last_lines_and_knows_a_taken_port() {
        let text = (0..30).map(|n| format!("line {n}\n")).collect::<String>();
        let output = Output::follow(io::Cursor::new(text.clone()));
        let error = await_answer(&output, "127.0.0.1:1", START).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Other);
        let quoted = error.to_string();
        assert!(quoted.contains("line 29") && quoted.contains("line 10\n"), "{quoted}");
        assert!(!quoted.contains("line 9\n"), "{quoted}");

        let output = Output::follow(io::Cursor::new(text + "java.net.BindException: no\n"));
        let error = await_answer(&output, "127.0.0.1:1", START).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);

        let silent = Output::default();
        let error = await_answer(&silent, "127.0.0.1:1", Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
