"""What is loaded with transformers: checkpoints, processors, and their digests."""
