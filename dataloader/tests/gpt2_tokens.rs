//! GPT-2's ids are those of OpenAI's tiktoken: on every code point up to U+1FFFF in three contexts, and on
//! 2,000 odd strings (`tests/reference/tokens_golden.py`).

#![allow(clippy::unwrap_used)] // a test that cannot read its golden values has failed

use dataloader::Tokenizer;
use std::path::Path;

#[derive(serde::Deserialize)]
struct Golden {
    contexts: Vec<String>,
    block: u32,
    checksums: Vec<u32>,
    odd: Vec<(String, Vec<u32>)>,
}

fn golden() -> Golden {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/gpt2-tokens.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn every_code_point_in_every_context_has_the_ids_of_tiktoken() {
    let golden = golden();
    let mut encoder = Tokenizer::Gpt2.encoder();
    let mut checksums = golden.checksums.iter();
    for context in &golden.contexts {
        for first in (0..0x20000).step_by(golden.block as usize) {
            let mut hasher = crc32fast::Hasher::new();
            for c in (first..first + golden.block).filter_map(char::from_u32) {
                let mut tokens = Vec::new();
                encoder.encode(context.replace("%s", &c.to_string()).as_bytes(), &mut tokens);
                tokens.iter().for_each(|token| hasher.update(&token.to_le_bytes()));
            }
            assert_eq!(hasher.finalize(), *checksums.next().unwrap(), "{context:?} from U+{first:04X} on");
        }
    }
    assert_eq!(checksums.next(), None);
}

#[test]
fn odd_strings_have_the_ids_of_tiktoken_and_decode_to_themselves() {
    let golden = golden();
    assert_eq!(golden.odd.len(), 2000);
    let mut encoder = Tokenizer::Gpt2.encoder();
    for (text, expected) in golden.odd {
        let mut tokens = Vec::new();
        encoder.encode(text.as_bytes(), &mut tokens);
        assert_eq!(tokens, expected, "{text:?}");
        assert_eq!(Tokenizer::Gpt2.decode(&tokens), text.as_bytes());
    }
}
