"""All blocks but those of the base model, one family a file; the registry of blocks and models; and the contracts they keep.

contract.py        check_block: what every block promises
model_contract.py  check_model, try_out: what every model promises; model_trial.py has the copies and inputs to try it with
cached_decoding.py cache_is_exact: whether a model may write with a cache
blame.py           which module an error or a difference comes from
explain.py         explain: an error in a reader's own code in one line
canvas.py         a base class of models that fill in a story in any order
"""
