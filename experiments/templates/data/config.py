"""The presets of this experiment: `python train.py --preset template/template`."""

from dataclasses import replace

from runs.presets import Preset, preset

BASE = preset("0.5m_short_and_thick")  # what it is compared with
PLUGINS = ("experiments.templates.data.sources",)

PRESETS = {
    "template": Preset(
        replace(BASE.model, plugins=PLUGINS), replace(BASE.train, data="Template(data='tinystories', share=0.05)")
    ),
}
