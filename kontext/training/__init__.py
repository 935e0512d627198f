"""Training of adapters: from cached batches to a LoRA file, resumable bit for bit."""
