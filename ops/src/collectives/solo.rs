//! One rank on its own: the same contract, nobody to talk to. Never touches MPI.

use super::{CommError, Communicator, Operation, Pending, Place, end, flat, machine};
use tch::{Device, Kind, Tensor};

/// The group of one rank.
#[derive(Debug)]
pub struct Solo {
    place: Place,
    device: Device,
}

impl Solo {
    /// Rank 0 of 1, for buffers in host memory.
    pub fn new() -> Solo {
        Solo::on(Device::Cpu)
    }

    /// Rank 0 of 1, for buffers on a device.
    pub fn on(device: Device) -> Solo {
        let host = machine::host_name();
        let place = Place { rank: 0, world_size: 1, local_rank: 0, local_size: 1, node: 0, nodes: 1, host };
        Solo { place, device }
    }
}

impl Default for Solo {
    fn default() -> Solo {
        Solo::new()
    }
}

impl Communicator for Solo {
    fn place(&self) -> &Place {
        &self.place
    }

    fn device(&self) -> Device {
        self.device
    }

    fn buffer(&self, numel: usize, kind: Kind) -> Result<Tensor, CommError> {
        flat::plain_buffer(numel, kind, self.device)
    }

    fn start(&self, operation: Operation, buffer: &Tensor) -> Result<Pending, CommError> {
        flat::check(operation, buffer, 1, self.device)?;
        Ok(Pending::done())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn abort(&self, code: i32, why: &str) -> ! {
        end::abort(0, code, why)
    }

    fn finalize(self: Box<Self>) -> Result<(), CommError> {
        Ok(())
    }
}
