//! The `tai-state` program.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tai_state_cli::main()
}
