"""The presets of this experiment: `python train.py --preset template/template`."""

from dataclasses import replace

from runs.presets import Preset, preset

BASE = preset("0.5m_short_and_thick")  # what it is compared with
PLUGINS = ("experiments.templates.loss.losses",)

PRESETS = {
    "template": Preset(replace(BASE.model, plugins=PLUGINS), replace(BASE.train, loss="template(smoothing=0.1)")),
}
