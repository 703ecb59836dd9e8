"""The presets of this experiment: `python train.py --preset diffuseq/diffuseq`."""

from dataclasses import replace

from config import ModelConfig
from runs.presets import Preset, preset

# About as many weights as the preset quick, which it is compared with, and trained as that one.
PRESETS = {
    "diffuseq": Preset(
        ModelConfig(
            num_layers=4, layers="Norm->FullAttn->+->Norm->MLP->+", activation="ReLU2", gated=False, qk_norm=True, zero_init=True,
            model="DiffuSeq", plugins=("experiments.diffuseq.models",),
        ),
        replace(preset("quick").train, packing="padded", batch_size=8, compile=False),
    ),
}  # fmt: skip
