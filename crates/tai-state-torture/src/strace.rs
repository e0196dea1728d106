//! Runs a program under strace, and reads which system calls it made on files, in their order.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

/// All calls that change a file, a name or what a descriptor means. Those that no reader of a trace
/// models are here too, so that they are met and not passed over.
pub(crate) const CHANGES: &str = "trace=openat,open,openat2,creat,close,close_range,dup,dup2,dup3,\
    fcntl,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,rename,renameat,\
    renameat2,link,linkat,unlink,unlinkat,fsync,fdatasync,sync_file_range,msync,sync,syncfs,mmap,\
    copy_file_range,sendfile,splice,io_uring_setup";

/// Whether strace is there and may trace.
pub(crate) fn is_there() -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "--seccomp-bpf", "-e", "trace=close", "-o", "/dev/null", "true"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The same command, traced into this file.
pub(crate) fn under(trace: &Path, options: &[&str], command: &Command) -> Command {
    let mut traced = Command::new("strace");
    // Strings whole and in hexadecimal, so that nothing in them looks like the trace's own signs.
    traced.args(["-f", "-xx", "-s", "100000000", "-o"]).arg(trace).args(options);
    traced.arg("--").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    traced
}

/// One system call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) thread: String,
    pub(crate) name: String,
    pub(crate) args: Vec<String>,
    /// `None` when the process was killed in it; -1 when it failed.
    pub(crate) result: Option<i64>,
    /// Whether its failure was made up.
    pub(crate) injected: bool,
    /// Lines of the trace: two calls overlap if neither ended before the other began.
    pub(crate) begun: usize,
    pub(crate) ended: usize,
}

impl Call {
    pub(crate) fn failed(&self) -> bool {
        self.result.is_some_and(|result| result < 0)
    }

    /// A number among its arguments.
    pub(crate) fn number(&self, at: usize) -> i64 {
        let text = self.args.get(at).unwrap_or_else(|| panic!("no argument {at}: {self:?}"));
        text.parse().unwrap_or_else(|_| panic!("{text:?} is no number: {}", self.name))
    }

    /// A string among its arguments.
    pub(crate) fn bytes(&self, at: usize) -> Vec<u8> {
        let text = self.args.get(at).unwrap_or_else(|| panic!("no argument {at}: {self:?}"));
        let hex = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
        unhex(hex.unwrap_or_else(|| panic!("{}: not a whole string", self.name)))
    }

    /// Of which file a descriptor is, where the trace says so (option `-y`).
    pub(crate) fn file(&self, at: usize) -> String {
        let text = self.args.get(at).map_or("", String::as_str);
        let path = text.split_once('<').and_then(|(_, path)| path.strip_suffix('>'));
        String::from_utf8_lossy(&unhex(path.unwrap_or_default())).into_owned()
    }

    pub(crate) fn text(&self, at: usize) -> String {
        String::from_utf8(self.bytes(at)).unwrap()
    }
}

/// `\x6f\x6b`
fn unhex(text: &str) -> Vec<u8> {
    let digit = |digit: u8| (digit as char).to_digit(16).unwrap() as u8;
    let (bytes, rest) = text.as_bytes().as_chunks::<4>();
    assert!(rest.is_empty(), "not in hexadecimal: {text}");
    bytes.iter().map(|[_, _, high, low]| (digit(*high) << 4) | digit(*low)).collect()
}

/// The calls of all threads, in the order in which they ended.
pub(crate) fn read(trace: &Path) -> Vec<Call> {
    let file = std::fs::File::open(trace).unwrap();
    let mut calls = Vec::new();
    let mut begun: HashMap<String, (usize, String)> = HashMap::new();
    for (number, line) in BufReader::with_capacity(1 << 20, file).lines().enumerate() {
        let line = line.unwrap();
        let (thread, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let rest = rest.trim_start();
        if rest.starts_with("---") || rest.starts_with("+++") || rest.is_empty() {
            continue;
        }
        if let Some(start) = rest.strip_suffix(" <unfinished ...>") {
            begun.insert(thread.to_owned(), (number, start.to_owned()));
        } else if rest.starts_with("<... ") {
            let (_, end) = rest.split_once(" resumed>").unwrap();
            let (first, start) = begun.remove(thread).expect("what is resumed was begun");
            calls.push(call(thread, &format!("{start}{end}"), first, number));
        } else {
            calls.push(call(thread, rest, number, number));
        }
    }
    let cut_off =
        begun.iter().map(|(thread, (number, start))| call(thread, start, *number, usize::MAX));
    calls.extend(cut_off);
    calls
}

/// `name(arg, arg) = result (INJECTED)`
fn call(thread: &str, text: &str, begun: usize, ended: usize) -> Call {
    let (name, rest) = text.split_once('(').unwrap_or((text, ""));
    // Strings are in hexadecimal, so this sign stands nowhere else.
    let (args, result) = match rest.rsplit_once(" = ") {
        Some((args, result)) => (args.trim_end(), result),
        None => (rest, "?"),
    };
    let args = args.strip_suffix(')').unwrap_or(args);
    let number = result.split([' ', '<']).next().unwrap_or_default();
    let result_is = number
        .parse()
        .ok()
        .or_else(|| i64::from_str_radix(number.trim_start_matches("0x"), 16).ok());
    Call {
        thread: thread.to_owned(),
        name: name.to_owned(),
        args: args.split(", ").map(str::to_owned).collect(),
        result: result_is,
        injected: result.ends_with("(INJECTED)"),
        begun,
        ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_read() {
        let trace = tempfile::NamedTempFile::new().unwrap();
        let lines = [
            r#"7 openat(AT_FDCWD, "\x2f\x61", O_RDWR|O_CREAT, 0600) = 3"#,
            r#"7 pwrite64(3, "\x00\xff", 2, 4096 <unfinished ...>"#,
            r#"8 write(1, "\x6f\x6b", 2)         = 2"#,
            "7 <... pwrite64 resumed>)        = 2",
            r"7 fsync(3<\x2f\x61>)            = -1 EIO (Input/output error) (INJECTED)",
            "8 +++ exited with 0 +++",
            r#"7 write(1, "\x6f", 1 <unfinished ...>"#,
        ];
        std::fs::write(trace.path(), lines.join("\n")).unwrap();
        let calls = read(trace.path());
        let names: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
        assert_eq!(names, ["openat", "write", "pwrite64", "fsync", "write"]);
        assert_eq!((calls[0].text(1), calls[0].result), ("/a".to_owned(), Some(3)));
        assert_eq!((calls[2].bytes(1), calls[2].number(3)), (vec![0, 255], 4096));
        assert_eq!((calls[2].begun, calls[2].ended), (1, 3));
        assert!(calls[3].failed() && calls[3].injected);
        assert_eq!(calls[3].file(0), "/a");
        assert_eq!(calls[4].result, None);
    }
}
