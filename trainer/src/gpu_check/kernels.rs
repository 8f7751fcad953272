//! The kernels of our own and attention's patterns on a device, against float64 on the CPU. Where no GPU is, what
//! they fall back to takes their place: a trial of the check.

use super::compare::{farthest, relative_distance};
use super::report::{Check, Figure};
use crate::error::TrainError;
use configs::{Documents, ModelConfig, OptimConfig, Pattern};
use ops::kernels::{cross_entropy, gelu, norm};
use ops::{AdamWSlice, AdamWStep, Dropout, Moments, OpsError, Squares};
use tch::{Device, Kind, Tensor};

/// What results may differ by from float64: fp32, and bf16, whose inputs are the same and whose results are
/// rounded.
const LIMITS: [(&str, Kind, f64); 2] = [("fp32", Kind::Float, 1e-5), ("bf16", Kind::BFloat16, 2e-2)];

/// All of these checks.
pub(super) fn checks(device: Device) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, kind, limit) in LIMITS {
        let case = Case { device, kind, limit };
        let mut run = |what: &str, figures: fn(Case) -> Result<Vec<Figure>, TrainError>| {
            checks.push(Check::run(&format!("{what} in {name} is float64's"), || figures(case)));
        };
        run("residual and layer norm", norms);
        run("bias and GELU", gelus);
        run("cross-entropy", losses);
        run("attention by pattern", patterns);
    }
    checks.push(Check::run("AdamW and the norm have the CPU's bits", || updates(device)));
    checks.push(Check::run("dropout has the CPU's bits", || masks(device)));
    checks
}

#[derive(Clone, Copy)]
struct Case {
    device: Device,
    kind: Kind,
    limit: f64,
}

impl Case {
    /// Random numbers of the kind: on the device, and as leaves in float64.
    fn pair(self, size: &[i64]) -> (Tensor, Tensor) {
        let values = Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(self.kind);
        (values.to_device(self.device), values.to_kind(Kind::Double).set_requires_grad(true))
    }

    fn sums(self, numel: i64) -> Tensor {
        Tensor::zeros([numel], (Kind::Float, self.device))
    }

    fn figure(self, name: &str, got: &Tensor, exact: &Tensor) -> Figure {
        Figure::at_most(name, relative_distance(got, exact), self.limit)
    }
}

/// What a kernel gave; on the CPU what is there in its place. A GPU has to have it.
fn made<T>(
    device: Device,
    kernel: Result<Option<T>, OpsError>,
    by_torch: impl FnOnce() -> T,
) -> Result<T, TrainError> {
    match kernel? {
        Some(made) => Ok(made),
        None if device.is_cuda() => {
            Err(OpsError::Torch("the kernel is not to be had; see the log".into()).into())
        }
        None => Ok(by_torch()),
    }
}

fn norms(case: Case) -> Result<Vec<Figure>, TrainError> {
    let (size, c) = ([37, 768], 768);
    let ((x, x64), (y, y64)) = (case.pair(&size), case.pair(&size));
    let ((gamma, gamma64), (beta, beta64)) = (case.pair(&[c]), case.pair(&[c]));
    let ((out, out64), (beside, beside64)) = (case.pair(&size), case.pair(&size));
    let sum = &x64 + &y64;
    let exact = sum.layer_norm([c], Some(&gamma64), Some(&beta64), 1e-5, false);
    ((&exact * out64.detach()).sum(Kind::Double) + (&sum * beside64.detach()).sum(Kind::Double)).backward();

    let input = norm::Input { x: &x, y: Some(&y), gamma: &gamma, beta: &beta, eps: 1e-5 };
    let normed = made(case.device, norm::forward(input), || norm::by_torch::forward(input))?;
    let (gammas, betas) = (case.sums(c), case.sums(c));
    let arrived = norm::Arrived { out: &out, sum: Some(&beside), gamma: &gammas, beta: &betas };
    let kernel = norm::backward(&gamma, &normed.kept, arrived);
    let grad = made(case.device, kernel, || norm::by_torch::backward(&gamma, &normed.kept, arrived))?;
    Ok(vec![
        case.figure("sum", &normed.kept.sum, &sum),
        case.figure("output", &normed.out, &exact),
        case.figure("gradient", &grad, &x64.grad()),
        case.figure("of the gain", &gammas, &gamma64.grad()),
        case.figure("of the bias", &betas, &beta64.grad()),
    ])
}

fn gelus(case: Case) -> Result<Vec<Figure>, TrainError> {
    let mut figures = Vec::new();
    for (by_tanh, name) in [(true, "tanh"), (false, "none")] {
        let ((x, x64), (bias, bias64)) = (case.pair(&[37, 3072]), case.pair(&[3072]));
        let (grad, grad64) = case.pair(&[37, 3072]);
        let exact = (&x64 + &bias64).gelu(name);
        (&exact * grad64.detach()).sum(Kind::Double).backward();
        let (input, sums) = (gelu::Input { x: &x, bias: &bias, by_tanh }, case.sums(3072));
        let out = made(case.device, gelu::forward(input), || gelu::by_torch::forward(input))?;
        let kernel = gelu::backward(input, &grad, &sums);
        let x_grad = made(case.device, kernel, || gelu::by_torch::backward(input, &grad, &sums))?;
        figures.push(case.figure(&format!("{name}: output"), &out, &exact));
        figures.push(case.figure("gradient", &x_grad, &x64.grad()));
        figures.push(case.figure("of the bias", &sums, &bias64.grad()));
    }
    Ok(figures)
}

fn losses(case: Case) -> Result<Vec<Figure>, TrainError> {
    let (rows, v, padded) = (19, 50_257, 50_304);
    let (logits, exact) = case.pair(&[rows, padded]);
    let targets = Tensor::randint(v, [rows], (Kind::Int64, Device::Cpu));
    let real = exact.narrow(1, 0, v);
    let expected = real.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::None, -100, 0.0);
    (expected.sum(Kind::Double) * 0.5).backward();
    let targets = targets.to_device(case.device);
    let input =
        cross_entropy::Input { logits: &logits, bias: None, targets: &targets, vocab_size: v, scale: 0.5 };
    let kernel = cross_entropy::loss_and_grad(input);
    let got = made(case.device, kernel, || cross_entropy::by_torch::loss_and_grad(input))?;
    Ok(vec![case.figure("losses", &got, &expected), case.figure("gradient", &logits, &exact.grad())])
}

/// Output and gradients of attention, with and without documents, of more than one block of queries; float64's by
/// all pairs.
fn patterns(case: Case) -> Result<Vec<Figure>, TrainError> {
    let (t, mut figures) = (300usize, Vec::new());
    let all_pairs = Tensor::ones([2, 2, t as i64, t as i64], (Kind::Double, Device::Cpu));
    let ends = |i: usize| i % 61 == 17;
    let documents = [Documents::beginning(t, ends), Documents::beginning(t, |_| false)];
    for text in ["dense", "banded:64", "banded:280", "strided:16", "fixed:32,4", "bidirectional"] {
        let pattern: Pattern = text.parse().expect("a pattern");
        for documents in [None, Some(documents.as_slice())] {
            let inputs: Vec<(Tensor, Tensor)> = (0..4).map(|_| case.pair(&[2, 2, t as i64, 64])).collect();
            let exact: Vec<Tensor> = inputs.iter().map(|(_, exact)| exact.shallow_clone()).collect();
            let leaves: Vec<Tensor> =
                inputs.iter().map(|(x, _)| x.detach().set_requires_grad(true)).collect();
            let [q, k, v, _] = &exact[..] else { panic!("four tensors") };
            let expected = ops::attention_with_mask(q, k, v, pattern, documents, &all_pairs);
            let got = ops::attention(&leaves[0], &leaves[1], &leaves[2], pattern, documents);
            ops::backward(&expected, &exact[3].detach())?;
            ops::backward(&got, &leaves[3].detach())?;
            let within = if documents.is_some() { " in documents" } else { "" };
            let gradients = leaves.iter().zip(&exact).take(3);
            let gradients = gradients.map(|(leaf, exact)| relative_distance(&leaf.grad(), &exact.grad()));
            let off = farthest(gradients.chain([relative_distance(&got, &expected)]));
            figures.push(Figure::at_most(&format!("{text}{within}"), off, case.limit));
        }
    }
    Ok(figures)
}

fn updates(device: Device) -> Result<Vec<Figure>, TrainError> {
    let model = ModelConfig { n_layer: 1, n_head: 2, n_embd: 128, ..ModelConfig::default() };
    let spec = configs::segments(&model).swap_remove(2);
    let optim = OptimConfig { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 };
    let random = || Tensor::randn([spec.numel as i64], (Kind::Float, Device::Cpu));
    let (param, grads) = (random(), [random(), random(), random()]);
    let run = |device: Device| -> Result<([Tensor; 4], f64), TrainError> {
        let param = param.to_device(device).copy();
        let weights = param.to_kind(Kind::BFloat16);
        let (mut moments, mut squares) = (Moments::zeros(spec.numel, device)?, Squares::default());
        for (grad, t) in grads.iter().zip(1..) {
            let grad = &grad.to_device(device).copy();
            squares.add(grad)?;
            let (range, weights) = (0..spec.numel, Some(&weights));
            let mut slice =
                AdamWSlice { spec: &spec, range, param: &param, grad, moments: &mut moments, weights };
            ops::adamw(&mut slice, &optim, AdamWStep { lr: optim.lr, t, grad_scale: 0.7 })?;
        }
        Ok(([param, weights, moments.exp_avg, moments.exp_avg_sq], squares.read()?.value()))
    };
    let ((got, squares), (expected, exact)) = (run(device)?, run(Device::Cpu)?);
    let names = ["parameters", "weights", "mean", "mean square"];
    let mut figures: Vec<Figure> = names
        .iter()
        .zip(got.iter().zip(&expected))
        .map(|(name, (got, expected))| Figure::at_most(name, relative_distance(got, expected), 0.0))
        .collect();
    figures.push(Figure::at_most("norm", (squares - exact).abs(), 0.0));
    Ok(figures)
}

fn masks(device: Device) -> Result<Vec<Figure>, TrainError> {
    let dropout = Dropout { p: 0.1, seed: 1337, step: 41, first_sample: 5_000_000_000 };
    let figure = |(name, kind): (&str, Kind)| {
        let mask = |device| dropout.mask(3, 1, &Tensor::zeros([4, 33, 257], (kind, device)));
        let distance = relative_distance(&mask(device), &mask(Device::Cpu));
        Figure::at_most(name, distance, 0.0)
    };
    Ok([("fp32", Kind::Float), ("bf16", Kind::BFloat16)].map(figure).to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_the_cpu_in_the_place_of_a_gpu_every_check_holds() {
        tch::manual_seed(5);
        let checks = checks(Device::Cpu);
        assert_eq!(checks.len(), 10);
        for check in checks {
            assert!(check.held && !check.figures.is_empty(), "{check:?}");
        }
    }

    #[test]
    fn a_kernel_that_a_gpu_does_not_take_is_no_check_held() {
        let error = made(Device::Cuda(0), Ok(None), || 1).unwrap_err().to_string();
        assert!(error.contains("not to be had"), "{error}");
        assert_eq!(made(Device::Cpu, Ok(None), || 1).unwrap(), 1);
    }
}
