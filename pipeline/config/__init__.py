"""The settings of the stages; imports nothing heavy."""
