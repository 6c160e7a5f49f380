"""The trainer, FSDP, checkpoints and the log of a run."""
