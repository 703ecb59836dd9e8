"""All blocks but those of the base model, one family a file; the registry of blocks and models; and the contract they keep."""
