//! `vmm wait` and `vmm rm`: the end of a run, and of what was kept of it.

use anyhow::anyhow;

use vmm_command::{Code, Failure, print};
use vmm_monitor::api::Error;
use vmm_monitor::api::client::Client;
use vmm_monitor::api::registry::Registry;

use super::detached::record::Records;
use super::flags::with_flags;

/// The options of `vmm wait`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The virtual machines' names, as vmm list --all shows them
    #[arg(required = true)]
    names: Vec<String>,
}

/// `vmm wait`.
pub fn wait(options: Options) -> Result<Code, Failure> {
    Ok(for_each(&options.names, |name| print(&format!("{}\n", wait_for(name)?))))
}

/// Does `one` for every item, whatever became of those before: each failure is reported, and the worst is the exit code.
pub fn for_each<T>(
    items: impl IntoIterator<Item = T>,
    mut one: impl FnMut(T) -> Result<(), Failure>,
) -> Code {
    let failures = items.into_iter().filter_map(|item| one(item).err());
    failures.fold(Code::Success, |worst, failure| {
        let failure = ended(failure);
        failure.print(with_flags);
        worse(worst, failure.code)
    })
}

/// The worse of two.
pub fn worse(a: Code, b: Code) -> Code {
    if b.number() > a.number() { b } else { a }
}

/// `failure` of a command on a virtual machine that does not run, in the words for one that has run in the background and has ended,
/// if it is that.
pub fn ended(failure: Failure) -> Failure {
    let Some(Error::NoSuchVm(name)) = failure.cause() else { return failure };
    let Some(record) = Records::of_user().ok().and_then(|records| records.find(name)) else { return failure };
    let error = match record.end() {
        Some(end) => anyhow!("{name:?} has ended, with exit code {}", end.code),
        None if record.was_killed() => anyhow!("{name:?} has ended: its process was killed"),
        // A start that was given up.
        None => return failure,
    };
    let hint = format!("see what it said: vmm logs --monitor {name}");
    Failure::new(failure.code, error).hint(Some(hint))
}

/// Waits until the run of `name` is over, or finds that it is. The exit code of its monitor.
fn wait_for(name: &str) -> Result<u8, Failure> {
    let client = Client::connect(&Registry::of_user(), name);
    let ran = client.is_ok();
    let error = match client.and_then(Client::wait) {
        Ok(ended) => return Ok(ended.code),
        // It was over before, or as we came.
        Err(error @ Error::NoSuchVm(_)) => error,
        Err(error) => return Err(error.into()),
    };
    match Records::of_user()?.find(name) {
        Some(record) => record.end().map(|end| end.code).ok_or_else(|| {
            let error = anyhow!("{name:?} ended without saying how: its process was killed");
            Failure::new(Code::Host, error)
                .hint(Some(format!("see what it said before: vmm logs --monitor {name}")))
        }),
        None if ran => Err(Failure::new(Code::Host, anyhow!("{name:?} ended without saying how"))),
        None => Err(error.into()),
    }
}

/// The options of `vmm rm`.
#[derive(Debug, clap::Args)]
pub struct RemoveOptions {
    /// The virtual machines' names, as vmm list --all shows them
    #[arg(required_unless_present = "all")]
    names: Vec<String>,
    /// Every one that has ended
    #[arg(long, conflicts_with = "names")]
    all: bool,
}

/// `vmm rm`.
pub fn remove(options: RemoveOptions) -> Result<Code, Failure> {
    let (records, registry) = (Records::of_user()?, Registry::of_user());
    if options.all {
        records.sweep(&registry)?;
    }
    for record in if options.all { records.list()? } else { Vec::new() } {
        if !registry.alive(record.name())? {
            record.remove_all()?;
        }
    }
    Ok(for_each(&options.names, |name| {
        let Some(record) = records.find(name) else {
            let error = anyhow!("nothing is kept of a virtual machine called {name:?}");
            return Err(Failure::new(Code::Host, error).hint(Some("see what is: vmm list --all")));
        };
        if registry.alive(name)? {
            let error = anyhow!("{name:?} is running");
            return Err(Failure::new(Code::Host, error).hint(Some(format!("stop it first: vmm stop {name}"))));
        }
        record.remove_all()
    }))
}
