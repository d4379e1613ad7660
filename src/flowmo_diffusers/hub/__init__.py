"""Published checkpoints in, model cards and Hub layouts out."""
