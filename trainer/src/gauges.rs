//! What this rank shows to Prometheus: its own numbers on every rank, the run's totals on rank 0. They are set
//! from the reports that `metrics.jsonl` has too, with a few atomic stores; whoever asks is answered by a
//! thread of the server's, which looks at memory and disk only then.
//!
//! Rank 0 has the live page too. Names, units and labels are in docs/MONITORING.md.

use crate::metrics::{CheckpointReport, EvalReport, StepReport};
use crate::pulse::Pulse;
use crate::timing::PhaseSeconds;
use configs::{LAUNCHER_VARIABLE, RunConfig};
use monitor::{FolderGauges, Page, Reply, Server, exposition};
use ops::collectives::Place;
use ops::gpu_health::{Gpu, Health};
use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, Opts, Registry};
use std::collections::HashMap;
use tch::Device;
use tracing::{debug, warn};

/// Upper bounds of the buckets of a phase, seconds: four for each factor of ten, which is fine enough to tell a
/// phase that takes twice as long.
const PHASE_BUCKETS: [f64; 17] = [
    0.001, 0.0018, 0.0032, 0.0056, 0.01, 0.018, 0.032, 0.056, 0.1, 0.18, 0.32, 0.56, 1.0, 3.2, 10.0, 32.0,
    100.0,
];

/// Of a checkpoint, from the snapshot to the rename, seconds.
const CHECKPOINT_BUCKETS: [f64; 9] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

/// The numbers of a rank. Without a place to listen at, or when the system refuses, nobody sees them.
#[derive(Debug)]
pub(crate) struct Gauges {
    own: Own,
    /// On rank 0.
    totals: Option<Totals>,
}

impl Gauges {
    /// Serves them at `metrics.listen`, from threads of their own, for a run that goes on after `step` updates.
    /// A run does not fail for want of a port.
    pub(crate) fn serve(
        config: &RunConfig,
        step: u64,
        (place, device): (&Place, Device),
        pulse: &Pulse,
    ) -> Option<Gauges> {
        let address = config.metrics.listen.rank(place.local_rank)?;
        let (gauges, served) = match Gauges::new(config, step, (place.rank, device), pulse) {
            Ok(made) => made,
            Err(error) => {
                warn!("no metrics are served: {error}");
                return None;
            }
        };
        match Server::start(address, move |target| served.answer(target)) {
            Ok((server, taken)) => {
                if let Some(error) = taken {
                    warn!("metrics.listen: {address}: {error}; metrics are at {} instead", server.address());
                }
                debug!("metrics at http://{}/metrics", server.address());
                pulse.serves_at(server.address());
                Some(gauges)
            }
            Err(error) => {
                warn!("metrics.listen: {address}: {error}; no metrics are served");
                None
            }
        }
    }

    fn new(
        config: &RunConfig,
        step: u64,
        (rank, device): (usize, Device),
        pulse: &Pulse,
    ) -> prometheus::Result<(Gauges, Served)> {
        let labels = HashMap::from([("rank".to_string(), rank.to_string())]);
        let own = Registry::new_custom(None, Some(labels))?;
        let run = Registry::new();
        let gauges = Gauges {
            own: Own::new(&own)?,
            totals: if rank == 0 { Some(Totals::new(config, step, &run)?) } else { None },
        };
        // Under `phalanx train` the launcher looks at the folder.
        let looks = rank == 0 && std::env::var_os(LAUNCHER_VARIABLE).is_none();
        let folder = if looks { Some(FolderGauges::new(&config.run.dir, &run)?) } else { None };
        let process = Process::new(&own, pulse.clone())?;
        let gpu = Gpu::of(device).map(|gpu| GpuGauges::new(&own, gpu)).transpose()?;
        let page = (rank == 0).then(|| Page::of([config.run.dir.display().to_string()]));
        Ok((gauges, Served { own, run, process, gpu, folder, page }))
    }

    /// A step, told or not.
    pub(crate) fn step(&self, report: &StepReport) {
        self.own.step(report);
        if let Some(totals) = &self.totals {
            totals.step(report);
        }
    }

    /// A validation.
    pub(crate) fn eval(&self, report: &EvalReport) {
        if let Some(totals) = &self.totals {
            totals.val_loss.set(report.val_loss);
        }
    }

    /// A checkpoint that is complete.
    pub(crate) fn checkpoint(&self, report: &CheckpointReport) {
        if let Some(totals) = &self.totals {
            totals.checkpoint.observe(report.seconds);
            totals.checkpoint_step.set(report.step as f64);
        }
    }

    /// A spike, and the loss that was one.
    pub(crate) fn rewind(&self, loss: f64) {
        if let Some(totals) = &self.totals {
            totals.spikes.inc();
            totals.spike_loss.set(loss);
        }
    }
}

/// What is served.
struct Served {
    own: Registry,
    run: Registry,
    process: Process,
    gpu: Option<GpuGauges>,
    folder: Option<FolderGauges>,
    /// The live page, on rank 0.
    page: Option<Page>,
}

impl Served {
    fn answer(&self, target: &str) -> Reply {
        match target {
            "/metrics" => {
                self.process.look();
                self.gpu.iter().for_each(GpuGauges::look);
                self.folder.iter().for_each(FolderGauges::look);
                exposition(&[&self.run, &self.own])
            }
            _ => {
                let page = self.page.as_ref().and_then(|page| page.answer(target));
                page.unwrap_or_else(|| Reply::error(404, "there is /metrics, and on rank 0 a page at /"))
            }
        }
    }
}

/// A rank's own part of the steps.
#[derive(Debug)]
struct Own {
    phases: [Histogram; 5],
    step_seconds: Gauge,
}

impl Own {
    fn new(registry: &Registry) -> prometheus::Result<Own> {
        let opts = HistogramOpts::new("phalanx_step_seconds", "Time of each phase of a step on this rank.");
        let phases = HistogramVec::new(opts.buckets(PHASE_BUCKETS.to_vec()), &["phase"])?;
        let names = ["data", "forward", "backward", "reduce", "optimizer"];
        let phases = registered(registry, phases)?;
        let help = "Time of the last step on this rank, without waiting for others.";
        let step_seconds = gauge(registry, "phalanx_rank_step_seconds", help)?;
        Ok(Own { phases: names.map(|name| phases.with_label_values(&[name])), step_seconds })
    }

    fn step(&self, report: &StepReport) {
        let PhaseSeconds { data, forward, backward, reduce, optimizer } = report.phases;
        let seconds = [data, forward, backward, reduce, optimizer];
        self.phases.iter().zip(seconds).for_each(|(phase, seconds)| phase.observe(seconds));
        self.step_seconds.set(report.seconds - reduce);
    }
}

/// Numbers over all ranks.
#[derive(Debug)]
struct Totals {
    loss: Gauge,
    grad_norm: Gauge,
    lr: Gauge,
    step: Gauge,
    tokens: IntCounter,
    tokens_per_second: Gauge,
    mfu: Gauge,
    noise_scale: Gauge,
    epochs: Vec<Gauge>,
    val_loss: Gauge,
    checkpoint: Histogram,
    checkpoint_step: Gauge,
    spikes: IntCounter,
    spike_loss: Gauge,
}

impl Totals {
    /// After `step` updates: whoever looks before the next one is not told that nothing has been seen.
    fn new(config: &RunConfig, step: u64, registry: &Registry) -> prometheus::Result<Totals> {
        let gauge = |name: &str, help: &str| gauge(registry, name, help);
        let not_yet = |name: &str, help: &str| {
            let gauge = gauge(name, help)?;
            gauge.set(f64::NAN); // until there is one
            Ok::<_, prometheus::Error>(gauge)
        };
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help)?);
        let help = "How often each source of the training data has been seen.";
        let epochs =
            registered(registry, GaugeVec::new(Opts::new("phalanx_data_epochs", help), &["source"])?)?;
        let sources = config.data.sources();
        let name = |path: &std::path::Path| path.display().to_string();
        gauge("phalanx_max_steps", "Steps after which the run is over.")?.set(config.max_steps() as f64);
        let opts = HistogramOpts::new(
            "phalanx_checkpoint_seconds",
            "Time from a checkpoint's snapshot to its rename.",
        );
        let totals = Totals {
            loss: not_yet("phalanx_loss", "Training loss of the last step, nats per target.")?,
            grad_norm: not_yet("phalanx_grad_norm", "Global L2 norm of the gradient, before clipping.")?,
            lr: not_yet("phalanx_learning_rate", "Learning rate of the last step.")?,
            step: gauge("phalanx_step", "Updates done.")?,
            tokens: counter(
                "phalanx_tokens_total",
                "Tokens seen by the run, those of earlier starts included.",
            )?,
            tokens_per_second: gauge(
                "phalanx_tokens_per_second",
                "Tokens per second of the last step, over all ranks, validation and saving left out.",
            )?,
            mfu: gauge("phalanx_mfu_ratio", "Model FLOPs utilisation of the last step.")?,
            noise_scale: not_yet(
                "phalanx_noise_scale_tokens",
                "Gradient noise scale, tokens; NaN while it cannot be told.",
            )?,
            epochs: sources.iter().map(|source| epochs.with_label_values(&[&name(&source.path)])).collect(),
            val_loss: not_yet(
                "phalanx_val_loss",
                "Loss of the last validation, nats per target; NaN before the first.",
            )?,
            checkpoint: registered(
                registry,
                Histogram::with_opts(opts.buckets(CHECKPOINT_BUCKETS.to_vec()))?,
            )?,
            checkpoint_step: gauge(
                "phalanx_checkpoint_step",
                "Updates in the last checkpoint of this start; 0 before it.",
            )?,
            spikes: counter("phalanx_spikes_total", "Spikes after which this start of the run went back.")?,
            spike_loss: gauge("phalanx_spike_loss", "Loss of the last of them; 0 without one.")?,
        };
        totals.step.set(step as f64);
        totals.tokens.inc_by(config.batches().tokens_before(step));
        Ok(totals)
    }

    fn step(&self, report: &StepReport) {
        self.loss.set(report.loss);
        self.grad_norm.set(report.grad_norm);
        self.lr.set(report.lr);
        self.step.set(report.step as f64);
        // Behind after a rewind, for a counter cannot go back.
        self.tokens.inc_by(report.tokens.saturating_sub(self.tokens.get()));
        self.tokens_per_second.set(report.tokens_per_second);
        self.mfu.set(report.mfu);
        self.noise_scale.set(report.noise_scale_tokens.unwrap_or(f64::NAN));
        self.epochs.iter().zip(&report.epochs).for_each(|(gauge, epochs)| gauge.set(*epochs));
    }
}

/// The process, when somebody asks.
struct Process {
    pulse: Pulse,
    progress: Gauge,
    resident: Gauge,
    peak: Gauge,
}

impl Process {
    fn new(registry: &Registry, pulse: Pulse) -> prometheus::Result<Process> {
        let gauge = |name: &str, help: &str| gauge(registry, name, help);
        Ok(Process {
            pulse,
            progress: gauge(
                "phalanx_progress_timestamp_seconds",
                "When this rank last got on, by a segment, a micro-step or a collective; Unix time.",
            )?,
            resident: gauge("phalanx_memory_resident_bytes", "Memory of this rank's process.")?,
            peak: gauge("phalanx_memory_peak_bytes", "The most that it has been.")?,
        })
    }

    fn look(&self) {
        self.progress.set(self.pulse.grew_unix_s());
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        };
        for (gauge, key) in [(&self.resident, "VmRSS:"), (&self.peak, "VmHWM:")] {
            gauge.set(kib(key).unwrap_or(f64::NAN) * 1024.0);
        }
    }
}

/// The GPU of a rank that has one, when somebody asks.
struct GpuGauges {
    gpu: Gpu,
    utilization: Gauge,
    temperature: Gauge,
    power: Gauge,
    memory: Gauge,
}

impl GpuGauges {
    fn new(registry: &Registry, gpu: Gpu) -> prometheus::Result<GpuGauges> {
        let gauge = |name: &str, help: &str| gauge(registry, name, help);
        Ok(GpuGauges {
            gpu,
            utilization: gauge(
                "phalanx_gpu_utilization_ratio",
                "Share of the driver's last sampling period in which the GPU computed.",
            )?,
            temperature: gauge("phalanx_gpu_temperature_celsius", "Temperature of the GPU's chip.")?,
            power: gauge("phalanx_gpu_power_watts", "Power that the GPU draws.")?,
            memory: gauge("phalanx_gpu_memory_used_bytes", "Memory of the GPU in use, by all processes.")?,
        })
    }

    fn look(&self) {
        let Health { utilization_ratio, temperature_celsius, power_watts, memory_used_bytes } =
            self.gpu.look();
        for (gauge, value) in [
            (&self.utilization, utilization_ratio),
            (&self.temperature, temperature_celsius),
            (&self.power, power_watts),
            (&self.memory, memory_used_bytes),
        ] {
            gauge.set(value.unwrap_or(f64::NAN));
        }
    }
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Gauge> {
    registered(registry, Gauge::with_opts(Opts::new(name, help))?)
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, what: C) -> prometheus::Result<C> {
    registry.register(Box::new(what.clone()))?;
    Ok(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RunConfig {
        let preset = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.toml");
        configs::load(&preset, &[], &|_| Ok(257)).unwrap()
    }

    fn report(step: u64, loss: f64) -> StepReport {
        StepReport {
            step,
            tokens: step * 1024,
            first_sample: 0,
            loss,
            lr: 3e-3,
            grad_norm: 0.5,
            tokens_per_second: 9000.5,
            mfu: 0.25,
            seconds: 0.5,
            phases: PhaseSeconds { data: 0.001, forward: 0.1, backward: 0.2, reduce: 0.125, optimizer: 0.01 },
            noise_scale_tokens: None,
            epochs: vec![0.125],
        }
    }

    fn shown(page: &Served) -> String {
        let families: Vec<_> = [&page.run, &page.own].iter().flat_map(|registry| registry.gather()).collect();
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap()
    }

    #[test]
    fn rank_0_shows_the_runs_totals_and_every_rank_its_own_numbers() {
        let (gauges, page) = Gauges::new(&config(), 6, (0, Device::Cpu), &Pulse::default()).unwrap();
        let seen = config().batches().tokens_before(6);
        assert!(shown(&page).contains(&format!("phalanx_tokens_total {seen}\n")));
        gauges.step(&report(7, 2.5));
        page.process.look();
        let text = shown(&page);
        for line in [
            "phalanx_loss 2.5",
            "phalanx_learning_rate 0.003",
            "phalanx_tokens_total 7168",
            "phalanx_tokens_per_second 9000.5",
            "phalanx_rank_step_seconds{rank=\"0\"} 0.375",
            "phalanx_step_seconds_bucket{phase=\"reduce\",rank=\"0\",le=\"0.18\"} 1",
            "phalanx_step_seconds_bucket{phase=\"reduce\",rank=\"0\",le=\"0.1\"} 0",
            "phalanx_data_epochs{source=\"data/demo/tokens/train\"} 0.125",
            "phalanx_val_loss NaN",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
        let (gauges, page) = Gauges::new(&config(), 0, (3, Device::Cpu), &Pulse::default()).unwrap();
        gauges.step(&report(7, 2.5));
        let text = shown(&page);
        assert!(
            text.contains("phalanx_rank_step_seconds{rank=\"3\"} 0.375")
                && !text.contains("phalanx_loss")
                && !text.contains("phalanx_gpu")
        );
    }

    #[test]
    fn tokens_never_count_back_and_a_loss_that_is_no_number_is_shown_as_one() {
        let (gauges, page) = Gauges::new(&config(), 0, (0, Device::Cpu), &Pulse::default()).unwrap();
        gauges.step(&report(7, 2.5));
        gauges.rewind(80.0);
        gauges.step(&report(5, f64::NAN));
        let text = shown(&page);
        for line in
            ["phalanx_tokens_total 7168", "phalanx_step 5", "phalanx_spikes_total 1", "phalanx_loss NaN"]
        {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn showing_a_step_costs_less_than_a_thousandth_of_a_step_of_a_twentieth_of_a_second() {
        let (gauges, _) = Gauges::new(&config(), 0, (0, Device::Cpu), &Pulse::default()).unwrap();
        let (report, began) = (report(7, 2.5), std::time::Instant::now());
        for _ in 0..1000 {
            gauges.step(&report);
        }
        let each = began.elapsed() / 1000;
        assert!(each < std::time::Duration::from_micros(50), "{each:?}");
    }

    #[test]
    fn what_memory_the_process_has_is_looked_up_when_somebody_asks() {
        let (_, page) = Gauges::new(&config(), 0, (0, Device::Cpu), &Pulse::default()).unwrap();
        page.process.look();
        assert!(page.process.resident.get() > 1e6 && page.process.peak.get() >= page.process.resident.get());
        let shown = |path: &str| format!("{:?}", page.answer(path));
        assert!(shown("/metrics").contains("status: 200") && shown("/other").contains("status: 404"));
    }
}
