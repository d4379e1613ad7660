"""The demo page: a tokenizer, and a generator of its tokens, to be tried in a browser."""
