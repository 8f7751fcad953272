//! Tokenizers' tables of any bytes, as byte pairs and as WordPiece; what can be read encodes a text. Refuses to
//! know what they say.

#![no_main]

use dataloader::Tokenizer;
use libfuzzer_sys::fuzz_target;
use phalanx_fuzz::{file, require_place};

fuzz_target!(|bytes: &[u8]| {
    for name in ["table.tiktoken", "vocab.txt"] {
        let loaded = Tokenizer::load(&file(name, bytes)).map(|tokenizer| {
            let mut tokens = Vec::new();
            tokenizer.encode(b"The river ran under old stones, didn't it?\n\n  7 ships \xff", &mut tokens);
            assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocab_size()));
            tokenizer.decode(&tokens);
        });
        require_place(loaded.map_err(Into::into));
    }
});
