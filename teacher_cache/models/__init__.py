"""What transformers gives: checkpoints, chat templates, token positions, view geometry, batches."""
