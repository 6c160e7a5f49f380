"""The settings of a training run; imports nothing heavy."""
