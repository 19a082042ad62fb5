//! [`Viewer`]: what watches a machine while its exits are measured.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Who, text};
use vmm_monitor::config::VmConfig;
use vmm_monitor::recorder::Recorder;
use vmm_monitor::session::{Built, End, Observer};
use vmm_trace::kernel::KernelExits;
use vmm_trace::live::watch::Live;
use vmm_trace::recorded::Recorded;

/// How often `vmm top` asks, unless told otherwise.
const PERIOD: Duration = Duration::from_secs(1);

/// Watches until [`Viewer::end`].
pub enum Viewer<'a> {
    /// Nothing watches.
    Nobody,
    /// A recording to a file, which goes with it.
    Recorded(Box<Recorded<'a>>, PathBuf),
    /// `vmm top`: the live view, and while the machine runs the thread that asks for it.
    Watched(Arc<Live>, Option<(Sender<()>, JoinHandle<()>)>),
}

impl<'a> Viewer<'a> {
    /// What `who` wants of the machine that `config` describes, which writes to `recorder`.
    pub fn by(who: Who, config: &'a VmConfig, recorder: Arc<Recorder>) -> Self {
        match who {
            Who::Bare | Who::Vmm => Self::Nobody,
            Who::Traced => {
                let path = config.kernel.clone().unwrap_or_default().with_extension("trace");
                Self::Recorded(Box::new(Recorded::new(config, path.clone().into(), recorder)), path)
            }
            Who::Watched => Self::Watched(Live::new(config.clone(), recorder, false), None),
        }
    }

    /// It has been seen.
    ///
    /// # Errors
    /// Not all of it could be kept.
    pub fn end(self) -> Result<(), String> {
        match self {
            Self::Nobody | Self::Watched(..) => Ok(()),
            Self::Recorded(recorded, path) => {
                recorded.finish(&|| false).map_err(text)?;
                std::fs::remove_file(path).map_err(text)
            }
        }
    }
}

impl Observer for Viewer<'_> {
    fn built(&mut self, built: &mut Built<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let machine = &*built.machine;
        match self {
            Self::Nobody => {}
            Self::Recorded(recorded, _) => recorded.built(built)?,
            Self::Watched(live, asks) => {
                let handle = machine.handle();
                let viewer = live.attach(Some(&handle))?;
                let (sender, ended) = channel();
                let ask = move || loop {
                    viewer.sample(Some(&handle));
                    if ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
                };
                *asks = Some((sender, thread::Builder::new().name("viewer".to_owned()).spawn(ask)?));
            }
        }
        Ok(())
    }

    fn ended(&mut self, end: &End<'_>) {
        match self {
            Self::Nobody => {}
            Self::Recorded(recorded, _) => recorded.ended(end),
            Self::Watched(_, asks) => {
                if let Some((sender, thread)) = asks.take() {
                    drop(sender);
                    let _ = thread.join();
                }
            }
        }
    }
}

/// Whether the exits inside the kernel can be recorded here, and if not why.
pub fn tracefs() -> String {
    match KernelExits::start() {
        Ok(_) => "here it may".to_owned(),
        Err(error) => format!("here it may not: {}", text(error)),
    }
}
