"""All blocks but those of the base model, one family a file; the registry of blocks and models; the contract they keep; and canvas.py, models that fill in a
story in any order."""
