"""From text to tokens and back: tokenizer, sampling, streaming, chat templates."""
