//! The C++ shim's functions, bound. The only place that knows their C signatures.

use crate::OpsError;
use crate::attention::{Division, Sequences, Windowed};
use std::ffi::{CStr, c_char, c_int};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

mod ffi {
    use super::{C_tensor, c_char, c_int};

    /// A piece of a pattern; csrc/attention.cpp says what each array holds.
    #[repr(C)]
    pub(super) struct Piece {
        pub(super) queries: *const i32,
        pub(super) keys: *const i32,
        pub(super) n_queries: i64,
        pub(super) n_keys: i64,
        pub(super) first: *const i32,
        pub(super) end: *const i32,
        pub(super) n_rows: i64,
        pub(super) blocks: *const i32,
        pub(super) chunks: *const i32,
        pub(super) n_blocks: i64,
        pub(super) n_chunks: i64,
    }

    unsafe extern "C" {
        pub(super) fn phx_last_error() -> *const c_char;
        pub(super) fn phx_set_grad(tensor: *mut C_tensor, grad: *const C_tensor) -> c_int;
        pub(super) fn phx_backward(output: *const C_tensor, grad_output: *const C_tensor) -> c_int;
        pub(super) fn phx_mapped_zeros(numel: i64, bf16: c_int) -> *mut C_tensor;
        pub(super) fn phx_adamw(
            param: *mut f32,
            grad: *const f32,
            exp_avg: *mut f32,
            exp_avg_sq: *mut f32,
            rounded: *mut u16,
            n: i64,
            grad_scale: f32,
            keep: f32,
            beta1: f32,
            rest1: f32,
            beta2: f32,
            rest2: f32,
            step_size: f32,
            root_scale: f32,
            eps: f32,
        );
        pub(super) fn phx_attention(
            q: *const C_tensor,
            k: *const C_tensor,
            v: *const C_tensor,
            pieces: *const Piece,
            n_pieces: i64,
            half: c_int,
        ) -> *mut C_tensor;
        pub(super) fn phx_windowed_attention(
            q: *const C_tensor,
            k: *const C_tensor,
            v: *const C_tensor,
            pieces: *const i64,
            n_pieces: i64,
        ) -> *mut C_tensor;
        pub(super) fn phx_document_attention(
            q: *const C_tensor,
            k: *const C_tensor,
            v: *const C_tensor,
            tensors: *const *const C_tensor,
            numbers: *const i64,
            n_pieces: i64,
        ) -> *mut C_tensor;
        pub(super) fn phx_has_products() -> c_int;
        pub(super) fn phx_linear(
            x: *const C_tensor,
            weight: *const C_tensor,
            bias: *const C_tensor,
        ) -> *mut C_tensor;
        pub(super) fn phx_mlp(
            x: *const C_tensor,
            w1: *const C_tensor,
            b1: *const C_tensor,
            w2: *const C_tensor,
            b2: *const C_tensor,
            kind: c_int,
        ) -> *mut C_tensor;
        pub(super) fn phx_head_loss(
            hidden: *const C_tensor,
            head: *const C_tensor,
            targets: *const C_tensor,
            vocab_size: i64,
            scale: f64,
            logits: *const C_tensor,
            head_grad: *const C_tensor,
            hidden_grad: *const C_tensor,
            nats: *mut f64,
        ) -> c_int;
        pub(super) fn phx_cross_entropy(
            logits: *const C_tensor,
            targets: *const C_tensor,
            vocab_size: i64,
            scale: f64,
            nats: *mut f64,
        ) -> c_int;
        pub(super) fn phx_keep_host_memory() -> c_int;
        pub(super) fn phx_trim_host_memory() -> c_int;
        pub(super) fn phx_sum_squares(x: *const f32, n: i64, chunk: i64, partials: *mut f64);
    }
}

pub(crate) fn checked(code: c_int) -> Result<(), OpsError> {
    if code == 0 {
        return Ok(());
    }
    Err(last_error())
}

fn last_error() -> OpsError {
    // SAFETY: the shim returns a NUL-terminated string that lives until the next failing call on this
    // thread; it is copied before that.
    let text = unsafe { CStr::from_ptr(ffi::phx_last_error()) };
    OpsError::Torch(text.to_string_lossy().into_owned())
}

/// A flat tensor of `numel` zeros, fp32 or bf16, whose memory goes back to the system when the last
/// handle does. For large buffers that are there for a part of a step.
///
/// # Errors
/// No memory.
pub fn mapped_zeros(numel: usize, kind: Kind, device: Device) -> Result<Tensor, OpsError> {
    if device != Device::Cpu || numel == 0 {
        return Ok(Tensor::f_zeros([numel as i64], (kind, device))?);
    }
    // SAFETY: a plain call. What it returns is null or a new tensor that owns its pages, which nobody
    // else refers to: ownership passes to the Tensor here.
    unsafe {
        let tensor = ffi::phx_mapped_zeros(numel as i64, c_int::from(kind == Kind::BFloat16));
        if tensor.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(tensor)) }
    }
}

/// Makes `grad` the gradient of the leaf `tensor`; backward accumulates into it in place.
pub(crate) fn set_grad(tensor: &mut Tensor, grad: &Tensor) -> Result<(), OpsError> {
    // SAFETY: both pointers come from live tensors that outlive the call; the shim copies the handle.
    checked(unsafe { ffi::phx_set_grad(tensor.as_mut_ptr(), grad.as_ptr()) })
}

/// Backward through the graph of `output`, given the loss's gradient with respect to it (same shape).
/// Gradients of leaves accumulate.
///
/// # Errors
/// What libtorch says, when shapes differ or `output` has no graph.
pub fn backward(output: &Tensor, grad_output: &Tensor) -> Result<(), OpsError> {
    // SAFETY: both pointers come from live tensors that outlive the call.
    checked(unsafe { ffi::phx_backward(output.as_ptr(), grad_output.as_ptr()) })
}

/// Whether the CPU has a matrix unit for bf16 that this process may use.
pub(crate) fn has_products() -> bool {
    // SAFETY: a plain call; the shim asks the system once and remembers the answer.
    unsafe { ffi::phx_has_products() != 0 }
}

/// Large tensors in host memory that are made from now on lie in memory that the process keeps.
pub(crate) fn keep_host_memory() -> Result<(), OpsError> {
    // SAFETY: a plain call. The allocator that it installs lives as long as the process; tensors made
    // before keep the one that they came from.
    checked(unsafe { ffi::phx_keep_host_memory() })
}

/// Gives the system what of that memory no tensor lies in.
pub(crate) fn trim_host_memory() -> Result<(), OpsError> {
    // SAFETY: a plain call. Only regions without a tensor go, and the allocator guards its own books.
    checked(unsafe { ffi::phx_trim_host_memory() })
}

/// A linear layer of bf16, whose shapes and layout the caller has checked.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, OpsError> {
    let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
    // SAFETY: the tensors outlive the call, and the shim keeps handles of its own. Shapes fit and
    // parameters are contiguous, as the caller has checked; the shim makes `x` so. What is returned is
    // null or a new tensor, whose ownership passes to the Tensor here.
    unsafe {
        let out = ffi::phx_linear(x.as_ptr(), weight.as_ptr(), bias);
        if out.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(out)) }
    }
}

/// An MLP of bf16, whose shapes and layout the caller has checked: two layers' weight and bias each.
pub(crate) fn mlp(x: &Tensor, [w1, b1, w2, b2]: [&Tensor; 4], exact: bool) -> Result<Tensor, OpsError> {
    // SAFETY: as in `linear`.
    unsafe {
        let [w1, b1, w2, b2] = [w1, b1, w2, b2].map(Tensor::as_ptr);
        let out = ffi::phx_mlp(x.as_ptr(), w1, b1, w2, b2, c_int::from(exact));
        if out.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(out)) }
    }
}

/// What the fused loss of the head is given: see `Head::loss_and_grad`.
pub(crate) struct HeadLoss<'a> {
    /// `[N, C]` bf16.
    pub(crate) hidden: &'a Tensor,
    /// `[V padded, C]` bf16.
    pub(crate) head: &'a Tensor,
    /// `[N]` i64, each below `vocab_size`.
    pub(crate) targets: &'a Tensor,
    pub(crate) vocab_size: i64,
    pub(crate) scale: f64,
    /// Scratch, `[N, V padded]` bf16.
    pub(crate) logits: &'a Tensor,
    /// `[V padded, C]` fp32, added to.
    pub(crate) head_grad: &'a Tensor,
    /// `[N, C]` bf16, written.
    pub(crate) hidden_grad: &'a Tensor,
}

impl HeadLoss<'_> {
    /// The sum of the cross-entropies in nats.
    pub(crate) fn run(&self) -> Result<f64, OpsError> {
        let HeadLoss { hidden, head, targets, vocab_size, scale, logits, head_grad, hidden_grad } = self;
        let (n, c, padded) = (hidden.size()[0], hidden.size()[1], head.size()[0]);
        let rows = [(*hidden, [n, c]), (head, [padded, c]), (logits, [n, padded]), (head_grad, [padded, c])];
        let fits = rows.iter().all(|(tensor, size)| tensor.size() == *size && tensor.is_contiguous());
        assert!(fits && hidden_grad.size() == [n, c] && targets.size() == [n], "a head's shapes");
        assert!(head_grad.kind() == Kind::Float && *vocab_size <= padded, "a head's gradient is fp32");
        check_targets(targets, *vocab_size);
        let mut nats = 0.0;
        // SAFETY: the tensors outlive the call, and their kinds, shapes and layout are those that the shim
        // reads and writes by, as was just checked; `nats` is a local that it adds to.
        checked(unsafe {
            ffi::phx_head_loss(
                hidden.as_ptr(),
                head.as_ptr(),
                targets.as_ptr(),
                *vocab_size,
                *scale,
                logits.as_ptr(),
                head_grad.as_ptr(),
                hidden_grad.as_ptr(),
                &raw mut nats,
            )
        })?;
        Ok(nats)
    }
}

/// The loss's part of it alone: the sum of the cross-entropies in nats of logits `[N, V padded]` bf16 against
/// targets `[N]` i64; the logits become the gradients of it times `scale`.
///
/// # Errors
/// What libtorch says.
///
/// # Panics
/// On a CPU without a matrix unit for bf16, or where shapes and kinds are not these.
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    vocab_size: i64,
    scale: f64,
) -> Result<f64, OpsError> {
    let [rows, padded] = logits.size()[..] else { panic!("logits are [N, V padded]") };
    let half = logits.kind() == Kind::BFloat16 && logits.device() == Device::Cpu && logits.is_contiguous();
    assert!(has_products() && half && vocab_size <= padded, "logits are bf16, for the matrix unit");
    assert_eq!(targets.size(), [rows], "a target for each row");
    check_targets(targets, vocab_size);
    let mut nats = 0.0;
    // SAFETY: both tensors outlive the call; kinds, shapes, layout and targets are what the shim reads and
    // writes by, as was just checked; `nats` is a local that it adds to.
    checked(unsafe {
        ffi::phx_cross_entropy(logits.as_ptr(), targets.as_ptr(), vocab_size, scale, &raw mut nats)
    })?;
    Ok(nats)
}

fn check_targets(targets: &Tensor, vocab_size: i64) {
    assert!(targets.kind() == Kind::Int64 && targets.is_contiguous(), "targets are numbers of tokens");
    let known = i64::try_from(targets.max()).unwrap_or(i64::MAX) < vocab_size;
    assert!(known && i64::try_from(targets.min()).unwrap_or(-1) >= 0, "targets are in the vocabulary");
}

/// Attention of `[B, H, T, D]` over the pairs of some pieces, by the CPU's kernel; with `half`, bf16 is
/// multiplied as it is, even where the CPU has to emulate that.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    divisions: &[Division],
    half: bool,
) -> Result<Tensor, OpsError> {
    let pieces: Vec<ffi::Piece> = divisions.iter().map(described).collect();
    // SAFETY: the tensors and the arrays behind `pieces` outlive the call, and the shim copies what it
    // keeps. Lengths are those of the arrays; that positions and ranges lie within them is what
    // `configs::Pattern::pieces` makes and `Division` divides. What is returned is null or a new tensor,
    // whose ownership passes to the Tensor here.
    unsafe {
        let (n, half) = (pieces.len() as i64, c_int::from(half));
        let out = ffi::phx_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), pieces.as_ptr(), n, half);
        if out.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(out)) }
    }
}

/// Attention of `[B, H, T, D]` merged from windowed pieces, the first of which has every query.
pub(crate) fn windowed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pieces: &[Windowed],
) -> Result<Tensor, OpsError> {
    let numbers: Vec<i64> = pieces.iter().flat_map(|piece| piece.numbers()).collect();
    // SAFETY: the tensors and the numbers outlive the call, three of them for each piece; the shim copies
    // what it keeps. What is returned is null or a new tensor, whose ownership passes to the Tensor here.
    unsafe {
        let (numbers, n) = (numbers.as_ptr(), pieces.len() as i64);
        let out = ffi::phx_windowed_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), numbers, n);
        if out.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(out)) }
    }
}

/// Attention of `[B, H, T, D]` merged from sequences of rows, the first piece of which has every row.
pub(crate) fn document_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    pieces: &[Sequences],
) -> Result<Tensor, OpsError> {
    let pointer = |rows: &Option<Tensor>| rows.as_ref().map_or(std::ptr::null(), Tensor::as_ptr);
    let tensors: Vec<*const C_tensor> = pieces
        .iter()
        .flat_map(|piece| [pointer(&piece.queries), pointer(&piece.keys), piece.ends.as_ptr()])
        .collect();
    let numbers: Vec<i64> = pieces.iter().flat_map(|piece| [piece.longest, piece.window]).collect();
    // SAFETY: the tensors and the numbers outlive the call, three and two for each piece; the shim keeps
    // handles of its own. That rows lie within `[B T]` is what `Sequences` is made of. What is returned is null
    // or a new tensor, whose ownership passes to the Tensor here.
    unsafe {
        let (tensors, numbers, n) = (tensors.as_ptr(), numbers.as_ptr(), pieces.len() as i64);
        let out = ffi::phx_document_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), tensors, numbers, n);
        if out.is_null() { Err(last_error()) } else { Ok(Tensor::from_ptr(out)) }
    }
}

fn described(division: &Division) -> ffi::Piece {
    let Division { piece, first, end, rows, blocks, chunks } = division;
    let queries = piece.queries.len();
    assert!(first.len() == rows * queries && end.len() == first.len(), "ranges for every query");
    ffi::Piece {
        queries: piece.queries.as_ptr(),
        keys: piece.keys.as_ptr(),
        n_queries: queries as i64,
        n_keys: piece.keys.len() as i64,
        first: first.as_ptr(),
        end: end.as_ptr(),
        n_rows: *rows as i64,
        blocks: blocks.as_ptr(),
        chunks: chunks.as_ptr(),
        n_blocks: blocks.len() as i64 - 1,
        n_chunks: chunks.len() as i64 - 1,
    }
}

/// The constants of one AdamW update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWPass {
    pub(crate) grad_scale: f32,
    pub(crate) keep: f32,
    pub(crate) betas: [f64; 2],
    pub(crate) step_size: f32,
    pub(crate) root_scale: f32,
    pub(crate) eps: f32,
}

/// One pass over slices of equal length; `rounded`, if it is there, gets the parameters as bf16.
pub(crate) fn adamw(
    param: &mut [f32],
    grad: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    rounded: Option<&mut [u16]>,
    pass: AdamWPass,
) {
    let n = param.len();
    assert!(grad.len() == n && exp_avg.len() == n && exp_avg_sq.len() == n, "slices of one shape");
    assert!(rounded.as_ref().is_none_or(|rounded| rounded.len() == n), "slices of one shape");
    let rounded = rounded.map_or(std::ptr::null_mut(), <[u16]>::as_mut_ptr);
    let AdamWPass { grad_scale, keep, betas, step_size, root_scale, eps } = pass;
    let ([beta1, beta2], [rest1, rest2]) = (betas.map(|b| b as f32), betas.map(|b| (1.0 - b) as f32));
    // SAFETY: slices of n elements, disjoint because all but one are exclusive borrows; the shim reads and
    // writes exactly n elements of each, none of a null one, and keeps no pointer.
    unsafe {
        ffi::phx_adamw(
            param.as_mut_ptr(),
            grad.as_ptr(),
            exp_avg.as_mut_ptr(),
            exp_avg_sq.as_mut_ptr(),
            rounded,
            n as i64,
            grad_scale,
            keep,
            beta1,
            rest1,
            beta2,
            rest2,
            step_size,
            root_scale,
            eps,
        );
    }
}

/// Sums of squares of `values` by chunks of `chunk` elements.
pub(crate) fn sum_squares(values: &[f32], chunk: usize) -> Vec<f64> {
    let mut partials = vec![0.0; values.len().div_ceil(chunk)];
    // SAFETY: the shim reads `values.len()` elements and writes one partial per chunk, which is what
    // `partials` holds.
    unsafe {
        ffi::phx_sum_squares(values.as_ptr(), values.len() as i64, chunk as i64, partials.as_mut_ptr())
    };
    partials
}
