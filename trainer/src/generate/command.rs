//! `phalanx generate`: prompts from the command line, a file or standard input; texts to standard output, the rate
//! to standard error. Knows nothing of how tokens come about.

use super::{Generation, Sampling, generate};
use crate::error::TrainError;
use crate::model::Gpt;
use crate::trained::Trained;
use crate::weights::Parameters;
use clap::Args;
use dataloader::Tokenizer;
use ops::collectives::Communicator;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// `phalanx generate`
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A run's folder, or a checkpoint's
    pub model: PathBuf,
    /// A step instead of the newest
    #[arg(long)]
    pub step: Option<u64>,
    /// What to continue; without any prompt a new document is begun, or standard input continued
    #[arg(long, conflicts_with_all = ["prompts", "prompt_ids"])]
    pub prompt: Option<String>,
    /// Prompts, one a line; in a .jsonl file the "prompt" or "text" of each object
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_ids")]
    pub prompts: Option<PathBuf>,
    /// A prompt as token ids; the text is then printed as ids, too
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub prompt_ids: Option<Vec<i64>>,
    /// Tokens after which a text ends, if it does not end by itself
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub max_tokens: usize,
    /// Texts for each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub samples: usize,
    /// Divides the logits: below 1 likelier tokens, above 1 less likely ones; 0 is --greedy
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f64,
    /// Draw among the k likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 50)]
    pub top_k: usize,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Take the likeliest token
    #[arg(long)]
    pub greedy: bool,
    /// Seed of the draws: the same seed writes the same texts
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Texts written at a time; changes no text
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch: usize,
    /// Go on where a text would end by itself
    #[arg(long)]
    pub ignore_end: bool,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = named::<configs::Device>)]
    pub device: configs::Device,
    /// auto, fp32 or bf16
    #[arg(long, default_value = "fp32", value_parser = named::<configs::Dtype>)]
    pub dtype: configs::Dtype,
}

/// A value by the name that it has in a configuration.
pub(crate) fn named<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, String> {
    toml::Value::String(name.into()).try_into().map_err(|error: toml::de::Error| error.message().to_string())
}

/// Runs `phalanx generate`.
///
/// # Errors
/// No such model, prompts that cannot be read or that the model has no tokens for.
pub fn generate_command(args: &GenerateArgs, comm: &dyn Communicator) -> Result<(), TrainError> {
    let sampling = sampling(args)?;
    // First of all that touches libtorch: it looks once for the part of it that knows CUDA.
    let device = ops::device::select(args.device, comm.local_rank())?;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    ops::device::configure_process(args.threads.unwrap_or_else(cores).max(1));
    let trained = Trained::open(&args.model, args.step)?;
    if trained.config().model.is_masked() {
        return Err(TrainError::Refused {
            what: format!(
                "{} has model.objective = \"masked\": it finds what is hidden in a text, and writes no next token",
                args.model.display()
            ),
            hint: "phalanx finetune teaches it a task; a model with model.objective = \"causal\" writes"
                .into(),
        });
    }
    let tokenizer = if args.prompt_ids.is_some() { None } else { trained.tokenizer()? };
    let prompts = prompts(args, tokenizer.as_ref())?;
    check(&prompts, trained.config().model.vocab_size)?;
    let mut writer = Writer {
        model: trained.model(),
        parameters: trained.parameters(ops::device::dtype(args.dtype, device), device, comm)?,
        end: tokenizer
            .as_ref()
            .filter(|_| !args.ignore_end)
            .map(|tokenizer| i64::from(tokenizer.end_of_text())),
        tokenizer,
        sampling,
        max_tokens: args.max_tokens,
    };
    let started = Instant::now();
    let texts = prompts.len() * args.samples;
    let written = match (&prompts[..], args.samples) {
        ([prompt], 1) => writer.stream(prompt)?,
        _ => writer.lines(&prompts, args.samples, args.batch.max(1))?,
    };
    let (seconds, read) = (started.elapsed().as_secs_f64(), prompts.iter().map(Vec::len).sum::<usize>());
    let rate = written as f64 / seconds;
    let mut stderr = std::io::stderr();
    let s = |n: usize| if n == 1 { "" } else { "s" };
    let _ = writeln!(
        stderr,
        "{written} token{} in {seconds:.2} s, {rate:.1} tokens/s, with {read} token{} of prompts read ({texts} text{})",
        s(written),
        s(read),
        s(texts),
    );
    Ok(())
}

fn sampling(args: &GenerateArgs) -> Result<Sampling, TrainError> {
    let wrong = |flag: &str, got: f64, expected: &str| TrainError::Refused {
        what: format!("{flag} {got}, expected {expected}"),
        hint: "--temperature 0.8 --top-p 0.95 is usual; --greedy takes the likeliest token".into(),
    };
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(wrong("--temperature", args.temperature, "0 or more"));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(wrong("--top-p", args.top_p, "above 0 and at most 1"));
    }
    let temperature = if args.greedy { 0.0 } else { args.temperature };
    Ok(Sampling { temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed })
}

/// The prompts as ids. A document begins after the end of another: an empty prompt is that.
fn prompts(args: &GenerateArgs, tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<i64>>, TrainError> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(vec![ids.clone()]);
    }
    let tokenizer = tokenizer.ok_or_else(|| TrainError::Refused {
        what: format!("{} came without a tokenizer", args.model.display()),
        hint: "give the prompt as token ids: --prompt-ids 1,2,3".into(),
    })?;
    let texts = match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => vec![prompt.clone()],
        (None, Some(file)) => lines_of(file)?,
        (None, None) if std::io::stdin().is_terminal() => vec![String::new()],
        (None, None) => {
            let mut text = Vec::new();
            std::io::stdin().read_to_end(&mut text).map_err(TrainError::io("standard input"))?;
            vec![String::from_utf8_lossy(&text).into_owned()]
        }
    };
    let ids = |text: String| {
        let mut ids = Vec::new();
        tokenizer.encode(text.as_bytes(), &mut ids);
        if ids.is_empty() {
            ids.push(tokenizer.end_of_text());
        }
        ids.into_iter().map(i64::from).collect()
    };
    Ok(texts.into_iter().map(ids).collect())
}

fn lines_of(file: &Path) -> Result<Vec<String>, TrainError> {
    let text = std::fs::read_to_string(file).map_err(TrainError::io(file))?;
    let json = file.extension().is_some_and(|extension| extension == "jsonl");
    let prompt = |(number, line): (usize, &str)| {
        if !json {
            return Ok(line.to_string());
        }
        let object: Result<serde_json::Value, _> = serde_json::from_str(line);
        let found = object.ok().and_then(|object| {
            ["prompt", "text"].iter().find_map(|key| object[key].as_str().map(str::to_string))
        });
        found.ok_or_else(|| TrainError::Refused {
            what: format!("{}:{}: no object with a \"prompt\" or a \"text\"", file.display(), number + 1),
            hint: "each line is one object, like {\"prompt\": \"In the beginning\"}".into(),
        })
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !json || !line.trim().is_empty());
    let prompts = lines.map(prompt).collect::<Result<Vec<String>, TrainError>>()?;
    if prompts.is_empty() {
        let (what, hint) = (format!("{} has no prompts", file.display()), "one a line".into());
        return Err(TrainError::Refused { what, hint });
    }
    Ok(prompts)
}

fn check(prompts: &[Vec<i64>], vocab_size: usize) -> Result<(), TrainError> {
    let foreign = prompts.iter().flatten().find(|&&id| id < 0 || id >= vocab_size as i64);
    foreign.map_or(Ok(()), |id| {
        Err(TrainError::Refused {
            what: format!("token id {id} in a prompt; the model has ids 0 to {}", vocab_size - 1),
            hint: "phalanx data tokenize prints the ids of a text".into(),
        })
    })
}

/// A model that writes to standard output.
struct Writer<'a> {
    model: Gpt,
    parameters: Parameters<'a>,
    tokenizer: Option<Tokenizer>,
    sampling: Sampling,
    max_tokens: usize,
    end: Option<i64>,
}

impl Writer<'_> {
    fn generation(&self, first_text: usize) -> Generation {
        let (sampling, max_tokens, end) = (self.sampling, self.max_tokens, self.end);
        Generation { sampling, max_tokens, end, first_text: first_text as u32 }
    }

    /// One text, as it comes. Returns its tokens.
    fn stream(&mut self, prompt: &[i64]) -> Result<usize, TrainError> {
        let (how, tokenizer, mut stdout) = (self.generation(0), self.tokenizer.clone(), std::io::stdout());
        let (mut tokens, mut told) = (Vec::new(), 0);
        let mut each = |_: usize, token: i64| {
            tokens.push(token);
            let text = text_of(tokenizer.as_ref(), &tokens);
            // A reader who has gone has read enough; the exit code is that of the model.
            let _ = stdout.write_all(text.get(told..).unwrap_or_default()).and_then(|()| stdout.flush());
            told = text.len();
            true
        };
        let written = generate(&self.model, &mut self.parameters, &[prompt.to_vec()], &how, &mut each)?;
        let _ = writeln!(stdout);
        Ok(written[0].len())
    }

    /// Several texts, a line of JSON each, in the order of the prompts. Returns their tokens.
    fn lines(&mut self, prompts: &[Vec<i64>], samples: usize, batch: usize) -> Result<usize, TrainError> {
        let all: Vec<(usize, usize)> =
            (0..prompts.len()).flat_map(|prompt| (0..samples).map(move |sample| (prompt, sample))).collect();
        let (mut total, mut stdout) = (0, std::io::stdout());
        for (number, some) in all.chunks(batch).enumerate() {
            let how = self.generation(number * batch);
            let texts: Vec<Vec<i64>> = some.iter().map(|(prompt, _)| prompts[*prompt].clone()).collect();
            let written = generate(&self.model, &mut self.parameters, &texts, &how, &mut |_, _| true)?;
            for ((prompt, sample), tokens) in some.iter().zip(&written) {
                total += tokens.len();
                let text = text_of(self.tokenizer.as_ref(), tokens);
                let line = serde_json::json!({
                    "prompt": prompt,
                    "sample": sample,
                    "text": String::from_utf8_lossy(&text),
                    "tokens": tokens.len(),
                    "ended": tokens.len() < self.max_tokens,
                });
                let _ = writeln!(stdout, "{line}");
            }
        }
        Ok(total)
    }
}

/// Tokens as text; without a tokenizer as ids.
fn text_of(tokenizer: Option<&Tokenizer>, tokens: &[i64]) -> Vec<u8> {
    match tokenizer {
        Some(tokenizer) => {
            let ids: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
            tokenizer.decode(&ids)
        }
        None => tokens.iter().flat_map(|token| format!("{token} ").into_bytes()).collect(),
    }
}
