//! The emulator of the tests: it is there when asked, and gone with whoever started it.

#![cfg(all(unix, feature = "firestore"))]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use tai_state::testing::emulator::{Emulator, Place, fresh_project};

/// The answer to `GET /`, of which a paused process gives none.
fn get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = [0; 15];
    stream.read_exact(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether there is such a process; a dead one that nobody has waited for is one too.
fn lives(pid: u32) -> bool {
    Command::new("sh")
        .args(["-c", &format!("kill -0 {pid} 2>&1")])
        .output()
        .unwrap()
        .status
        .success()
}

#[tokio::test]
async fn an_emulator_is_started_paused_restarted_and_ended() {
    let Some(emulator) = Emulator::own().await else { return };
    let pid = emulator.pid().unwrap();
    assert_eq!(get(emulator.address()).unwrap(), "HTTP/1.1 200 OK");

    emulator.pause().unwrap();
    let error = get(emulator.address()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    emulator.resume().unwrap();
    assert_eq!(get(emulator.address()).unwrap(), "HTTP/1.1 200 OK");

    let address = emulator.address().to_owned();
    emulator.restart().await.unwrap();
    assert!(!lives(pid));
    assert_eq!((emulator.address(), emulator.pid() == Some(pid)), (address.as_str(), false));
    assert_eq!(get(&address).unwrap(), "HTTP/1.1 200 OK");

    emulator.kill().unwrap();
    assert_eq!(emulator.pid(), None);
    assert_eq!(get(&address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(emulator.pause().unwrap_err().kind(), ErrorKind::NotConnected);
    emulator.restart().await.unwrap();

    // Also one that cannot answer a polite signal.
    let pid = emulator.pid().unwrap();
    assert!(lives(pid));
    emulator.pause().unwrap();
    drop(emulator);
    assert!(!lives(pid));
}

#[tokio::test]
async fn a_shared_emulator_is_one_for_all_runtimes() {
    let Some(emulator) = Emulator::shared().await else { return };
    let elsewhere = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { Emulator::shared().await.unwrap().address() })
    });
    assert_eq!(elsewhere.join().unwrap(), emulator.address());
    assert_eq!(get(emulator.address()).unwrap(), "HTTP/1.1 200 OK");
}

/// What the next test starts and kills: itself, told by a variable to start an emulator and to
/// say which.
const PLAYS_THE_VICTIM: &str = "TAI_TEST_PLAYS_THE_VICTIM";

#[tokio::test]
async fn an_emulator_ends_with_a_killed_process() {
    if std::env::var_os(PLAYS_THE_VICTIM).is_some() {
        let emulator = Emulator::own().await;
        println!("\npid {}", emulator.as_ref().map_or(0, |emulator| emulator.pid().unwrap()));
        std::future::pending::<()>().await;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["an_emulator_ends_with_a_killed_process", "--exact", "--nocapture"])
        .env(PLAYS_THE_VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stdout = std::io::BufReader::new(victim.stdout.take().unwrap());
    let pid: u32 = loop {
        said.clear();
        assert_ne!(std::io::BufRead::read_line(&mut stdout, &mut said).unwrap(), 0);
        if let Some(pid) = said.trim().strip_prefix("pid ") {
            break pid.parse().unwrap();
        }
    };
    let skipped = pid == 0;
    assert!(skipped || lives(pid));
    victim.kill().unwrap();
    victim.wait().unwrap();
    if skipped {
        return;
    }
    // Its keeper is nobody's child now, so nothing announces the end: look until it is there.
    let gone = async {
        while lives(pid) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("it lives on");
}

#[tokio::test]
async fn a_jar_that_is_none_is_refused_with_what_java_says() {
    let jar = tempfile::NamedTempFile::new().unwrap();
    let error =
        Emulator::start(Place::Jar(jar.path().to_path_buf())).await.unwrap_err().to_string();
    assert!(error.contains("ended at its start:\n"), "{error}");
    assert!(error.contains("CloudFirestore") || error.contains("not found"), "{error}");
}

#[test]
fn a_project_is_fresh_and_one_that_google_takes() {
    let (one, two) = (fresh_project(), fresh_project());
    assert_ne!(one, two);
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    assert!(one.starts_with("demo-") && one.len() <= 30 && one.chars().all(allowed), "{one}");
}
