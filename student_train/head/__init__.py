"""The LM head and the losses on its logits, fused and computed chunk by chunk."""
