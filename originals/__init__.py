"""Published models of Hugging Face transformers, loaded into ours.

load.py       load_original, convert: a checkpoint or a model of theirs as a GPT of ours
attention.py  FAMILIES: the tables of names for models with attention alone, and the helpers of all tables
              (mamba.py, recurrent.py and delta.py hold those of the other families)
"""
