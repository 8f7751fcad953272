//! A run over several data sets: every rank sees its part of one order, whose shares are the weights'.

#![allow(clippy::unwrap_used)] // a test that cannot make its data has failed

use dataloader::{DataError, DataSet, DataSetWriter, Samples, Tokenizer};
use std::path::Path;
use tempfile::TempDir;

const WEIGHTS: [f64; 3] = [0.5, 0.3, 0.2];

/// A data set of `documents` documents that all begin with `name`.
fn write(folder: &Path, name: &str, documents: usize) {
    let mut writer = DataSetWriter::create(&folder.join(name), Tokenizer::Bytes, 1000).unwrap();
    for i in 0..documents {
        writer.push(0, i as u64 + 1, format!("{name} {i} ").repeat(5).as_bytes()).unwrap();
    }
    writer.finish(vec![format!("{name}.jsonl")]).unwrap();
}

fn mixture(weights: &[f64]) -> (TempDir, Samples) {
    let scratch = tempfile::tempdir().unwrap();
    let sources = ["large", "middle", "small"].into_iter().zip([200, 50, 10]).zip(weights);
    let sources = sources.map(|((name, documents), weight)| {
        write(scratch.path(), name, documents);
        (DataSet::open(&scratch.path().join(name)).unwrap(), *weight)
    });
    let samples = Samples::mixed(sources.collect(), 16, 1337).unwrap();
    (scratch, samples)
}

#[test]
fn ranks_together_see_what_one_rank_sees_of_a_mixture() {
    let (_scratch, samples) = mixture(&WEIGHTS);
    let steps = |world_size: usize| {
        let plan = configs::BatchPlan::new(24 * 2 * 16, 2, 16, world_size).unwrap();
        let mut tokens = Vec::new();
        for first in (0..40).map(|step| step * plan.samples_per_step()) {
            for rank in 0..world_size {
                for micro_step in 0..plan.grad_accum_steps {
                    tokens.extend(samples.batch(plan.samples(first, rank, micro_step)).unwrap().tokens);
                }
            }
        }
        tokens
    };
    let one = steps(1);
    for world_size in [2, 3, 4, 8] {
        assert_eq!(steps(world_size), one, "{world_size} ranks");
    }
}

#[test]
fn every_source_is_seen_epoch_after_epoch_as_if_it_were_alone() {
    let (scratch, samples) = mixture(&WEIGHTS);
    for (source, name) in ["large", "middle", "small"].into_iter().enumerate() {
        let alone = Samples::open(DataSet::open(&scratch.path().join(name)).unwrap(), 16, 1337).unwrap();
        let seen = (0..5000).map(|i| samples.sequence(i)).filter(|(of, _)| *of == source);
        let expected = (0..).map(|i| alone.sequence(i).1);
        assert!(seen.zip(expected).all(|((_, seen), expected)| seen == expected), "{name}");
    }
    let epochs = samples.epochs(5000);
    let sizes = samples.sources().map(|data| (data.tokens() - 1) / 16);
    for ((epochs, size), weight) in epochs.iter().zip(sizes).zip(WEIGHTS) {
        assert!((epochs * size as f64 - 5000.0 * weight).abs() < 2.0, "{epochs} of {size}");
    }
}

#[test]
fn passages_name_the_source_they_come_from() {
    let (scratch, samples) = mixture(&WEIGHTS);
    for passage in samples.documents(0..100) {
        let passage = passage.unwrap();
        let name = passage.document.file.strip_suffix(".jsonl").unwrap();
        assert_eq!(passage.source, Some(&*scratch.path().join(name)));
        assert!(passage.to_string().ends_with(&format!(" of {}", scratch.path().join(name).display())));
    }
}

#[test]
fn a_mixture_is_another_one_with_other_weights_and_one_source_is_known_by_its_own_digest() {
    let (scratch, samples) = mixture(&WEIGHTS);
    assert_ne!(samples.digest(), mixture(&[0.5, 0.3, 0.21]).1.digest());
    let data = || DataSet::open(&scratch.path().join("large")).unwrap();
    assert_eq!(Samples::open(data(), 16, 1).unwrap().digest(), data().digest());
}

#[test]
fn a_source_too_small_for_one_sample_is_refused_by_name() {
    let scratch = tempfile::tempdir().unwrap();
    write(scratch.path(), "large", 100);
    write(scratch.path(), "tiny", 1);
    let open = |name: &str| (DataSet::open(&scratch.path().join(name)).unwrap(), 1.0);
    let error = Samples::mixed(vec![open("large"), open("tiny")], 256, 1).unwrap_err();
    assert!(matches!(error, DataError::TooFewTokens { .. }) && error.to_string().contains("tiny"), "{error}");
}

#[test]
fn skipped_samples_of_a_mixture_are_passed_over() {
    let (_scratch, mut samples) = mixture(&WEIGHTS);
    let before = samples.batch(0..40).unwrap().tokens;
    samples.leave_out(std::iter::once(8..16).collect());
    let after = samples.batch(0..32).unwrap().tokens;
    assert_eq!(after, [&before[..8 * 17], &before[16 * 17..]].concat());
}
