//! `phalanx data filter`, `classify`, `dedup` and `decontaminate`, and the same as stages of `prepare`.

use super::progress;
use super::table::grouped;
use super::tokenize::TextArgs;
use anyhow::Result;
use clap::Args;
use dataloader::{
    Classifier, Contamination, Curation, CurationReport, DataError, DedupOptions, Filter, Gate, Inputs,
    all_threads, curate, train_classifier,
};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where what is kept goes.
#[derive(Debug, Args)]
pub struct OutArgs {
    /// Text to read.
    #[command(flatten)]
    pub text: TextArgs,
    /// JSON lines of the documents that are kept: .jsonl, .jsonl.gz or .jsonl.zst.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// What was dropped and why, as JSON [default: FILE.report.json].
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// Rules of the filter.
#[derive(Debug, Default, Args)]
pub struct FilterArgs {
    /// Keep documents whose KEY is a number of at least N: score=3 is WebText's rule.
    #[arg(long, value_name = "KEY=N", value_parser = key_and_number)]
    pub min: Vec<(String, f64)>,
    /// Drop documents whose KEY an earlier one has, such as url.
    #[arg(long, value_name = "KEY")]
    pub unique: Option<String>,
    /// Fewest characters.
    #[arg(long, value_name = "N")]
    pub min_characters: Option<usize>,
    /// Most characters.
    #[arg(long, value_name = "N")]
    pub max_characters: Option<usize>,
    /// Smallest share of letters, spaces left out.
    #[arg(long, value_name = "F")]
    pub min_letters: Option<f64>,
    /// Largest share of lines that stand in the text before.
    #[arg(long, value_name = "F")]
    pub max_repeated_lines: Option<f64>,
}

impl FilterArgs {
    fn filter(&self) -> Option<Filter> {
        let filter = Filter {
            min: self.min.clone(),
            min_characters: self.min_characters,
            max_characters: self.max_characters,
            min_letters: self.min_letters,
            max_repeated_lines: self.max_repeated_lines,
        };
        (filter != Filter::default()).then_some(filter)
    }
}

fn key_and_number(text: &str) -> Result<(String, f64), String> {
    let (key, number) = text.split_once('=').ok_or("expected KEY=N, such as score=3")?;
    let number = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    Ok((key.to_string(), number))
}

/// The stages of a curation, for `prepare`.
#[derive(Debug, Default, Args)]
pub struct CurationArgs {
    /// Rules of the filter.
    #[command(flatten)]
    pub filter: FilterArgs,
    /// Keep documents by their score, as `phalanx data classify` does.
    #[arg(long, value_name = "FILE")]
    pub classifier: Option<PathBuf>,
    /// Drop documents that share 13 words in a row with these evaluation sets.
    #[arg(long, value_name = "FILE")]
    pub decontaminate: Vec<PathBuf>,
    /// Drop documents with the same, or nearly the same, text as an earlier one.
    #[arg(long)]
    pub dedup: bool,
}

impl CurationArgs {
    pub(super) fn curation(&self, text: &TextArgs) -> Result<Curation> {
        let gate = self.classifier.as_ref().map(|file| {
            let classifier = Classifier::load(file)?;
            Ok::<_, DataError>(Gate { classifier, alpha: Gate::ALPHA, seed: 0 })
        });
        let contamination = (!self.decontaminate.is_empty()).then(|| {
            Contamination::with(&named(&self.decontaminate, text), Contamination::WORDS, text.threads())
        });
        let by = self.filter.unique.clone();
        let dedup = (self.dedup || by.is_some()).then(|| DedupOptions {
            by,
            exact: self.dedup,
            near: self.dedup.then_some(NEAR),
        });
        let (gate, contamination) = (gate.transpose()?, contamination.transpose()?);
        Ok(Curation { filter: self.filter.filter(), gate, contamination, dedup })
    }
}

/// Jaccard overlap of near duplicates.
const NEAR: f64 = 0.8;

fn named(files: &[PathBuf], text: &TextArgs) -> Inputs {
    Inputs { text_key: text.text_key.clone(), ..Inputs::new(files) }
}

/// `phalanx data filter`
#[derive(Debug, Args)]
pub struct RunFilterArgs {
    /// From where to where.
    #[command(flatten)]
    pub io: OutArgs,
    /// Rules.
    #[command(flatten)]
    pub filter: FilterArgs,
}

pub(super) fn run_filter(args: &RunFilterArgs, out: &mut impl Write) -> Result<()> {
    let by = args.filter.unique.clone();
    let dedup = by.map(|by| DedupOptions { by: Some(by), exact: false, near: None });
    run(&args.io, &Curation { filter: args.filter.filter(), dedup, ..Curation::default() }, out)
}

/// `phalanx data dedup`
#[derive(Debug, Args)]
pub struct DedupArgs {
    /// From where to where.
    #[command(flatten)]
    pub io: OutArgs,
    /// Share of word triples (Jaccard) from which on two documents are nearly the same.
    #[arg(long, value_name = "F", default_value_t = NEAR)]
    pub threshold: f64,
    /// Only documents with exactly the same text.
    #[arg(long)]
    pub exact_only: bool,
}

pub(super) fn run_dedup(args: &DedupArgs, out: &mut impl Write) -> Result<()> {
    let near = (!args.exact_only).then_some(args.threshold);
    let dedup = Some(DedupOptions { by: None, exact: true, near });
    run(&args.io, &Curation { dedup, ..Curation::default() }, out)
}

/// `phalanx data decontaminate`
#[derive(Debug, Args)]
pub struct DecontaminateArgs {
    /// From where to where.
    #[command(flatten)]
    pub io: OutArgs,
    /// Evaluation sets, files of text like the others.
    #[arg(long, value_name = "FILE", required = true)]
    pub against: Vec<PathBuf>,
    /// Words in a row that are an overlap.
    #[arg(long, value_name = "N", default_value_t = Contamination::WORDS)]
    pub words: usize,
}

pub(super) fn run_decontaminate(args: &DecontaminateArgs, out: &mut impl Write) -> Result<()> {
    let text = &args.io.text;
    let contamination = Contamination::with(&named(&args.against, text), args.words, text.threads())?;
    writeln!(
        out,
        "{} evaluation documents, {} of them with fewer than {} words, which are not looked for",
        grouped(contamination.documents),
        grouped(contamination.too_short),
        args.words
    )?;
    run(&args.io, &Curation { contamination: Some(contamination), ..Curation::default() }, out)
}

/// `phalanx data classify`
#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// From where to where.
    #[command(flatten)]
    pub io: OutArgs,
    /// What `phalanx data train-classifier` has made.
    #[arg(long, value_name = "FILE")]
    pub classifier: PathBuf,
    /// Keep a document iff pareto(A) > 1 - score; GPT-3's is 9.
    #[arg(long, value_name = "A", default_value_t = Gate::ALPHA)]
    pub alpha: f64,
    /// Seed of the random numbers, which are counted by the text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

pub(super) fn run_classify(args: &ClassifyArgs, out: &mut impl Write) -> Result<()> {
    let classifier = Classifier::load(&args.classifier)?;
    let gate = Some(Gate { classifier, alpha: args.alpha, seed: args.seed });
    run(&args.io, &Curation { gate, ..Curation::default() }, out)
}

/// `phalanx data train-classifier`
#[derive(Debug, Args)]
pub struct TrainClassifierArgs {
    /// Text of the quality that is wanted.
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub good: Vec<PathBuf>,
    /// Text as it comes.
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub raw: Vec<PathBuf>,
    /// Key of JSON objects, or column of tables, that holds the text.
    #[arg(long, value_name = "KEY", default_value = dataloader::TEXT_KEY)]
    pub text_key: String,
    /// Where to write the classifier.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

pub(super) fn run_train_classifier(args: &TrainClassifierArgs, out: &mut impl Write) -> Result<()> {
    let inputs = |files: &[PathBuf]| Inputs { text_key: args.text_key.clone(), ..Inputs::new(files) };
    let (classifier, report) = train_classifier(&inputs(&args.good), &inputs(&args.raw), all_threads())?;
    classifier.save(&args.out)?;
    writeln!(
        out,
        "{}: learnt from {} good and {} other documents; right about {:.1} % of those kept for the test",
        args.out.display(),
        grouped(report.good),
        grouped(report.raw),
        100.0 * report.accuracy
    )?;
    Ok(())
}

fn run(io: &OutArgs, curation: &Curation, out: &mut impl Write) -> Result<()> {
    let (inputs, _spool) = io.text.inputs(Some(&io.out))?;
    let report = progress::shown(&inputs, || curate(&inputs, curation, &io.out, io.text.threads()))?;
    print(&report, out)?;
    let beside = || {
        let mut name = io.out.as_os_str().to_owned();
        name.push(".report.json");
        PathBuf::from(name)
    };
    write_report(&report, &io.report.clone().unwrap_or_else(beside))
}

/// What was kept and dropped, and an example of each reason.
pub(super) fn print(report: &CurationReport, out: &mut impl Write) -> Result<()> {
    writeln!(out, "{} documents, {} kept", grouped(report.read), grouped(report.kept))?;
    for (reason, count) in &report.dropped {
        writeln!(out, "{:>12} dropped: {reason}", grouped(*count))?;
        if let Some(example) = report.examples.iter().find(|example| example.reason == *reason) {
            let detail = example.detail.as_ref().map_or(String::new(), |detail| format!(" ({detail})"));
            writeln!(out, "{:>15}such as {} record {}{detail}", "", example.file, example.record)?;
        }
    }
    Ok(())
}

pub(super) fn write_report(report: &CurationReport, file: &Path) -> Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    let failed = |source| DataError::Io { file: file.into(), action: "written", source };
    Ok(std::fs::write(file, json + "\n").map_err(failed)?)
}
