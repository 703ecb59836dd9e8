"""All blocks but those of the base model, one family a file; the registry of blocks and models; and the contract they keep.

canvas.py is a base class of models that fill in a story in any order.
"""
