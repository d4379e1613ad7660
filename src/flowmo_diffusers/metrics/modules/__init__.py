"""What is measured, as `evaluate` modules: each file can be given to `evaluate.load`."""
