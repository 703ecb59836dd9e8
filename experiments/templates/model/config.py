"""The presets of this experiment: `python train.py --preset template/template`."""

from dataclasses import replace

from runs.presets import Preset, preset

BASE = preset("0.5m_short_and_thick")  # what it is compared with
PLUGINS = ("experiments.templates.model.models",)

PRESETS = {
    "template": Preset(replace(BASE.model, model="Template(scale=2.0)", plugins=PLUGINS), BASE.train),
}
