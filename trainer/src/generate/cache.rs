//! Keys and values of the tokens so far, so that a token costs one position and not all before it. Owns
//! which of them each layer keeps; knows nothing of what is chosen.
//!
//! A banded layer keeps its last w keys, in a ring: neither its memory nor its time grows beyond them. Any
//! other layer keeps all, and reads those that its pattern has.
//! Shapes: B texts, H heads of D, S slots.

use crate::error::TrainError;
use crate::model::{Gpt, POSITIONS, Pass, TOKENS};
use crate::weights::Parameters;
use configs::Pattern;
use tch::{Device, Kind, Tensor};

/// The keys and values of some texts, each as far as it has come.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<Layer>,
    /// Tokens of each text that are in it.
    lengths: Vec<usize>,
}

#[derive(Debug)]
struct Layer {
    pattern: Pattern,
    keys: Tensor,
    values: Tensor,
}

/// Which slots a query reads.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Slots {
    First(usize),
    These(Vec<i64>),
}

impl Cache {
    /// For `texts` texts of at most `positions` tokens each.
    pub(crate) fn new(model: &Gpt, texts: usize, positions: usize, kind: Kind, device: Device) -> Cache {
        let config = model.config();
        let layer = |layer: usize| {
            let pattern = config.pattern(layer);
            let slots = match pattern {
                Pattern::Banded(w) => w.min(positions),
                _ => positions,
            };
            let size = [texts as i64, config.n_head as i64, slots as i64, config.head_dim() as i64];
            let empty = || Tensor::zeros(size, (kind, device));
            Layer { pattern, keys: empty(), values: empty() }
        };
        Cache { layers: (0..config.n_layer).map(layer).collect(), lengths: vec![0; texts] }
    }

    /// Tokens of a text that are in it.
    pub(crate) fn length(&self, text: usize) -> usize {
        self.lengths[text]
    }

    /// Makes up so many tokens of each text, to be timed.
    pub(crate) fn pretend(&mut self, length: usize) {
        self.lengths.fill(length);
        for layer in &mut self.layers {
            // Memory that was never written is not read as memory is.
            let _ = (layer.keys.fill_(0.5), layer.values.fill_(0.5));
        }
    }

    /// Bytes of all keys and values.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        let of = |x: &Tensor| x.numel() * x.kind().elt_size_in_bytes();
        self.layers.iter().map(|layer| of(&layer.keys) + of(&layer.values)).sum()
    }

    /// Keeps these texts, in this order.
    pub(crate) fn keep(&mut self, texts: &[usize]) {
        let rows: Vec<i64> = texts.iter().map(|&text| text as i64).collect();
        for layer in &mut self.layers {
            let rows = Tensor::from_slice(&rows).to_device(layer.keys.device());
            layer.keys = layer.keys.index_select(0, &rows);
            layer.values = layer.values.index_select(0, &rows);
        }
        self.lengths = texts.iter().map(|&text| self.lengths[text]).collect();
    }

    /// Starts a text anew with these tokens, none or more. Collective where weights are gathered, as is
    /// [`Cache::step`].
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn fill(
        &mut self,
        model: &Gpt,
        parameters: &mut Parameters<'_>,
        text: usize,
        tokens: &[i64],
    ) -> Result<(), TrainError> {
        self.lengths[text] = tokens.len();
        if tokens.is_empty() {
            return Ok(());
        }
        let at: Vec<i64> = (0..tokens.len() as i64).collect();
        let layers = &mut self.layers;
        let _ = forward(
            model,
            parameters,
            [tokens, &at].map(|ids| Tensor::from_slice(ids).view([1, -1])),
            |layer, [q, k, v]| {
                layers[layer].put_whole(text, &k, &v);
                model.attend(layer, &q, &k, &v, Pass::default())
            },
        )?;
        Ok(())
    }

    /// Adds a token to each text; returns the logits of what follows, `[B, V]` fp32 in host memory.
    ///
    /// # Errors
    /// A failed collective.
    pub(crate) fn step(
        &mut self,
        model: &Gpt,
        parameters: &mut Parameters<'_>,
        tokens: &[i64],
    ) -> Result<Tensor, TrainError> {
        let at: Vec<i64> = self.lengths.iter().map(|&length| length as i64).collect();
        let (layers, lengths) = (&mut self.layers, &self.lengths);
        let ids = [tokens, &at].map(|ids| Tensor::from_slice(ids).view([-1, 1]));
        let x = forward(model, parameters, ids, |layer, [q, k, v]| {
            layers[layer].put_one(lengths, &k, &v);
            layers[layer].attend(lengths, &q)
        })?;
        self.lengths.iter_mut().for_each(|length| *length += 1);
        head(model, parameters, &x)
    }
}

impl Layer {
    fn slots(&self) -> usize {
        self.keys.size()[2] as usize
    }

    /// The slot of a position.
    fn slot(&self, position: usize) -> i64 {
        (position % self.slots()) as i64
    }

    /// Keys and values of a text's first positions, `[1, H, T, D]`: the last of them, as many as there are
    /// slots.
    fn put_whole(&mut self, text: usize, k: &Tensor, v: &Tensor) {
        let (t, slots) = (k.size()[2] as usize, self.slots());
        let from = t.saturating_sub(slots);
        let order: Vec<i64> = (from..t).map(|position| self.slot(position)).collect();
        let order = Tensor::from_slice(&order).to_device(k.device());
        for (cache, new) in [(&self.keys, k), (&self.values, v)] {
            let new = new.get(0).narrow(1, from as i64, (t - from) as i64);
            let _ = cache.get(text as i64).index_copy_(1, &order, &new);
        }
    }

    /// A key and a value of each text, `[B, H, 1, D]`.
    fn put_one(&mut self, lengths: &[usize], k: &Tensor, v: &Tensor) {
        let slots: Vec<i64> = lengths.iter().map(|&length| self.slot(length)).collect();
        for (cache, new) in [(&self.keys, k), (&self.values, v)] {
            if slots.iter().all(|&slot| slot == slots[0]) {
                cache.narrow(2, slots[0], 1).copy_(new);
                continue;
            }
            for (text, &slot) in slots.iter().enumerate() {
                cache.get(text as i64).narrow(1, slot, 1).copy_(&new.get(text as i64));
            }
        }
    }

    /// What the query at this position reads; the key there has been put.
    fn seen(&self, position: usize) -> Slots {
        match self.pattern {
            Pattern::Banded(_) => Slots::First((position + 1).min(self.slots())),
            Pattern::Dense | Pattern::Bidirectional => Slots::First(position + 1),
            pattern => {
                let seen = (0..=position).filter(|&key| pattern.allows(position, key));
                Slots::These(seen.map(|key| key as i64).collect())
            }
        }
    }

    /// Attention of one query of each text, `[B, H, 1, D]`, to what its pattern has of the text.
    fn attend(&self, lengths: &[usize], q: &Tensor) -> Tensor {
        let seen: Vec<Slots> = lengths.iter().map(|&length| self.seen(length)).collect();
        let (keys, values, mask) = match (&seen[0], seen.iter().all(|slots| *slots == seen[0])) {
            (Slots::First(n), true) => {
                let first = |x: &Tensor| x.narrow(2, 0, *n as i64);
                (first(&self.keys), first(&self.values), None)
            }
            (Slots::These(slots), true) => {
                let slots = Tensor::from_slice(slots).to_device(q.device());
                (self.keys.index_select(2, &slots), self.values.index_select(2, &slots), None)
            }
            _ => self.of_each(seen, q),
        };
        Tensor::scaled_dot_product_attention(q, &keys, &values, mask.as_ref(), 0.0, false, None, false)
    }

    /// Keys and values of texts that read different slots, side by side, and which of them count.
    fn of_each(&self, seen: Vec<Slots>, q: &Tensor) -> (Tensor, Tensor, Option<Tensor>) {
        let mut rows: Vec<Vec<i64>> = seen
            .into_iter()
            .map(|slots| match slots {
                Slots::First(n) => (0..n as i64).collect(),
                Slots::These(slots) => slots,
            })
            .collect();
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let counts: Vec<bool> =
            rows.iter().flat_map(|row| (0..longest).map(|i| i < row.len()).collect::<Vec<bool>>()).collect();
        rows.iter_mut().for_each(|row| row.resize(longest, 0));
        let (b, n) = (rows.len() as i64, longest as i64);
        let place = Tensor::from_slice(&rows.concat()).view([b, 1, n, 1]).to_device(q.device());
        let size = self.keys.size();
        let place = place.expand([b, size[1], n, size[3]], false);
        let mask = Tensor::from_slice(&counts).view([b, 1, 1, n]).to_device(q.device());
        (self.keys.gather(2, &place, false), self.values.gather(2, &place, false), Some(mask))
    }
}

/// Hidden states of the last position of each text, `[B, C]`, given tokens and positions `[B, T]`.
fn forward(
    model: &Gpt,
    parameters: &mut Parameters<'_>,
    [tokens, at]: [Tensor; 2],
    mut attend: impl FnMut(usize, [Tensor; 3]) -> Tensor,
) -> Result<Tensor, TrainError> {
    let _guard = tch::no_grad_guard();
    let device = parameters.device();
    let (wte, wpe) = parameters.get_both(TOKENS, POSITIONS)?;
    let mut x = model.embed_at(wte, wpe, &tokens.to_device(device), &at.to_device(device));
    parameters.release(POSITIONS)?;
    for layer in 0..model.config().n_layer {
        let index = model.block_segment(layer);
        let weights = parameters.get(index)?;
        x = model.block_around(weights, &x, |qkv| attend(layer, qkv), |y, _| y);
        parameters.release(index)?;
    }
    Ok(x.select(1, -1))
}

/// Logits of hidden states `[B, C]`: `[B, V]` fp32 in host memory.
fn head(model: &Gpt, parameters: &mut Parameters<'_>, x: &Tensor) -> Result<Tensor, TrainError> {
    let _guard = tch::no_grad_guard();
    let mut hidden = x.shallow_clone();
    if let Some(norm) = model.norm_segment() {
        hidden = model.final_norm(parameters.get(norm)?, x);
        parameters.release(norm)?;
    }
    let logits = model.head(parameters.get(TOKENS)?).logits(&hidden);
    parameters.release(TOKENS)?;
    Ok(logits.to_device(Device::Cpu))
}
