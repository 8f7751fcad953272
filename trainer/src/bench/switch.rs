//! A group of ranks whose collectives can be turned off, and remembered: what a step costs without
//! communication, and communication without a step. What travels is unknown here.

use ops::collectives::{CommError, Communicator, Operation, Pending, Place, Solo, Traffic};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use tch::{Device, Kind, Tensor};

/// Wraps a group. Control data goes through whether or not the rest is turned off.
pub(super) struct Switch<'a> {
    inner: &'a dyn Communicator,
    alone: Solo,
    off: AtomicBool,
    /// What is started while it remembers.
    started: Mutex<Option<Vec<(Operation, Tensor)>>>,
}

impl<'a> Switch<'a> {
    pub(super) fn new(inner: &'a dyn Communicator) -> Switch<'a> {
        Switch { inner, alone: Solo::new(), off: AtomicBool::new(false), started: Mutex::new(None) }
    }

    /// Runs `body` with operations that do nothing and are complete at once. On all ranks or on none.
    pub(super) fn without<T>(&self, body: impl FnOnce() -> T) -> T {
        self.off.store(true, Ordering::Relaxed);
        let result = body();
        self.off.store(false, Ordering::Relaxed);
        result
    }

    /// Runs `body`, and returns with its result the operations that it started.
    pub(super) fn remembering<T>(&self, body: impl FnOnce() -> T) -> (T, Vec<(Operation, Tensor)>) {
        let replace = |with| self.started.lock().map(|mut started| std::mem::replace(&mut *started, with));
        let _ = replace(Some(Vec::new()));
        let result = body();
        (result, replace(None).ok().flatten().unwrap_or_default())
    }
}

impl Communicator for Switch<'_> {
    fn place(&self) -> &Place {
        self.inner.place()
    }

    fn device(&self) -> Device {
        self.inner.device()
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        self.inner.buffer(numel, kind)
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        if self.off.load(Ordering::Relaxed) {
            // What one rank alone does for any buffer.
            return self.alone.start(Operation::Broadcast { root: 0 }, buffer);
        }
        if let Ok(mut started) = self.started.lock()
            && let Some(started) = &mut *started
        {
            started.push((operation, buffer.shallow_clone()));
        }
        self.inner.start(operation, buffer)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }

    fn abort(&self, code: i32, why: &str) -> ! {
        self.inner.abort(code, why)
    }

    /// Nothing: the group inside is somebody else's to leave.
    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ops::collectives::Wire;

    #[test]
    fn what_is_started_is_remembered_unless_it_is_turned_off() {
        let alone = Solo::new();
        let switch = Switch::new(&alone);
        let buffer = Tensor::zeros([8], (Kind::Float, Device::Cpu));
        let ((), started) = switch.remembering(|| {
            switch.all_reduce(&buffer).unwrap();
            switch.without(|| switch.all_gather(&buffer, 4).unwrap());
        });
        assert_eq!(started.len(), 1);
        assert_eq!(started[0].0, Operation::AllReduce { wire: Wire::Fp32 });
    }
}
