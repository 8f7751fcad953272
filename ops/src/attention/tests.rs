//! Every pattern and every way to compute it against the definition, in float64.

use super::*;
use proptest::prelude::*;

/// The definition, in f64: softmax over the pairs that are kept.
fn reference(inputs: &[Tensor], pattern: Pattern, documents: Option<&[Documents]>) -> Tensor {
    let [q, k, v] = [0, 1, 2].map(|i: usize| &inputs[i]);
    let scores = q.matmul(&k.transpose(2, 3)) / (q.size()[3] as f64).sqrt();
    let unseen = sdpa::unseen(q, pattern, documents);
    scores.masked_fill(&unseen, f64::NEG_INFINITY).softmax(-1, Kind::Double).matmul(v)
}

fn random(shape: [i64; 4]) -> Tensor {
    Tensor::randn(shape, (Kind::Double, Device::Cpu))
}

/// ‖a - b‖ / ‖b‖ of the output and of each gradient.
fn distances(
    shape: [i64; 4],
    kind: Kind,
    pattern: Pattern,
    documents: Option<&[Documents]>,
    way: impl Fn(&[Tensor]) -> Tensor,
) -> Vec<f64> {
    let given: Vec<Tensor> = (0..4).map(|_| random(shape).to_kind(kind)).collect();
    let leaves = |kind| -> Vec<Tensor> {
        given[..3].iter().map(|x| x.to_kind(kind).detach().copy().set_requires_grad(true)).collect()
    };
    let (exact, inputs) = (leaves(Kind::Double), leaves(kind));
    let expected = reference(&exact, pattern, documents);
    let got = way(&inputs);
    crate::backward(&expected, &given[3].to_kind(Kind::Double)).unwrap();
    crate::backward(&got, &given[3]).unwrap();
    let off = |a: &Tensor, b: &Tensor| {
        let distance = (a.to_kind(Kind::Double) - b).norm().double_value(&[]);
        distance / (b.norm().double_value(&[]) + 1e-9)
    };
    let grads = (0..3).map(|i| off(&inputs[i].grad(), &exact[i].grad()));
    std::iter::once(off(&got, &expected)).chain(grads).collect()
}

fn limit(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-12,
        Kind::Float => 1e-5,
        _ => 2e-2,
    }
}

fn check(shape: [i64; 4], kind: Kind, pattern: Pattern, documents: Option<&[Documents]>) {
    check_products(shape, kind, pattern, documents, false);
}

fn check_products(
    shape: [i64; 4],
    kind: Kind,
    pattern: Pattern,
    documents: Option<&[Documents]>,
    half: bool,
) {
    let way = |x: &[Tensor]| kernel(&x[0], &x[1], &x[2], pattern, documents, half).unwrap();
    check_way(shape, kind, pattern, documents, way);
}

fn check_way(
    shape: [i64; 4],
    kind: Kind,
    pattern: Pattern,
    documents: Option<&[Documents]>,
    way: impl Fn(&[Tensor]) -> Tensor,
) {
    let off = distances(shape, kind, pattern, documents, way);
    // Where each query has one key, its softmax is 1 whatever the score: the gradients of q and k are 0, and
    // what is left of them is rounding.
    let unseen = sdpa::unseen(&Tensor::zeros(shape, (kind, Device::Cpu)), pattern, documents);
    let seen = unseen.logical_not().sum(Kind::Int64).int64_value(&[]);
    let scored = if seen == unseen.size()[0] * shape[2] { 1 } else { 4 };
    for (name, off) in ["output", "dq", "dk", "dv"].iter().zip(&off).take(scored) {
        assert!(*off < limit(kind), "{name} of {pattern} at {shape:?} in {kind:?}: {off}");
    }
}

/// Documents that begin where a hash of (sequence, position) says, one position in `mean`.
fn documents(sequences: i64, t: i64, mean: u64, seed: u64) -> Vec<Documents> {
    let begins = |sequence: u64, i: u64| {
        let [word, ..] = configs::Philox::new(seed).at([sequence as u32, i as u32, 0, 0]);
        u64::from(word) % mean == 0
    };
    (0..sequences as u64).map(|b| Documents::beginning(t as usize, |i| begins(b, i as u64))).collect()
}

const EDGES: [&str; 17] = [
    "dense",
    "bidirectional",
    "banded:1",
    "banded:2",
    "banded:63",
    "banded:64",
    "banded:65",
    "banded:1000",
    "strided:1",
    "strided:3",
    "strided:64",
    "strided:199",
    "strided:1000",
    "fixed:1,1",
    "fixed:64,1",
    "fixed:50,50",
    "fixed:1000,7",
];

#[test]
fn patterns_equal_the_masked_softmax_at_their_edges() {
    tch::manual_seed(1);
    for pattern in EDGES.map(|text| text.parse::<Pattern>().unwrap()) {
        for kind in [Kind::Float, Kind::BFloat16] {
            check([2, 3, 200, 24], kind, pattern, None);
            check([1, 2, 1, 8], kind, pattern, None);
            check([2, 1, 131, 64], kind, pattern, Some(&documents(2, 131, 20, 3)));
        }
    }
}

#[test]
fn products_of_bf16_as_it_is_equal_the_masked_softmax_too() {
    tch::manual_seed(7);
    for pattern in EDGES.map(|text| text.parse::<Pattern>().unwrap()) {
        check_products([1, 2, 131, 24], Kind::BFloat16, pattern, None, true);
        check_products([2, 1, 131, 72], Kind::BFloat16, pattern, Some(&documents(2, 131, 20, 3)), true);
    }
}

#[test]
fn sequences_in_several_chunks_equal_the_masked_softmax() {
    tch::manual_seed(2);
    for text in ["dense", "banded:100", "strided:37", "fixed:90,5"] {
        check([1, 1, 1300, 16], Kind::Float, text.parse().unwrap(), None);
        check([1, 2, 1300, 64], Kind::BFloat16, text.parse().unwrap(), None);
        check([2, 1, 1300, 8], Kind::Float, text.parse().unwrap(), Some(&documents(2, 1300, 400, 4)));
    }
}

#[test]
fn no_bit_depends_on_the_number_of_threads() {
    let before = tch::get_num_threads();
    for text in ["dense", "banded:100", "strided:37", "fixed:90,5"] {
        let pattern: Pattern = text.parse().unwrap();
        let given: Vec<Tensor> =
            (0..3).map(|_| Tensor::randn([1, 3, 1300, 32], (Kind::Float, Device::Cpu))).collect();
        let run = |threads| {
            tch::set_num_threads(threads);
            let x: Vec<Tensor> = given.iter().map(|x| x.detach().set_requires_grad(true)).collect();
            let out = kernel(&x[0], &x[1], &x[2], pattern, None, false).unwrap();
            crate::backward(&out, &Tensor::ones_like(&out)).unwrap();
            [out.detach(), x[0].grad(), x[1].grad(), x[2].grad()]
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert!(run(threads).iter().zip(&one).all(|(a, b)| a == b), "{text} on {threads} threads");
        }
    }
    tch::set_num_threads(before);
}

#[test]
fn what_other_documents_say_changes_no_bit_of_this_one() {
    let documents = vec![Documents::beginning(300, |i| i == 130)];
    for pattern in EDGES.map(|text| text.parse::<Pattern>().unwrap()) {
        let x: Vec<Tensor> =
            (0..3).map(|_| Tensor::randn([1, 2, 300, 16], (Kind::Float, Device::Cpu))).collect();
        let other: Vec<Tensor> = x.iter().map(Tensor::copy).collect();
        for x in &other {
            let _ = x.narrow(2, 0, 130).fill_(7.0);
        }
        let [a, b] = [&x, &other].map(|x| attention(&x[0], &x[1], &x[2], pattern, Some(&documents)));
        assert_eq!(a.narrow(2, 130, 170), b.narrow(2, 130, 170), "{pattern}");
        assert_ne!(a.narrow(2, 0, 130), b.narrow(2, 0, 130), "{pattern}");
    }
}

#[test]
fn narrow_bands_in_one_call_equal_the_masked_softmax_too() {
    tch::manual_seed(4);
    for w in [1, 2, 3, 6, 7, 8, 33] {
        let off = distances([2, 3, 33, 4], Kind::Float, Pattern::Banded(w), None, |x| {
            sdpa::banded(&x[0], &x[1], &x[2], w as i64)
        });
        assert!(w == 1 || off.iter().all(|&off| off < 1e-5), "banded:{w}: {off:?}");
    }
}

fn check_blocks(shape: [i64; 4], kind: Kind, pattern: Pattern, documents: Option<&[Documents]>) {
    let way = |x: &[Tensor]| blocks::attention(&x[0], &x[1], &x[2], pattern, documents).unwrap();
    check_way(shape, kind, pattern, documents, way);
}

#[test]
fn blocks_of_queries_equal_the_masked_softmax_at_their_edges() {
    tch::manual_seed(10);
    let of_blocks = ["banded:256", "banded:257", "strided:256", "fixed:256,3", "fixed:100,9"];
    let of_sequences = ["dense", "bidirectional", "banded:1", "banded:1000", "strided:3", "fixed:1000,7"];
    for pattern in of_sequences.into_iter().chain(of_blocks).map(|text| text.parse::<Pattern>().unwrap()) {
        for t in [1, 7, 256] {
            check_blocks([1, 2, t, 3], Kind::Double, pattern, None);
            let documents = documents(2, t + 1, 1 + t as u64 / 3, 11);
            check_blocks([2, 1, t + 1, 4], Kind::Double, pattern, Some(&documents));
        }
        check_blocks([1, 1, 257, 16], Kind::Float, pattern, None);
        check_blocks([1, 2, 257, 16], Kind::BFloat16, pattern, Some(&documents(1, 257, 90, 12)));
    }
}

#[test]
fn blocks_between_the_first_and_the_last_equal_the_masked_softmax_too() {
    tch::manual_seed(11);
    for text in ["dense", "bidirectional", "banded:300", "strided:200", "fixed:100,9"] {
        let pattern: Pattern = text.parse().unwrap();
        check_blocks([2, 1, 520, 4], Kind::Double, pattern, Some(&documents(2, 520, 170, 13)));
    }
}

#[test]
fn blocks_of_queries_leave_what_nobody_differentiates_without_a_graph() {
    let x = Tensor::randn([1, 1, 300, 4], (Kind::Float, Device::Cpu));
    let of = |x: &Tensor| blocks::attention(x, x, x, Pattern::Dense, None).unwrap();
    let leaf = x.detach().copy().set_requires_grad(true);
    assert!(!of(&x).requires_grad() && !tch::no_grad(|| of(&leaf)).requires_grad());
    let out = of(&leaf);
    crate::backward(&out, &out.ones_like()).unwrap();
    assert!(!leaf.grad().requires_grad(), "backward's own graphs stay in it");
}

#[test]
fn blocks_of_queries_take_less_than_a_byte_for_a_pair() {
    let kilobytes = |name: &str| {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let t = 8192;
    let documents = [Documents::beginning(t, |i| i == 100)];
    let x: Vec<Tensor> = (0..3)
        .map(|_| Tensor::randn([1, 1, t as i64, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true))
        .collect();
    let before = kilobytes("VmRSS:");
    let out = blocks::attention(&x[0], &x[1], &x[2], Pattern::Dense, Some(&documents)).unwrap();
    crate::backward(&out, &out.ones_like()).unwrap();
    let grown = 1024 * (kilobytes("VmHWM:") - before); // the most since the process began
    assert!(grown < (t * t) as u64, "{grown} bytes for {t} positions");
}

#[test]
fn pieces_merged_by_their_log_sum_exp_equal_the_masked_softmax() {
    tch::manual_seed(8);
    for pattern in EDGES.map(|text| text.parse::<Pattern>().unwrap()) {
        for (shape, kind) in [([2, 3, 131, 16], Kind::Float), ([1, 2, 128, 8], Kind::BFloat16)] {
            let Some(pieces) = windowed::windows(pattern, shape[2] as usize) else { continue };
            let off = distances(shape, kind, pattern, None, |x| {
                crate::shim::windowed_attention(&x[0], &x[1], &x[2], &pieces).unwrap()
            });
            let one_key_each = pattern.pairs(shape[2] as usize) as i64 == shape[2];
            assert!(one_key_each || off.iter().all(|&off| off < limit(kind)), "{pattern} {kind:?}: {off:?}");
        }
    }
}

#[test]
fn sequences_within_documents_merged_by_their_log_sum_exp_equal_the_masked_softmax() {
    tch::manual_seed(9);
    let patterns = ["dense", "banded:2", "banded:64", "strided:3", "strided:64", "fixed:8,2", "fixed:50,1"];
    for pattern in patterns.map(|text| text.parse::<Pattern>().unwrap()) {
        for (shape, kind) in [([2, 1, 131, 8], Kind::Float), ([1, 2, 70, 8], Kind::BFloat16)] {
            let documents = documents(shape[0], shape[2], 30, 7);
            let off = distances(shape, kind, pattern, Some(&documents), |x| {
                let pieces = super::documents::sequences(pattern, &documents, Device::Cpu);
                crate::shim::document_attention(&x[0], &x[1], &x[2], &pieces).unwrap()
            });
            // Where each query has one key, the gradients of q and k are rounding.
            let unseen = sdpa::unseen(&Tensor::zeros(shape, (kind, Device::Cpu)), pattern, Some(&documents));
            let seen = unseen.logical_not().sum(Kind::Int64).int64_value(&[]);
            let one_key_each = seen == unseen.size()[0] * shape[2];
            assert!(one_key_each || off.iter().all(|&off| off < limit(kind)), "{pattern} {kind:?}: {off:?}");
        }
    }
}

#[test]
fn attention_with_a_mask_of_ones_is_attention() {
    for pattern in EDGES.map(|text| text.parse::<Pattern>().unwrap()) {
        let documents = documents(2, 70, 15, 6);
        for documents in [None, Some(documents.as_slice())] {
            let x: Vec<Tensor> = (0..3).map(|_| random([2, 3, 70, 4])).collect();
            let ones = Tensor::ones([2, 3, 70, 70], (Kind::Double, Device::Cpu));
            let got = attention_with_mask(&x[0], &x[1], &x[2], pattern, documents, &ones);
            assert!((got - reference(&x, pattern, documents)).abs().max().double_value(&[]) < 1e-12);
            let none = attention_with_mask(&x[0], &x[1], &x[2], pattern, documents, &ones.zeros_like());
            assert_eq!(none.abs().max().double_value(&[]), 0.0);
        }
    }
}

#[test]
fn a_number_that_is_none_reaches_what_sees_it_and_nothing_else() {
    let x: Vec<Tensor> = (0..3).map(|_| Tensor::randn([1, 1, 200, 16], (Kind::Float, Device::Cpu))).collect();
    let _ = x[1].narrow(2, 100, 1).fill_(f64::NAN);
    let out = attention(&x[0], &x[1], &x[2], Pattern::Banded(5), None);
    let bad = out.isnan().any_dim(3, false).view([-1]);
    let rows: Vec<i64> = (0..200).filter(|&i| bad.int64_value(&[i]) == 1).collect();
    assert_eq!(rows, [100, 101, 102, 103, 104]);
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let x = |t| Tensor::zeros([1, 1, t, 8], (Kind::Float, Device::Cpu));
    let error = kernel(&x(9), &x(8), &x(9), Pattern::Banded(2), None, false).unwrap_err().to_string();
    assert!(error.contains("three tensors [B, H, T, D]"), "{error}");
}

fn pattern() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        Just(Pattern::Dense),
        Just(Pattern::Bidirectional),
        (1usize..300).prop_map(Pattern::Banded),
        (1usize..300).prop_map(Pattern::Strided),
        (1usize..200, 1usize..200).prop_map(|(l, c)| Pattern::Fixed(l.max(c), l.min(c))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_pattern_equals_the_masked_softmax_for_any_shape(
        b in 1i64..3, h in 1i64..4, t in 1i64..260, d in 1i64..70, bf16: bool, documented: bool,
        mean in 1u64..100, pattern in pattern(), seed in 0i64..1000,
    ) {
        tch::manual_seed(seed);
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        let documents = documents(b, t, mean, seed as u64);
        check([b, h, t, d], kind, pattern, documented.then_some(documents.as_slice()));
    }
}
