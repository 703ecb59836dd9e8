"""Load published models of Hugging Face transformers as models of ours.

load.py       load_original, convert: turn a checkpoint or a transformers model into our GPT
attention.py  FAMILIES: configs and weight names of attention models; helpers for all families
              (mamba.py, recurrent.py and delta.py: the other families)
"""
