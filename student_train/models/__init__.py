"""Student models: LLaVA families with pooling projectors, and vanilla models."""
