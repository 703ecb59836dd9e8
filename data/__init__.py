"""Data: sources of stories, packing them into rows, and the training set on disk."""
