"""Types, errors and strict JSON that everything else speaks; no transformers."""
