//! `cargo bench --bench figures`: how fast and how light vmm starts guests, beside QEMU's microvm machine in the same run.
//!
//! Three measurements: `tiny` on this host's KVM, `boot` and `icount` where KVM boots Linux (through the rig, which is
//! this host if its KVM does). What each span holds is told in docs/figures.md.

mod guests;
#[allow(dead_code, reason = "shared with the command's tests, which make other kernels")]
#[path = "../../tests/images/mod.rs"]
mod images;
mod monitors;
mod options;
mod outer;
mod run;
mod smaps;
mod table;

use std::process::ExitCode;

use options::Mode;

fn main() -> ExitCode {
    let options = match options::Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("figures: {error}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    let modes = if options.modes.is_empty() {
        vec![Mode::Tiny, Mode::Boot, Mode::Icount]
    } else {
        options.modes.clone()
    };
    let mut failed = false;
    for mode in modes {
        let table = match mode {
            Mode::Tiny => outer::tiny(&options),
            Mode::Boot => outer::boot(&options),
            Mode::Icount => outer::icount(&options),
            Mode::Inside => {
                // Its output goes to another run of this program, which makes the table.
                match run::inside(&options) {
                    Ok(()) => continue,
                    Err(error) => {
                        eprintln!("figures: {error}");
                        return ExitCode::FAILURE;
                    }
                }
            }
        };
        match table {
            Ok(table) => println!("{}", if options.markdown { table.markdown() } else { table.text() }),
            Err(error) => {
                failed = true;
                eprintln!("figures: NOT MEASURED: {mode:?}: {error}");
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
