//! How a GPU fares while it computes, from NVIDIA's management library, opened at run time. Asks the driver and
//! disturbs nobody who computes. Knows no metrics and who looks at them.

use crate::cuda;
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use tch::Device;

/// A GPU that is looked after.
pub struct Gpu {
    nvml: Nvml,
    uuid: String,
}

/// How it fares now. What a GPU does not tell, as one shared by several owners may not, is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Health {
    /// Share of the last sampling period in which it computed, 0 to 1.
    pub utilization_ratio: Option<f64>,
    /// Of the chip, degrees Celsius.
    pub temperature_celsius: Option<f64>,
    /// Watts.
    pub power_watts: Option<f64>,
    /// Memory in use, by all processes.
    pub memory_used_bytes: Option<f64>,
}

impl Gpu {
    /// The GPU behind a device of this process, whatever number the system gives it. `None` for a CPU, and
    /// where the driver comes without its management library.
    pub fn of(device: Device) -> Option<Gpu> {
        let Device::Cuda(index) = device else { return None };
        let uuid = nvml_uuid(&cuda::uuid(index)?)?;
        // Without this suffix the library is there only where one builds against it.
        let nvml = Nvml::builder().lib_path("libnvidia-ml.so.1".as_ref()).init().ok()?;
        nvml.device_by_uuid(uuid.as_str()).ok()?;
        Some(Gpu { nvml, uuid })
    }

    /// How it fares now.
    pub fn look(&self) -> Health {
        let Ok(device) = self.nvml.device_by_uuid(self.uuid.as_str()) else { return Health::default() };
        Health {
            utilization_ratio: device.utilization_rates().ok().map(|used| f64::from(used.gpu) / 100.0),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
            power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
            memory_used_bytes: device.memory_info().ok().map(|memory| memory.used as f64),
        }
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_tuple("Gpu").field(&self.uuid).finish()
    }
}

/// 32 hexadecimal digits as NVML writes a device's UUID.
fn nvml_uuid(digits: &str) -> Option<String> {
    let part = |from, to| digits.get(from..to);
    let tail = (digits.len() == 32).then(|| part(20, 32))??;
    Some(format!("GPU-{}-{}-{}-{}-{tail}", part(0, 8)?, part(8, 12)?, part(12, 16)?, part(16, 20)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_no_gpu_and_a_gpu_is_known_by_its_uuid() {
        assert!(Gpu::of(Device::Cpu).is_none());
        if cuda::open().is_err() {
            assert!(Gpu::of(Device::Cuda(0)).is_none());
        }
        let uuid = nvml_uuid("0123456789abcdef0123456789abcdef");
        assert_eq!(uuid.as_deref(), Some("GPU-01234567-89ab-cdef-0123-456789abcdef"));
        assert_eq!(nvml_uuid("0123"), None);
    }
}
