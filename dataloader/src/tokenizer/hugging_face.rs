//! Tokenizers as the files that Hugging Face's libraries read, and back. Owns the mapping of bytes to the characters
//! that these files show them as; refuses to know models.

use super::bpe::Bpe;
use super::{TableKind, Tokenizer};
use rustc_hash::FxHashMap;
use serde_json::{Value, json};
use std::path::Path;

/// How other programs call the token that ends a document.
const END_OF_TEXT: &str = "<|endoftext|>";

impl Tokenizer {
    /// Names and contents of the files from which `AutoTokenizer.from_pretrained` makes this tokenizer, for a
    /// model of `seq_len` positions. There, unlike here, text that spells the end of a document becomes it.
    pub fn to_hugging_face(&self, seq_len: usize) -> Vec<(&'static str, String)> {
        let pretty = |value: &Value| serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
        if let Tokenizer::WordPiece(table) = self
            && let TableKind::WordPiece(vocabulary) = &table.kind
        {
            let about = json!({
                "tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": seq_len,
            });
            return vec![("vocab.txt", vocabulary.to_text()), ("tokenizer_config.json", pretty(&about))];
        }
        let about = json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len,
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": false,
        });
        let (tokens, merges) = self.table();
        let mut vocabulary: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| (shown(token), json!(id))).collect();
        let pairs: Vec<[String; 2]> =
            merges.iter().map(|pair| pair.map(|id| shown(&tokens[id as usize]))).collect();
        let lines: String = pairs.iter().map(|[left, right]| format!("{left} {right}\n")).collect();
        // Bytes are not divided into words: a word would be its bytes all the same.
        let words = !matches!(self, Tokenizer::Bytes);
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": words,
        });
        let end = json!({
            "id": self.end_of_text(), "content": END_OF_TEXT, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        });
        let whole = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": pairs,
            },
        });
        vocabulary.insert(END_OF_TEXT.into(), json!(self.end_of_text()));
        vec![
            ("tokenizer.json", pretty(&whole)),
            ("tokenizer_config.json", pretty(&about)),
            ("vocab.json", pretty(&Value::Object(vocabulary))),
            ("merges.txt", format!("#version: 0.2\n{lines}")),
        ]
    }

    /// The bytes of every token but the last, which ends a document, by id. A WordPiece has none.
    pub fn tokens(&self) -> Vec<Vec<u8>> {
        self.table().0
    }

    /// The tokens of a byte-pair encoding, and its merges in their order.
    fn table(&self) -> (Vec<Vec<u8>>, Vec<[u32; 2]>) {
        let of = |table: &Bpe| {
            let token = |id| table.token(id).unwrap_or_default().to_vec();
            ((0..table.end_of_text()).map(token).collect(), table.merges())
        };
        match self {
            Tokenizer::Bytes => ((0..=255).map(|byte| vec![byte]).collect(), Vec::new()),
            Tokenizer::Gpt2 => of(Bpe::gpt2()),
            Tokenizer::Bpe(table) | Tokenizer::WordPiece(table) => match &table.kind {
                TableKind::Bpe(table) => of(table),
                TableKind::WordPiece(_) => (Vec::new(), Vec::new()),
            },
        }
    }

    /// The tokenizer in a folder of such files.
    ///
    /// # Errors
    /// Why none of the tokenizers here is it.
    pub fn from_hugging_face(folder: &Path) -> Result<Tokenizer, String> {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let json = |text: &str| serde_json::from_str::<Value>(text).map_err(|error| error.to_string());
        let wordpiece = folder.join("vocab.txt");
        if wordpiece.is_file() {
            return Tokenizer::load(&wordpiece).map_err(|error| error.to_string());
        }
        let (vocabulary, merges) = match (read("tokenizer.json"), read("vocab.json"), read("merges.txt")) {
            (Some(whole), ..) => {
                let whole = json(&whole)?;
                let pre = whole["pre_tokenizer"].to_string();
                if whole["model"]["type"] != "BPE"
                    || !pre.contains("ByteLevel")
                    || !whole["normalizer"].is_null()
                {
                    return Err("tokenizer.json is no byte-level BPE".into());
                }
                (whole["model"]["vocab"].clone(), merges_of(&whole["model"]["merges"])?)
            }
            (None, Some(vocabulary), Some(merges)) => {
                let lines = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty());
                let merges = lines.map(|line| line.split_once(' ').map(owned)).collect::<Option<Vec<_>>>();
                (json(&vocabulary)?, merges.ok_or("merges.txt has a line that is no pair")?)
            }
            _ => {
                return Err("it has no tokenizer.json, no vocab.json with merges.txt and no vocab.txt".into());
            }
        };
        of_table(&vocabulary, &merges)
    }
}

fn owned((left, right): (&str, &str)) -> [String; 2] {
    [left.to_string(), right.to_string()]
}

/// Pairs, or as older files have them, two tokens with a space in between.
fn merges_of(merges: &Value) -> Result<Vec<[String; 2]>, String> {
    let pair = |merge: &Value| match (merge.as_str(), merge[0].as_str(), merge[1].as_str()) {
        (Some(text), ..) => text.split_once(' ').map(owned),
        (None, Some(left), Some(right)) => Some(owned((left, right))),
        _ => None,
    };
    let all: Option<Vec<_>> = merges.as_array().into_iter().flatten().map(pair).collect();
    all.ok_or_else(|| "tokenizer.json has a merge that is no pair".into())
}

fn of_table(vocabulary: &Value, merges: &[[String; 2]]) -> Result<Tokenizer, String> {
    let vocabulary = vocabulary.as_object().ok_or("the vocabulary is no object")?;
    let bytes: FxHashMap<char, u8> = alphabet().iter().copied().zip(0..=255).collect();
    let mut tokens: Vec<(u64, Vec<u8>)> = Vec::new();
    for (token, id) in vocabulary.iter().filter(|(token, _)| token.as_str() != END_OF_TEXT) {
        let id = id.as_u64().ok_or_else(|| format!("token {token:?} has no id"))?;
        let token: Option<Vec<u8>> = token.chars().map(|c| bytes.get(&c).copied()).collect();
        tokens.push((id, token.ok_or("a token has characters that stand for no byte")?));
    }
    tokens.sort_unstable();
    if tokens.iter().enumerate().any(|(place, (id, _))| *id != place as u64) {
        return Err("its ids are not 0, 1, 2, … without a gap".into());
    }
    let tokens: Vec<Vec<u8>> = tokens.into_iter().map(|(_, token)| token).collect();
    if merges.is_empty() && tokens == Tokenizer::Bytes.tokens() {
        return Ok(Tokenizer::Bytes);
    }
    let found = Tokenizer::bpe(tokens)?;
    let (own, own_merges) = found.table();
    let same = own_merges.iter().map(|pair| pair.map(|id| shown(&own[id as usize])));
    if !same.eq(merges.iter().cloned()) {
        return Err("its ids are not in the order of its merges".into());
    }
    Ok(if own == Tokenizer::Gpt2.tokens() { Tokenizer::Gpt2 } else { found })
}

/// Bytes as the characters that stand for them.
fn shown(bytes: &[u8]) -> String {
    let alphabet = alphabet();
    bytes.iter().map(|&byte| alphabet[byte as usize]).collect()
}

/// The character of every byte: printable ones stand for themselves, all others for characters from U+0100 on.
fn alphabet() -> [char; 256] {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut hidden = (0x100..).filter_map(char::from_u32);
    std::array::from_fn(|byte| match byte as u8 {
        byte if printable(&byte) => byte as char,
        _ => hidden.next().unwrap_or('\u{FFFD}'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{WordCounts, train};

    fn written(tokenizer: &Tokenizer) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in tokenizer.to_hugging_face(128) {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    #[test]
    fn a_tokenizer_comes_back_from_hugging_faces_files() {
        let mut counts = WordCounts::default();
        counts.add("the king and the river ran ".repeat(20).as_bytes());
        let own = Tokenizer::bpe(train(counts, 290)).unwrap();
        for tokenizer in [Tokenizer::Bytes, Tokenizer::Gpt2, own] {
            let folder = written(&tokenizer);
            assert_eq!(Tokenizer::from_hugging_face(folder.path()).unwrap(), tokenizer);
            std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
            assert_eq!(
                Tokenizer::from_hugging_face(folder.path()).unwrap(),
                tokenizer,
                "from the older files"
            );
        }
    }

    #[test]
    fn gpt2s_merges_are_openais() {
        let merges = Tokenizer::Gpt2.to_hugging_face(1024).pop().unwrap().1;
        assert_eq!(merges.lines().skip(1).collect::<Vec<_>>(), super::super::bpe::gpt2_merges());
    }

    #[test]
    fn what_is_none_of_these_tokenizers_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = || Tokenizer::from_hugging_face(folder.path()).unwrap_err();
        assert!(refusal().contains("no tokenizer.json"));
        let write = |text: &str| std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
        write("{\"model\": {\"type\": \"Unigram\"}}");
        assert!(refusal().contains("no byte-level BPE"));
        let of =
            |model: &str| format!("{{\"pre_tokenizer\": {{\"type\": \"ByteLevel\"}}, \"model\": {model}}}");
        write(&of("{\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 2}, \"merges\": []}"));
        assert!(refusal().contains("without a gap"));
        write("{");
        assert!(refusal().contains("EOF"));
    }
}
