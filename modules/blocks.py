"""The menu of blocks beside those of the base model: one family a file, each with its BLOCKS.

They plug in as an experiment does, by name in the layer string; see model.py for what a block may ask for.
"""

from modules import (
    attention,
    convolution,
    cross_attention,
    deltanet,
    embeddings,
    griffin,
    latent_attention,
    linear_attention,
    mamba,
    mamba2,
    megalodon,
    moe,
    moving_average,
    residual,
    sparse_attention,
    values,
)

BLOCKS = (
    attention.BLOCKS
    | latent_attention.BLOCKS
    | sparse_attention.BLOCKS
    | cross_attention.BLOCKS
    | linear_attention.BLOCKS
    | deltanet.BLOCKS
    | griffin.BLOCKS
    | mamba.BLOCKS
    | mamba2.BLOCKS
    | moving_average.BLOCKS
    | megalodon.BLOCKS
    | moe.BLOCKS
    | residual.BLOCKS
    | values.BLOCKS
    | convolution.BLOCKS
    | embeddings.BLOCKS
)
