//! How a step's gradient comes about: forward and backward segment by segment, each segment's weights
//! arriving just before it and its gradient leaving as soon as its backward returns.
//! Knows what a model computes and where weights and gradients are; knows no schedule, no files and no
//! metrics.

use crate::error::TrainError;
use crate::finetune::TaskBatch;
use crate::gradients::{Gradients, OwnSquares};
use crate::masked::MaskedLoss;
use crate::model::{Gpt, POSITIONS, Pass, TOKENS, embed_backward, rows_backward};
use crate::pulse::Pulse;
use crate::timing::{Phase, Timing};
use crate::weights::Parameters;
use configs::{Documents, Doing, Recompute, Shard};
use ops::{Dropout, ExactSum, Head};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

/// One pass's tokens: `inputs` and `targets`, `[B, T]` i64 each.
#[derive(Debug)]
pub struct MicroBatch {
    /// What the model reads.
    pub inputs: Tensor,
    /// What it must predict: the inputs, one position on; or `[n]`, of the rows that are picked.
    pub targets: Tensor,
    /// The positions that have a target, `[n]` i64, as rows of `[B T]`; none where all have one.
    pub target_rows: Option<Tensor>,
    /// The text that each token is of, `[B, T]` i64; none where all are of the first.
    pub types: Option<Tensor>,
    /// What a task asks beside the targets.
    pub task: Option<TaskBatch>,
    /// What is dropped, in training.
    pub dropout: Option<Dropout>,
    /// The documents of each row, where attention keeps to them.
    pub documents: Option<Vec<Documents>>,
}

impl MicroBatch {
    /// From rows of T + 1 consecutive tokens, without dropout.
    pub fn from_rows(tokens: &[i64], row_len: usize, device: Device) -> MicroBatch {
        let rows = ops::device::sent(&Tensor::from_slice(tokens).view([-1, row_len as i64]), device);
        let t = row_len as i64 - 1;
        let (inputs, targets) = (rows.narrow(1, 0, t).contiguous(), rows.narrow(1, 1, t).contiguous());
        MicroBatch::new(inputs, targets)
    }

    /// Of inputs and targets, and nothing else.
    pub(crate) fn new(inputs: Tensor, targets: Tensor) -> MicroBatch {
        MicroBatch {
            inputs,
            targets,
            target_rows: None,
            types: None,
            task: None,
            dropout: None,
            documents: None,
        }
    }

    /// Keeps attention within documents, given the rows it was made from and the token that stands after
    /// each document; without one, all of a row is one document.
    pub fn keep_to_documents(&mut self, tokens: &[i64], row_len: usize, end_of_text: Option<i64>) {
        let of_row = |row: &[i64], end: i64| Documents::beginning(row_len - 1, |i| row[i - 1] == end);
        self.documents = end_of_text.map(|end| tokens.chunks(row_len).map(|row| of_row(row, end)).collect());
    }

    /// Of hidden states `[B, T, C]` those that have a target, `[n, C]`.
    fn picked(&self, hidden: &Tensor) -> Tensor {
        let rows = hidden.flatten(0, 1);
        self.target_rows.as_ref().map_or(rows.shallow_clone(), |picked| rows.index_select(0, picked))
    }

    fn pass(&self) -> Pass<'_> {
        Pass {
            dropout: self.dropout.as_ref(),
            documents: self.documents.as_deref(),
            types: self.types.as_ref(),
        }
    }
}

/// A model with its weights and gradients, and the way to run it.
pub struct Engine<'a> {
    model: Gpt,
    parameters: Parameters<'a>,
    gradients: Gradients<'a>,
    recompute: bool,
    /// Each micro-batch's, a scalar on the device: read when the step is complete.
    losses: Vec<Tensor>,
    pulse: Pulse,
}

/// A step's gradient, complete: each rank holds its slices, or all of it.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// The summed loss of each of this rank's micro-batches, in nats.
    pub losses: Vec<f64>,
    /// The sum of the squares of this rank's slices, before clipping.
    pub squares: ExactSum,
    /// The same of the parts of the batch before they were added up, if asked for.
    pub own: Option<OwnSquares>,
}

impl Gradient {
    /// That of nothing.
    pub(crate) fn none() -> Gradient {
        Gradient { losses: Vec::new(), squares: ExactSum::default(), own: None }
    }

    /// The sum of this rank's losses, in nats.
    pub fn nats(&self) -> ExactSum {
        let mut sum = ExactSum::default();
        self.losses.iter().for_each(|&loss| sum.add(loss));
        sum
    }
}

/// What forward leaves for backward.
struct Saved {
    /// Each block's input and the last one's output, `[B, T, C]`; leaves, at which graphs end.
    inputs: Vec<Tensor>,
    /// Each block's output with its graph; none where it is computed again.
    outputs: Vec<Option<Tensor>>,
    /// The rows of the tokens, a leaf, where the embedding is computed again.
    rows: Option<Tensor>,
    /// The dropout of the embedding.
    mask: Option<Tensor>,
}

impl<'a> Engine<'a> {
    /// Runs `model` on `parameters`.
    pub fn new(
        model: Gpt,
        parameters: Parameters<'a>,
        gradients: Gradients<'a>,
        recompute: Recompute,
    ) -> Engine<'a> {
        // What is saved for backward would keep gathered weights alive.
        let recompute = recompute == Recompute::Full || parameters.shard() == Shard::Parameters;
        Engine { model, parameters, gradients, recompute, losses: Vec::new(), pulse: Pulse::default() }
    }

    /// From now on what it does shows in this pulse.
    pub(crate) fn show(&mut self, pulse: &Pulse) {
        self.pulse = pulse.clone();
        self.parameters.show(pulse);
        self.gradients.show(pulse);
    }

    /// Where what it does shows.
    pub(crate) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The model.
    pub fn model(&self) -> &Gpt {
        &self.model
    }

    /// The weights.
    pub fn parameters(&self) -> &Parameters<'a> {
        &self.parameters
    }

    /// The weights, to be filled, moved and gathered.
    pub fn parameters_mut(&mut self) -> &mut Parameters<'a> {
        &mut self.parameters
    }

    /// The model and its weights, for what runs it in a way of its own.
    pub(crate) fn parts_mut(&mut self) -> (&Gpt, &mut Parameters<'a>) {
        (&self.model, &mut self.parameters)
    }

    /// The gradients, after [`Engine::finish`].
    pub fn gradients(&self) -> &Gradients<'a> {
        &self.gradients
    }

    /// Begins a step of `micro_steps` micro-batches on this rank.
    pub fn begin(&mut self, micro_steps: u64, own_squares: bool) {
        self.losses.clear();
        self.gradients.begin(micro_steps, own_squares);
    }

    /// Adds the gradient of the micro-batch's summed loss times `scale`, and of its task's loss if it has one;
    /// the loss of such a micro-batch is that sum. Each segment's gradient leaves once it is complete.
    /// Collective, as is everything that follows, in the same order on all ranks.
    ///
    /// # Errors
    /// What libtorch or the communicator says.
    pub fn add(&mut self, batch: &MicroBatch, scale: f64, timing: &mut Timing) -> Result<(), TrainError> {
        let started = timing.now();
        let mut saved = self.forward(batch)?;
        let started = timing.add(Phase::Forward, started);
        timing.shift(Phase::Forward, Phase::Reduce, self.parameters.take_waited());
        let grad = self.head(batch, &saved.inputs[self.model.config().n_layer], scale)?;
        let grad = self.blocks_backward(batch, &mut saved, grad)?;
        self.embedding_backward(batch, &saved, grad)?;
        self.gradients.next_leaf();
        timing.add(Phase::Backward, started);
        let waited = self.parameters.take_waited() + self.gradients.take_waited();
        timing.shift(Phase::Backward, Phase::Reduce, waited);
        Ok(())
    }

    /// Each segment is differentiated by autograd inside, by this engine outside: its input is a leaf, so
    /// that the graph ends at the segment's edge.
    fn forward(&mut self, batch: &MicroBatch) -> Result<Saved, TrainError> {
        let (n_layer, pass) = (self.model.config().n_layer, batch.pass());
        let leaf = |x: &Tensor| x.detach().set_requires_grad(true);
        let (rows, mut x, mask) = tch::no_grad(|| self.embed(batch))?;
        let rows = (!self.model.config().has_plain_embedding()).then(|| leaf(&rows));
        let mut inputs = vec![leaf(&x)];
        let mut outputs = Vec::with_capacity(n_layer);
        for layer in 0..n_layer {
            let index = self.model.block_segment(layer);
            self.pulse.on(Doing::Forward, index);
            self.parameters.get(index)?;
            self.need_after(index)?;
            let (weights, input) = (self.parameters.get(index)?, &inputs[layer]);
            let block = || self.model.block(layer, weights, input, pass);
            x = if self.recompute { tch::no_grad(block) } else { block() };
            inputs.push(leaf(&x));
            outputs.push((!self.recompute).then(|| x.shallow_clone()));
            if layer + 1 < n_layer {
                self.parameters.release(index)?; // the last one's backward comes next
            }
        }
        Ok(Saved { inputs, outputs, rows, mask })
    }

    /// Starts to gather what the forward pass needs after segment `index`.
    fn need_after(&mut self, index: usize) -> Result<(), TrainError> {
        if index + 1 < self.parameters.len() { self.parameters.need(index + 1) } else { Ok(()) }
    }

    /// The rows of the tokens, the residual stream that they begin, and its dropout.
    fn embed(&mut self, batch: &MicroBatch) -> Result<(Tensor, Tensor, Option<Tensor>), TrainError> {
        self.pulse.on(Doing::Forward, TOKENS);
        self.parameters.need(TOKENS)?;
        self.parameters.need(POSITIONS)?;
        self.need_after(POSITIONS)?;
        let (wte, wpe) = self.parameters.get_both(TOKENS, POSITIONS)?;
        let rows = Gpt::token_rows(wte, &batch.inputs);
        let x = self.model.embed(wpe, &rows, batch.types.as_ref());
        self.parameters.release(POSITIONS)?; // the tokens stay: the head is tied to them
        match Gpt::embedding_mask(batch.dropout.as_ref(), &x) {
            Some(mask) => Ok((rows, x * &mask, Some(mask))),
            None => Ok((rows, x, None)),
        }
    }

    /// Final norm, heads and losses, forward and backward; returns the gradient of the last block's output.
    fn head(&mut self, batch: &MicroBatch, x: &Tensor, scale: f64) -> Result<Tensor, TrainError> {
        if let Some(segment) = self.model.masked_segment() {
            return self.masked_head(segment, batch, x, scale);
        }
        self.pulse.on(Doing::Backward, self.model.norm_segment().unwrap_or(TOKENS));
        let hidden = match self.model.norm_segment() {
            Some(norm) => self.model.final_norm(self.parameters.get(norm)?, x),
            None => x.detach(),
        };
        let (mut loss, grad) = self.language_loss(batch, &hidden, scale)?;
        if let Some(task) = &batch.task {
            loss = loss * scale + self.task_loss(task, batch.dropout.as_ref(), &hidden, &grad)?;
        }
        self.losses.push(loss);
        let Some(norm) = self.model.norm_segment() else { return Ok(grad) };
        self.gradients.backward(norm, self.parameters.get(norm)?, &hidden, &grad)?;
        self.parameters.release(norm)?;
        Ok(x.grad())
    }

    /// The same of a masked model: only what is predicted goes through its transform and its head.
    fn masked_head(
        &mut self,
        segment: usize,
        batch: &MicroBatch,
        x: &Tensor,
        scale: f64,
    ) -> Result<Tensor, TrainError> {
        self.pulse.on(Doing::Backward, segment);
        let hidden = self.model.transform(self.parameters.get(segment)?, &batch.picked(x));
        let wte_grad = self.token_grad()?;
        let (wte, mlm) = self.parameters.get_both(TOKENS, segment)?;
        let MaskedLoss { mut loss, output, output_grad } =
            self.model.masked_loss([wte, mlm], &hidden, &batch.targets.reshape([-1]), &wte_grad, scale);
        self.parameters.release(TOKENS)?;
        let task_grad = x.zeros_like();
        if let Some(task) = &batch.task {
            let hidden = x.detach();
            loss = loss * scale + self.task_loss(task, batch.dropout.as_ref(), &hidden, &task_grad)?;
        }
        self.losses.push(loss);
        self.gradients.backward(segment, self.parameters.get(segment)?, &output, &output_grad)?;
        self.parameters.release(segment)?;
        Ok(x.grad() + task_grad)
    }

    /// The summed loss of the targets, and the gradient of the hidden states `[B, T, C]` of it times `scale`.
    fn language_loss(
        &mut self,
        batch: &MicroBatch,
        hidden: &Tensor,
        scale: f64,
    ) -> Result<(Tensor, Tensor), TrainError> {
        let wte_grad = self.token_grad()?;
        let head = self.model.head(self.parameters.get(TOKENS)?);
        let (loss, grad) = tch::no_grad(|| {
            let (rows, targets) = (batch.picked(hidden), batch.targets.view([-1]));
            if targets.numel() == 0 {
                return (Tensor::from(0.0), hidden.zeros_like());
            }
            let (loss, grad) = head.loss_and_grad(&rows, &targets, &wte_grad, scale);
            match &batch.target_rows {
                None => (loss, grad.view_as(hidden)),
                Some(picked) => {
                    let all = hidden.flatten(0, 1).zeros_like();
                    (loss, all.index_copy(0, picked, &grad).view_as(hidden))
                }
            }
        });
        self.parameters.release(TOKENS)?;
        Ok((loss, grad))
    }

    /// A task's loss, scaled; adds its gradient to that of the hidden states.
    fn task_loss(
        &mut self,
        task: &TaskBatch,
        dropout: Option<&Dropout>,
        hidden: &Tensor,
        hidden_grad: &Tensor,
    ) -> Result<Tensor, TrainError> {
        let index = self.task_segment();
        self.pulse.on(Doing::Backward, index);
        let rows = task.pick(hidden).detach().set_requires_grad(true);
        let loss = task.loss(self.parameters.get(index)?, &rows, self.model.task_dropout(dropout, &rows));
        let output_grad = loss.full_like(task.scale);
        self.gradients.backward(index, self.parameters.get(index)?, &loss, &output_grad)?;
        self.parameters.release(index)?;
        let _ = hidden_grad.flatten(0, 1).index_add_(0, &task.extract, &rows.grad());
        Ok(loss.detach().to_kind(Kind::Double) * task.scale)
    }

    /// The segment of a task's layer: it comes after all of the model's.
    fn task_segment(&self) -> usize {
        self.parameters.len() - 1
    }

    /// What a task's layer says of each example of a batch, `[E, K]` fp32, without gradients; of none, nothing.
    ///
    /// # Errors
    /// A failed collective.
    pub fn task_outputs(&mut self, batch: Option<&MicroBatch>) -> Result<Option<Tensor>, TrainError> {
        let pass = batch.map(MicroBatch::pass).unwrap_or_default();
        let hidden = self.hidden_of(batch.map(|batch| &batch.inputs), pass)?;
        let index = self.task_segment();
        let weights = self.parameters.get(index)?;
        let task = batch.and_then(|batch| batch.task.as_ref());
        let outputs = task
            .zip(hidden)
            .map(|(task, hidden)| tch::no_grad(|| task.outputs(weights, &task.pick(&hidden))));
        self.parameters.release(index)?;
        Ok(outputs)
    }

    /// Opens the token embedding's gradient, `[V padded, C]` fp32, to which the head adds first and the
    /// embedding last: it is complete only at the end.
    fn token_grad(&mut self) -> Result<Tensor, TrainError> {
        let flat = self.gradients.open(TOKENS)?;
        Ok(ops::view(&flat, &self.parameters.spec(TOKENS).tensors[0])?)
    }

    /// All blocks, the last first; returns the gradient of the first one's input.
    fn blocks_backward(
        &mut self,
        batch: &MicroBatch,
        saved: &mut Saved,
        mut grad: Tensor,
    ) -> Result<Tensor, TrainError> {
        saved.inputs.truncate(self.model.config().n_layer);
        while let Some(input) = saved.inputs.pop() {
            let (layer, index) = (saved.inputs.len(), self.model.block_segment(saved.inputs.len()));
            self.pulse.on(Doing::Backward, index);
            self.parameters.get(index)?;
            if layer > 0 || saved.rows.is_some() {
                self.parameters.need(index - 1)?;
            }
            let weights = self.parameters.get(index)?;
            let output = match saved.outputs.pop().flatten() {
                Some(output) => output,
                None => self.model.block(layer, weights, &input, batch.pass()),
            };
            self.gradients.backward(index, weights, &output, &grad)?;
            drop(output);
            self.parameters.release(index)?;
            grad = input.grad();
        }
        Ok(grad)
    }

    fn embedding_backward(
        &mut self,
        batch: &MicroBatch,
        saved: &Saved,
        grad: Tensor,
    ) -> Result<(), TrainError> {
        self.pulse.on(Doing::Backward, TOKENS);
        if let Some(rows) = &saved.rows {
            return self.normed_embedding_backward(batch, rows, saved.mask.as_ref(), &grad);
        }
        let wpe_grad = self.gradients.open(POSITIONS)?;
        let wpe_grad = ops::view(&wpe_grad, &self.parameters.spec(POSITIONS).tensors[0])?;
        let wte_grad = self.gradients.opened(TOKENS);
        let wte_grad = ops::view(&wte_grad, &self.parameters.spec(TOKENS).tensors[0])?;
        tch::no_grad(|| {
            let grad = saved.mask.as_ref().map_or(grad.shallow_clone(), |mask| &grad * mask);
            embed_backward(&batch.inputs, &grad, &wte_grad, &wpe_grad);
        });
        self.gradients.close(POSITIONS)?;
        self.gradients.close(TOKENS) // tied: complete only now
    }

    /// The same where the embedding does more than add: it is differentiated like a block whose input are the
    /// rows of the tokens.
    fn normed_embedding_backward(
        &mut self,
        batch: &MicroBatch,
        rows: &Tensor,
        mask: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(), TrainError> {
        let weights = self.parameters.get(POSITIONS)?;
        let output = self.model.embed(weights, rows, batch.types.as_ref());
        let grad = mask.map_or(grad.shallow_clone(), |mask| grad * mask);
        self.gradients.backward(POSITIONS, weights, &output, &grad)?;
        let wte_grad = ops::view(&self.gradients.opened(TOKENS), &self.parameters.spec(TOKENS).tensors[0])?;
        tch::no_grad(|| rows_backward(&batch.inputs, &rows.grad(), &wte_grad));
        self.parameters.release(POSITIONS)?;
        self.gradients.close(TOKENS) // tied: complete only now
    }

    /// Waits until the gradient is the sum over all micro-batches and ranks.
    ///
    /// # Errors
    /// A failed collective.
    pub fn finish(&mut self, timing: &mut Timing) -> Result<Gradient, TrainError> {
        self.pulse.at(Doing::Reduce);
        let started = Instant::now();
        let squares = self.gradients.finish()?;
        timing.add(Phase::Optimizer, started);
        timing.shift(Phase::Optimizer, Phase::Reduce, self.gradients.take_waited());
        let (losses, own) = (read(&std::mem::take(&mut self.losses))?, self.gradients.take_own_squares()?);
        Ok(Gradient { losses, squares, own })
    }

    /// Hidden states before the head, `[B, T, C]`, without a graph: for evaluation and generation. A rank
    /// that has no tokens of its own takes part all the same where weights are gathered.
    ///
    /// # Errors
    /// A failed collective.
    pub fn hidden(&mut self, tokens: Option<&Tensor>) -> Result<Option<Tensor>, TrainError> {
        self.hidden_of(tokens, Pass::default())
    }

    fn hidden_of(&mut self, tokens: Option<&Tensor>, pass: Pass<'_>) -> Result<Option<Tensor>, TrainError> {
        let _guard = tch::no_grad_guard();
        let (wte, wpe) = self.parameters.get_both(TOKENS, POSITIONS)?;
        let mut x = tokens.map(|tokens| self.model.embed(wpe, &Gpt::token_rows(wte, tokens), pass.types));
        self.parameters.release(POSITIONS)?;
        for layer in 0..self.model.config().n_layer {
            let index = self.model.block_segment(layer);
            self.pulse.touch();
            self.parameters.get(index)?;
            self.need_after(index)?;
            let weights = self.parameters.get(index)?;
            x = x.map(|x| self.model.block(layer, weights, &x, pass));
            self.parameters.release(index)?;
        }
        if let Some(norm) = self.model.norm_segment() {
            let weights = self.parameters.get(norm)?;
            x = x.map(|x| self.model.final_norm(weights, &x));
            self.parameters.release(norm)?;
        }
        Ok(x)
    }

    /// The summed loss of a batch in nats, without gradients; of none, zero.
    ///
    /// # Errors
    /// A failed collective.
    pub fn loss(&mut self, batch: Option<&MicroBatch>) -> Result<f64, TrainError> {
        let pass = batch.map(MicroBatch::pass).unwrap_or_default();
        let hidden = self.hidden_of(batch.map(|batch| &batch.inputs), pass)?;
        let rows = batch.zip(hidden).map(|(batch, hidden)| batch.picked(&hidden));
        let targets = batch.map(|batch| batch.targets.reshape([-1]));
        let nats =
            self.with_head(rows, |head, rows| targets.map_or(0.0, |targets| head.loss(rows, &targets)))?;
        Ok(nats.unwrap_or(0.0))
    }

    /// What `read` makes of the head and of hidden states `[n, C]` that are ready for it, given those before;
    /// of none, nothing.
    fn with_head<T>(
        &mut self,
        rows: Option<Tensor>,
        read: impl FnOnce(&Head<'_>, &Tensor) -> T,
    ) -> Result<Option<T>, TrainError> {
        let _guard = tch::no_grad_guard();
        let model = &self.model;
        let done = match model.masked_segment() {
            None => {
                let head = model.head(self.parameters.get(TOKENS)?);
                rows.map(|rows| read(&head, &rows))
            }
            Some(segment) => {
                let (wte, mlm) = self.parameters.get_both(TOKENS, segment)?;
                let head = model.masked_head(wte, mlm, None);
                let done = rows.map(|rows| read(&head, &model.transform(mlm, &rows)));
                self.parameters.release(segment)?;
                done
            }
        };
        self.parameters.release(TOKENS)?;
        Ok(done)
    }

    /// The log-probability of each target of a batch in nats, and whether it is the likeliest token, in the order
    /// of the targets; of no batch, none. Without gradients.
    ///
    /// # Errors
    /// A failed collective.
    pub fn scores(&mut self, batch: Option<&MicroBatch>) -> Result<Vec<(f32, bool)>, TrainError> {
        let pass = batch.map(MicroBatch::pass).unwrap_or_default();
        let hidden = self.hidden_of(batch.map(|batch| &batch.inputs), pass)?;
        let head = self.model.head(self.parameters.get(TOKENS)?);
        let scores = batch.zip(hidden).map(|(batch, hidden)| {
            let (logs, likeliest) =
                tch::no_grad(|| head.scores(&batch.picked(&hidden), &batch.targets.reshape([-1])));
            let logs = Vec::<f32>::try_from(logs).expect("one dimension of fp32");
            let likeliest = Vec::<bool>::try_from(likeliest).expect("one dimension of bool");
            logs.into_iter().zip(likeliest).collect()
        });
        self.parameters.release(TOKENS)?;
        Ok(scores.unwrap_or_default())
    }

    /// Logits of every position of tokens `[B, T]`: `[B, T, V]` fp32, without gradients.
    ///
    /// # Errors
    /// A failed collective.
    pub fn logits(&mut self, tokens: &Tensor) -> Result<Tensor, TrainError> {
        self.logits_of(tokens, |hidden| hidden)
    }

    /// Logits that follow the last of tokens `[B, T]`: `[B, V]` fp32, without gradients.
    ///
    /// # Errors
    /// A failed collective.
    pub fn next_logits(&mut self, tokens: &Tensor) -> Result<Tensor, TrainError> {
        self.logits_of(tokens, |hidden| hidden.select(1, -1))
    }

    fn logits_of(&mut self, tokens: &Tensor, pick: impl Fn(Tensor) -> Tensor) -> Result<Tensor, TrainError> {
        let hidden = pick(self.hidden(Some(tokens))?.expect("there are tokens"));
        let mut size = hidden.size();
        let rows = hidden.reshape([-1, self.model.config().n_embd as i64]);
        let logits = self.with_head(Some(rows), |head, rows| head.logits(rows))?.expect("there are tokens");
        *size.last_mut().expect("hidden states have a last dimension") = logits.size()[1];
        Ok(logits.view(size.as_slice()))
    }
}

/// The numbers of scalars in f64, wherever they are, in one go.
fn read(scalars: &[Tensor]) -> Result<Vec<f64>, TrainError> {
    let Some(device) = scalars.iter().map(Tensor::device).find(|device| device.is_cuda()) else {
        return Ok(scalars.iter().map(|scalar| scalar.double_value(&[])).collect());
    };
    let together: Vec<Tensor> = scalars.iter().map(|scalar| scalar.reshape([1]).to_device(device)).collect();
    let together = Tensor::f_cat(&together, 0).map_err(ops::OpsError::from)?;
    Ok(Vec::<f64>::try_from(together).map_err(ops::OpsError::from)?)
}
