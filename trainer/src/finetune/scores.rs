//! How predictions are judged: accuracy, F1, Matthews', Pearson's and Spearman's correlation, and the loss. Plain
//! arithmetic on outputs and answers; knows no model.

use configs::{Metric, TaskConfig};
use dataloader::Answer;
use std::collections::BTreeMap;

/// What a model says of an example: its outputs, and what follows from them.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// One for each class or choice, or one number.
    pub outputs: Vec<f64>,
}

impl Prediction {
    /// The likeliest class or choice; the first of equals.
    pub fn class(&self) -> usize {
        let mut best = 0;
        for (class, output) in self.outputs.iter().enumerate() {
            if *output > self.outputs[best] {
                best = class;
            }
        }
        best
    }

    /// Of each class or choice, by a softmax.
    pub fn probabilities(&self) -> Vec<f64> {
        let most = self.outputs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let parts: Vec<f64> = self.outputs.iter().map(|output| (output - most).exp()).collect();
        let sum: f64 = parts.iter().sum();
        parts.iter().map(|part| part / sum).collect()
    }

    /// Cross-entropy in nats, or the squared error of a number.
    fn loss(&self, answer: Answer) -> f64 {
        match answer {
            Answer::Class(class) => -self.probabilities()[class].ln(),
            Answer::Number(number) => (self.outputs[0] - number).powi(2),
        }
    }
}

/// Mean loss and the task's metrics, by name, of predictions against their answers, as many and at least one.
pub fn scores(
    task: &TaskConfig,
    predictions: &[Prediction],
    answers: &[Answer],
) -> (f64, BTreeMap<String, f64>) {
    let losses: f64 = predictions.iter().zip(answers).map(|(said, right)| said.loss(*right)).sum();
    let numbers = answers.iter().map(|answer| match answer {
        Answer::Class(class) => *class as f64,
        Answer::Number(number) => *number,
    });
    let numbers: Vec<f64> = numbers.collect();
    let said: Vec<f64> = predictions.iter().map(|prediction| prediction.outputs[0]).collect();
    let pairs: Vec<(usize, usize)> =
        predictions.iter().zip(&numbers).map(|(said, &right)| (said.class(), right as usize)).collect();
    let n_classes = task.outputs();
    let scores = task.metrics.iter().map(|metric| {
        let value = match metric {
            Metric::Accuracy => accuracy(&pairs),
            Metric::F1 => f1(&pairs, n_classes),
            Metric::Matthews => matthews(&pairs, n_classes),
            Metric::Pearson => pearson(&said, &numbers),
            Metric::Spearman => pearson(&ranks(&said), &ranks(&numbers)),
        };
        (metric.name().to_string(), value)
    });
    (losses / predictions.len() as f64, scores.collect())
}

fn accuracy(pairs: &[(usize, usize)]) -> f64 {
    pairs.iter().filter(|(said, right)| said == right).count() as f64 / pairs.len() as f64
}

/// F1 of the last of two classes, or the mean over all of more; of a class that is neither said nor there, 0.
fn f1(pairs: &[(usize, usize)], n_classes: usize) -> f64 {
    let of = |class: usize| {
        let count = |is: &dyn Fn(bool, bool) -> bool| {
            pairs.iter().filter(|(said, right)| is(*said == class, *right == class)).count() as f64
        };
        let (hits, errors) = (count(&|said, right| said && right), count(&|said, right| said != right));
        if hits > 0.0 { 2.0 * hits / (2.0 * hits + errors) } else { 0.0 }
    };
    if n_classes <= 2 { of(1) } else { (0..n_classes).map(of).sum::<f64>() / n_classes as f64 }
}

/// Gorodkin 2004 (R_K), which with two classes is Matthews' coefficient; 0 where all say or are the same.
fn matthews(pairs: &[(usize, usize)], n_classes: usize) -> f64 {
    let n = pairs.len() as f64;
    let right = pairs.iter().filter(|(said, right)| said == right).count() as f64;
    let (mut said, mut there) = (vec![0.0; n_classes], vec![0.0; n_classes]);
    for &(guess, truth) in pairs {
        said[guess] += 1.0;
        there[truth] += 1.0;
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let spread = (n * n - dot(&said, &said)) * (n * n - dot(&there, &there));
    if spread > 0.0 { (right * n - dot(&said, &there)) / spread.sqrt() } else { 0.0 }
}

/// 0 where one side does not vary.
fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut both, mut of_a, mut of_b) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        both += (x - mean_a) * (y - mean_b);
        of_a += (x - mean_a).powi(2);
        of_b += (y - mean_b).powi(2);
    }
    if of_a > 0.0 && of_b > 0.0 { both / (of_a * of_b).sqrt() } else { 0.0 }
}

/// The rank of each value, equals sharing the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    for equal in order.chunk_by(|&i, &j| values[i] == values[j]) {
        // Those below, and half of those beside.
        let below = order.iter().position(|i| i == &equal[0]).unwrap_or(0) as f64;
        equal.iter().for_each(|&i| ranks[i] = below + (equal.len() - 1) as f64 / 2.0);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-9, "{got}, expected {expected}");
    }

    #[test]
    fn classes_are_scored_by_hits_false_alarms_and_misses() {
        // Counted by hand: of classes 0, 1 and 2 there are 2, 1 and 2 hits, and 1, 3 and 2 errors.
        let pairs = [(0, 0), (2, 1), (2, 2), (2, 2), (1, 1), (0, 0), (0, 1), (1, 2)];
        close(accuracy(&pairs), 0.625);
        close(f1(&pairs, 3), (0.8 + 0.4 + 2.0 / 3.0) / 3.0);
        close(matthews(&pairs, 3), (5.0 * 8.0 - 21.0) / (42.0f64 * 42.0).sqrt());
        // Two classes: 3 hits, 1 false alarm, 2 misses, 4 rejections.
        let two: Vec<(usize, usize)> =
            [vec![(1, 1); 3], vec![(1, 0)], vec![(0, 1); 2], vec![(0, 0); 4]].concat();
        close(f1(&two, 2), 6.0 / 9.0);
        close(matthews(&two, 2), (3.0 * 4.0 - 2.0) / (4.0f64 * 5.0 * 5.0 * 6.0).sqrt());
        close(matthews(&[(1, 1), (1, 0)], 2), 0.0);
    }

    #[test]
    fn numbers_are_correlated_as_they_are_or_by_their_ranks() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0]);
        close(pearson(&a, &b), 25.0 / (5.0f64 * 129.0).sqrt());
        close(pearson(&ranks(&a), &ranks(&b)), 1.0);
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [2.5, 0.0, 2.5, 1.0]);
        close(pearson(&a, &[5.0; 4]), 0.0);
    }

    #[test]
    fn a_prediction_is_its_largest_output_and_its_loss_what_that_misses() {
        let said = Prediction { outputs: vec![0.0, 2.0f64.ln(), 0.0] };
        assert_eq!(said.class(), 1);
        close(said.probabilities()[1], 0.5);
        close(said.loss(Answer::Class(0)), 4.0f64.ln());
        close(Prediction { outputs: vec![2.5] }.loss(Answer::Number(1.0)), 2.25);
    }
}
