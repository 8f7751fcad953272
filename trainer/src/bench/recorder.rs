//! A group of ranks that is not there: it remembers what this one starts, and returns at once. What a step
//! asks of the others can so be compared with the schedule, in a test, without any of them.

use ops::collectives::{CommError, Communicator, Operation, Pending, Place, Solo};
use std::sync::Mutex;
use tch::{Kind, Tensor};

/// An operation with the elements and the dtype of its buffer.
pub(super) type Started = (Operation, usize, Kind);

/// Rank 0 of several.
pub(super) struct Recorder {
    place: Place,
    alone: Solo,
    started: Mutex<Vec<Started>>,
}

impl Recorder {
    pub(super) fn of(world_size: usize) -> Recorder {
        let alone = Solo::new();
        let place = Place { world_size, local_size: world_size, ..alone.place().clone() };
        Recorder { place, alone, started: Mutex::new(Vec::new()) }
    }

    /// What was started since the last call.
    pub(super) fn take(&self) -> Vec<Started> {
        std::mem::take(&mut *self.started.lock().unwrap())
    }
}

impl Communicator for Recorder {
    fn place(&self) -> &Place {
        &self.place
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        self.started.lock().unwrap().push((operation, buffer.numel(), buffer.kind()));
        // What one rank alone does for any buffer.
        self.alone.start(Operation::Broadcast { root: 0 }, buffer)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(vec![bytes.to_vec(); self.place.world_size])
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn abort(&self, _: i32, why: &str) -> ! {
        panic!("{why}")
    }

    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        Ok(())
    }
}
