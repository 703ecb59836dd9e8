"""Say here what the loss is, and name the paper.  N targets, V vocabulary."""

import torch.nn.functional as F


def template(logits, targets, smoothing: float = 0.1):
    """Cross-entropy with label smoothing: put your idea in its place.  logits (N, V), targets (N) -> a mean over the targets

    Only training minimises it: validation is always the cross-entropy.
    """
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


LOSSES = {"template": template}
