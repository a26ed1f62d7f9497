//! Log lines from inside the kernel programs (`--trace-flows`), which aya-log carries in a ring buffer.

use std::{io, thread, time::Duration};

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, LevelFilter, Log, Metadata, Record};

use super::Error;

/// How often the ring buffer is emptied. It holds 128 KiB: about a thousand new flows.
const INTERVAL: Duration = Duration::from_millis(50);

/// The level to load the object with.
pub fn level(on: bool) -> u8 {
    let level = if on { LevelFilter::Debug } else { LevelFilter::Off };
    level as u8
}

/// Forwards the programs' log lines to the agent's own log, on a thread of its own, until the process ends.
pub fn follow(ebpf: &mut Ebpf) -> Result<(), Error> {
    let mut logger = EbpfLogger::init_with_logger(ebpf, ToTracing).map_err(|e| Error::Trace(Box::new(e)))?;
    let spawned: io::Result<_> = thread::Builder::new().name("trace-flows".into()).spawn(move || {
        loop {
            logger.flush();
            thread::sleep(INTERVAL);
        }
    });
    spawned.map(drop).map_err(|e| Error::Trace(Box::new(e)))
}

/// aya-log speaks the `log` crate's language.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Debug
    }

    fn log(&self, record: &Record<'_>) {
        // At the level that is shown without further options: whoever switched it on wants to see it.
        tracing::info!(target: "lb_ebpf", "{}", record.args());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_the_log_crate() {
        assert_eq!((level(false), level(true)), (0, 4));
    }
}
