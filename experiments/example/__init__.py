"""The Forgetting Transformer."""
