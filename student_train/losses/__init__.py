"""The objective of a step: the only room that knows both matching and divergence."""
