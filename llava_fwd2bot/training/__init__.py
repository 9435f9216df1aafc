"""Training: arguments, data, collator, trainer, and the command that joins them."""
