//! Cross-entropy through a tied head, forward and backward in one, a chunk of rows at a time: the full
//! matrix of logits never exists. Knows no model.

use crate::kernels::{self, cross_entropy};
use crate::linear::{has_products, wide};
use crate::shim::HeadLoss;
use tch::{Kind, Tensor};

/// What writes a chunk's losses and gradients.
type Kernel<'a> = &'a dyn Fn(cross_entropy::Input<'_>) -> Tensor;

/// The head: hidden states against the rows of the token embedding.
#[derive(Debug)]
pub struct Head<'a> {
    /// `[V padded, C]`, fp32 or bf16 as the hidden states; only the first `vocab_size` rows take part.
    pub weight: &'a Tensor,
    /// Rows that are real tokens, V.
    pub vocab_size: i64,
    /// What is added to the logits, of a masked model's head.
    pub bias: Option<Bias<'a>>,
}

/// A head's bias.
#[derive(Debug, Clone, Copy)]
pub struct Bias<'a> {
    /// `[V padded]`, fp32 or bf16.
    pub values: &'a Tensor,
    /// What its gradient is added to, `[V]` fp32, where there is one.
    pub grad: Option<&'a Tensor>,
}

impl Head<'_> {
    fn rows(&self) -> Tensor {
        self.weight.detach().narrow(0, 0, self.vocab_size)
    }

    fn chunk(&self) -> i64 {
        let on_gpu = self.weight.device().is_cuda();
        let elements = configs::logits_at_once(on_gpu, has_products(self.weight)) as i64;
        (elements / self.vocab_size).max(1)
    }

    /// Logits of hidden states `[N, C]`: `[N, V]` fp32, padded ids left out.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.matmul(&self.rows().transpose(0, 1)).to_kind(Kind::Float);
        match &self.bias {
            Some(bias) => logits + bias.values.detach().narrow(0, 0, self.vocab_size).to_kind(Kind::Float),
            None => logits,
        }
    }

    /// What `body` makes of hidden states and the head, both widened once where that is how they are multiplied.
    fn widened<T>(&self, hidden: &Tensor, body: impl FnOnce(&Head<'_>, &Tensor) -> T) -> T {
        if has_products(hidden) {
            return body(self, hidden);
        }
        let widened = |x: &Tensor| wide(&x.detach()).unwrap_or_else(|error| panic!("the head: {error}"));
        let weight = widened(self.weight);
        body(&Head { weight: &weight, vocab_size: self.vocab_size, bias: self.bias }, &widened(hidden))
    }

    /// The sum of cross-entropies in nats of hidden states `[N, C]` against targets `[N]` i64.
    pub fn loss(&self, hidden: &Tensor, targets: &Tensor) -> f64 {
        self.widened(hidden, |head, hidden| head.loss_as_it_is(hidden, targets))
    }

    fn loss_as_it_is(&self, hidden: &Tensor, targets: &Tensor) -> f64 {
        settle_exponentials();
        let mut sum = Tensor::zeros([], (Kind::Double, hidden.device()));
        for (hidden, targets) in hidden.split(self.chunk(), 0).iter().zip(targets.split(self.chunk(), 0)) {
            let logits = self.logits(hidden);
            let picked = logits.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
            sum += (logits.logsumexp([1], false) - picked).sum(Kind::Double);
        }
        sum.double_value(&[])
    }

    /// The log-probability of each target, `[N]` fp32 in nats, and whether it is the likeliest token, `[N]` bool,
    /// for hidden states `[N, C]` against targets `[N]` i64.
    pub fn scores(&self, hidden: &Tensor, targets: &Tensor) -> (Tensor, Tensor) {
        self.widened(hidden, |head, hidden| head.scores_as_it_is(hidden, targets))
    }

    fn scores_as_it_is(&self, hidden: &Tensor, targets: &Tensor) -> (Tensor, Tensor) {
        settle_exponentials();
        let (mut logs, mut likeliest) = (Vec::new(), Vec::new());
        for (hidden, targets) in hidden.split(self.chunk(), 0).iter().zip(targets.split(self.chunk(), 0)) {
            let logits = self.logits(hidden);
            let picked = logits.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
            logs.push(picked - logits.logsumexp([1], false));
            likeliest.push(logits.argmax(1, false).eq_tensor(&targets));
        }
        (Tensor::cat(&logs, 0), Tensor::cat(&likeliest, 0))
    }

    /// As [`Head::loss`], and the gradients of that sum times `scale`: that of the hidden states
    /// `[N, C]` is returned, that of the weight is added to `weight_grad`, `[V padded, C]` fp32, that of the
    /// bias to its own. The sum is a scalar in f64 on the device, so that nobody has to wait for it here.
    pub fn loss_and_grad(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        weight_grad: &Tensor,
        scale: f64,
    ) -> (Tensor, Tensor) {
        if self.bias.is_none() && has_products(hidden) {
            return self.products(hidden, targets, weight_grad, scale);
        }
        let kernel: Kernel<'_> = &|input| match cross_entropy::loss_and_grad(input) {
            Ok(losses) => losses.expect("the kernel was there just now"),
            Err(error) => panic!("the head's loss: {error}"),
        };
        if kernels::there(kernels::CROSS_ENTROPY, hidden.device()) {
            self.by_kernel(hidden, targets, weight_grad, scale, kernel)
        } else {
            let (sum, grad) =
                self.widened(hidden, |head, hidden| head.by_torch(hidden, targets, weight_grad, scale));
            (sum, grad.to_kind(hidden.kind()))
        }
    }

    /// By a kernel that writes gradients over logits in their precision. Padded ids take part in the products,
    /// whose sides are then multiples of what matrix units like, with gradients of zero.
    fn by_kernel(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        weight_grad: &Tensor,
        scale: f64,
        kernel: Kernel<'_>,
    ) -> (Tensor, Tensor) {
        let weight = self.weight.detach();
        let mut weight_grad = weight_grad.shallow_clone();
        let hidden_grad = hidden.empty_like();
        let (mut sum, mut start) = (Tensor::zeros([], (Kind::Double, hidden.device())), 0);
        let bias = self.bias.map(|bias| bias.values.detach().to_kind(hidden.kind()));
        let targets = targets.contiguous();
        for (hidden, targets) in hidden.split(self.chunk(), 0).iter().zip(targets.split(self.chunk(), 0)) {
            let logits = hidden.matmul(&weight.transpose(0, 1));
            let losses = kernel(cross_entropy::Input {
                logits: &logits,
                bias: bias.as_ref(),
                targets: &targets,
                vocab_size: self.vocab_size,
                scale,
            });
            sum += losses.sum(Kind::Double);
            let logits_grad = logits;
            self.add_bias_grad(&logits_grad.narrow(1, 0, self.vocab_size));
            let rows = hidden.size()[0];
            let _ = logits_grad.mm_out(&hidden_grad.narrow(0, start, rows), &weight);
            add_product(&mut weight_grad, &logits_grad, hidden);
            start += rows;
        }
        (sum, hidden_grad)
    }

    fn by_torch(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        weight_grad: &Tensor,
        scale: f64,
    ) -> (Tensor, Tensor) {
        settle_exponentials();
        let weight = self.rows();
        let mut weight_grad = weight_grad.narrow(0, 0, self.vocab_size);
        let hidden_grad = hidden.empty_like();
        let (mut sum, mut start) = (Tensor::zeros([], (Kind::Double, hidden.device())), 0);
        for (hidden, targets) in hidden.split(self.chunk(), 0).iter().zip(targets.split(self.chunk(), 0)) {
            let logits = self.logits(hidden);
            let targets = targets.unsqueeze(1);
            let lse = logits.logsumexp([1], true);
            sum += (&lse - logits.gather(1, &targets, false)).sum(Kind::Double);
            // d loss / d logits = softmax - onehot, written over the logits.
            let mut logits_grad = logits;
            let _ = logits_grad.subtract_(&lse).exp_();
            let _ = logits_grad.scatter_add_(1, &targets, &targets.full_like(-1.0).to_kind(Kind::Float));
            let _ = logits_grad.g_mul_scalar_(scale);
            self.add_bias_grad(&logits_grad);
            let logits_grad = logits_grad.to_kind(hidden.kind());
            let rows = hidden.size()[0];
            let _ = logits_grad.mm_out(&hidden_grad.narrow(0, start, rows), &weight);
            add_product(&mut weight_grad, &logits_grad, hidden);
            start += rows;
        }
        (sum, hidden_grad)
    }

    fn add_bias_grad(&self, logits_grad: &Tensor) {
        if let Some(bias_grad) = self.bias.as_ref().and_then(|bias| bias.grad) {
            let rows: &[i64] = &[0];
            let sum = logits_grad.sum_dim_intlist(rows, false, Kind::Float);
            let _ = bias_grad.shallow_clone().g_add_(&sum);
        }
    }

    /// The same by the CPU's matrix unit: logits are bf16, and become their gradients where they lie.
    fn products(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        weight_grad: &Tensor,
        scale: f64,
    ) -> (Tensor, Tensor) {
        let (hidden, head) = (hidden.contiguous(), self.weight.detach());
        let hidden_grad = hidden.empty_like();
        let chunk = self.chunk().min(hidden.size()[0]);
        let logits = Tensor::empty([chunk, head.size()[0]], (hidden.kind(), hidden.device()));
        let (mut nats, mut start) = (0.0, 0);
        for (hidden, targets) in hidden.split(chunk, 0).iter().zip(targets.contiguous().split(chunk, 0)) {
            let rows = hidden.size()[0];
            let loss = HeadLoss {
                hidden,
                head: &head,
                targets: &targets,
                vocab_size: self.vocab_size,
                scale,
                logits: &logits.narrow(0, 0, rows),
                head_grad: weight_grad,
                hidden_grad: &hidden_grad.narrow(0, start, rows),
            };
            nats += loss.run().unwrap_or_else(|error| panic!("the head's loss: {error}"));
            start += rows;
        }
        (Tensor::from(nats), hidden_grad)
    }
}

/// MKL chooses the code of a function at its first call, and of threads that make it together one may get code of
/// low accuracy, with other bits than in every later call (pytorch/pytorch#188792). So one number goes first, alone.
fn settle_exponentials() {
    let _ = Tensor::zeros([1, 1], (Kind::Float, tch::Device::Cpu)).logsumexp([1], false);
}

/// Adds the gradient of a weight, fp32, given those of the products `[N, V]` and their rows `[N, C]`.
fn add_product(weight_grad: &mut Tensor, logits_grad: &Tensor, hidden: &Tensor) {
    if hidden.kind() == Kind::Float {
        let _ = weight_grad.addmm_(&logits_grad.transpose(0, 1), hidden);
    } else {
        let _ = weight_grad.g_add_(&logits_grad.transpose(0, 1).matmul(hidden));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_fused_loss_and_its_gradients_equal_autograd() {
        let (n, c, v, padded) = (37, 24, 50, 128);
        let options = (Kind::Float, Device::Cpu);
        let hidden = Tensor::randn([n, c], options).set_requires_grad(true);
        let weight = Tensor::randn([padded, c], options).set_requires_grad(true);
        let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
        let logits = hidden.matmul(&weight.narrow(0, 0, v).transpose(0, 1));
        let expected = logits.log_softmax(1, Kind::Float).g_nll_loss::<Tensor>(
            &targets,
            None,
            tch::Reduction::Sum,
            -100,
        );
        (&expected * 0.5).backward();

        let head = Head { weight: &weight, vocab_size: v, bias: None };
        let weight_grad = Tensor::zeros([padded, c], options);
        let (loss, hidden_grad) = head.loss_and_grad(&hidden.detach(), &targets, &weight_grad, 0.5);
        let loss = loss.double_value(&[]);
        assert!((loss / expected.double_value(&[]) - 1.0).abs() < 1e-6);
        assert!((head.loss(&hidden.detach(), &targets) - loss).abs() < 1e-4);
        assert!((hidden_grad - hidden.grad()).abs().max().double_value(&[]) < 1e-5);
        assert!((weight_grad - weight.grad()).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn a_bias_moves_the_logits_and_has_their_summed_gradient() {
        let (n, c, v, padded) = (11, 8, 30, 128);
        let options = (Kind::Float, Device::Cpu);
        let hidden = Tensor::randn([n, c], options);
        let weight = Tensor::randn([padded, c], options);
        let values = Tensor::randn([padded], options).set_requires_grad(true);
        let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
        let logits = hidden.matmul(&weight.narrow(0, 0, v).transpose(0, 1)) + values.narrow(0, 0, v);
        let expected = logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0);
        (&expected * 0.5).backward();

        let grad = Tensor::zeros([v], options);
        let bias = Some(Bias { values: &values, grad: Some(&grad) });
        let head = Head { weight: &weight, vocab_size: v, bias };
        let (loss, _) = head.loss_and_grad(&hidden, &targets, &Tensor::zeros([padded, c], options), 0.5);
        let loss = loss.double_value(&[]);
        assert!((loss / expected.double_value(&[]) - 1.0).abs() < 1e-6);
        assert!((head.loss(&hidden, &targets) / loss - 1.0).abs() < 1e-6);
        assert!((grad - values.grad().narrow(0, 0, v)).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn in_bf16_the_loss_is_that_of_rounded_logits_and_the_weight_gradient_stays_fp32() {
        let (n, c, v) = (37, 24, 50);
        let options = (Kind::Float, Device::Cpu);
        let round = |x: Tensor| x.to_kind(Kind::BFloat16);
        let (hidden, weight) = (round(Tensor::randn([n, c], options)), round(Tensor::randn([v, c], options)));
        let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
        let both = |hidden: &Tensor, weight: &Tensor| {
            let grad = Tensor::zeros([v, c], options);
            let head = Head { weight, vocab_size: v, bias: None };
            let (loss, hidden_grad) = head.loss_and_grad(hidden, &targets, &grad, 1.0);
            (loss.double_value(&[]), hidden_grad.to_kind(Kind::Float), grad)
        };
        let (loss, hidden_grad, weight_grad) = both(&hidden, &weight);
        let exact = both(&hidden.to_kind(Kind::Float), &weight.to_kind(Kind::Float));
        assert!((loss / exact.0 - 1.0).abs() < 1e-2, "{loss} against {}", exact.0);
        let off = |a: &Tensor, b: &Tensor| ((a - b).norm() / b.norm()).double_value(&[]);
        assert!(off(&hidden_grad, &exact.1) < 2e-2);
        assert!(off(&weight_grad, &exact.2) < 2e-2);
    }

    #[test]
    fn by_a_kernel_the_loss_and_all_gradients_are_those_of_libtorchs_operations() {
        let (n, c, v, padded) = (37, 24, 50, 128);
        for (kind, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
            let (hidden, weight, values) = (random(&[n, c]), random(&[padded, c]), random(&[padded]));
            let targets = Tensor::randint(v, [n], (Kind::Int64, Device::Cpu));
            let kernel: Kernel<'_> = &cross_entropy::by_torch::loss_and_grad;
            let both = [Some(kernel), None].map(|kernel| {
                let [grad, bias_grad] = [vec![padded, c], vec![v]]
                    .map(|size| Tensor::zeros(size.as_slice(), (Kind::Float, Device::Cpu)));
                let bias = Some(Bias { values: &values, grad: Some(&bias_grad) });
                let head = Head { weight: &weight, vocab_size: v, bias };
                let (loss, hidden_grad) = match kernel {
                    Some(kernel) => head.by_kernel(&hidden, &targets, &grad, 0.5, kernel),
                    None => head.by_torch(&hidden, &targets, &grad, 0.5),
                };
                [loss, hidden_grad, grad, bias_grad].map(|tensor| tensor.to_kind(Kind::Double))
            });
            for (got, expected) in both[0].iter().zip(&both[1]) {
                let off = ((got - expected).norm() / expected.norm()).double_value(&[]);
                assert!(off < limit, "{kind:?}: {off}");
            }
        }
    }

    #[test]
    fn chunks_of_rows_change_nothing_but_the_order_of_sums() {
        // A vocabulary so large that the rows are taken in several chunks.
        let (n, c, v) = (5, 3, configs::logits_at_once(false, false) as i64 / 2);
        let hidden = Tensor::randn([n, c], (Kind::Float, Device::Cpu));
        let weight = Tensor::randn([v, c], (Kind::Float, Device::Cpu));
        let targets = Tensor::from_slice(&[0i64, 1, v - 1, 7, v / 2]);
        let head = Head { weight: &weight, vocab_size: v, bias: None };
        let logits = head.logits(&hidden).to_kind(Kind::Double);
        let picked = logits.gather(1, &targets.unsqueeze(1), false).squeeze_dim(1);
        let expected = (logits.logsumexp([1], false) - picked).sum(Kind::Double).double_value(&[]);
        assert!((head.loss(&hidden, &targets) / expected - 1.0).abs() < 1e-6);
    }
}
