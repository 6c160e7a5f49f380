"""Tensor arithmetic that knows no distillation."""
