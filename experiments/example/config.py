"""The presets of this experiment: `python train.py --preset example/forgetting`."""

from dataclasses import replace

from runs.presets import Preset, preset

BASE = preset("0.5m_short_and_thick")  # what it is compared with

PRESETS = {
    "forgetting": Preset(
        replace(
            BASE.model, layers="Norm->ForgettingAttn->+->Norm->MLP->+", positions="none", plugins=("experiments.example.blocks",)
        ),
        BASE.train,
    ),
}
