"""Promises of training/configure.py: what a model must support, and that less memory changes no number."""

from dataclasses import replace

import pytest
import torch
from errors import one_line_error

import fast
from config import PRE_NORM, TrainConfig
from conftest import MODEL
from model import GPT, IGNORE, Layer
from modules.registry import build_model
from training.configure import CheckpointedLayer, configure_for_training

U_NET = (f"{PRE_NORM}->SkipOut", f"SkipIn->|->{PRE_NORM}")
HYPER_CONNECTIONS = "HyperRead->Norm->Attn->HyperWrite->HyperRead->Norm->MLP->HyperWrite"
VOCAB_SIZE = 50
LESS = TrainConfig(gradient_checkpointing=True)
OWN = {name: replace(MODEL, model=name, plugins=("own_models",)) for name in ("Recurrent", "Trigram")}


def step(model, window=None):
    """The loss of a step on packed stories, all gradients, and the bytes that are kept for the backward pass."""
    tokens = torch.randint(VOCAB_SIZE, (3, 32), generator=torch.Generator().manual_seed(0))
    story_ids = (torch.arange(32) // 10).expand(3, 32)
    kept = {}

    def count(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _, loss = model(tokens, tokens.masked_fill(tokens < 5, IGNORE), story_ids=story_ids, window=window)
    loss.backward()
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in model.parameters()]
    return loss.detach(), gradients, sum(kept.values())


SHARED_BY_LAYERS = {
    "plain": PRE_NORM,
    "parallel": [PRE_NORM, "Norm->MLP->+"],
    "skips": U_NET,
    "hyper": HYPER_CONNECTIONS,
    "hyper_across_layers": ("HyperRead->Norm->Attn", "HyperWrite->HyperRead->Norm->MLP->HyperWrite"),
    "values": "Shortcut->|->Norm->ValueAttn->+->Norm->MLP->+",
    "experts": "Norm->Attn->+->Norm->MoE(num_experts=3, noise=0.5, z_loss=0.01)->+",
    "recurrent": "Norm->Mamba->+->Norm->GatedDeltaNet->+",
    "repeat": f"StochasticDepth([{PRE_NORM}], keep=0.7)->2 x [Norm->MoE(num_experts=3, noise=0.5)->+]",
    "depths": f"MixtureOfDepths([{PRE_NORM}])",
}


class TestGradientCheckpointing:
    @pytest.mark.parametrize("layers", SHARED_BY_LAYERS.values(), ids=SHARED_BY_LAYERS)
    def test_loss_and_gradients_are_the_same_and_less_is_kept(self, layers):
        """With dropout and noise, whose random numbers must be drawn again as they were."""
        model = build_model(replace(MODEL, num_layers=4, layers=layers, dropout=0.2), VOCAB_SIZE)
        loss, gradients, kept = step(model, window=6)
        configure_for_training(model, LESS)
        assert {type(layer) for layer in model.layers} == {CheckpointedLayer}
        checkpointed_loss, checkpointed_gradients, less = step(model, window=6)
        torch.testing.assert_close(checkpointed_loss, loss)
        torch.testing.assert_close(checkpointed_gradients, gradients)
        assert less < 0.7 * kept

    def test_with_chunks_of_the_loss_too(self):
        model = GPT(replace(MODEL, num_layers=4), VOCAB_SIZE)
        loss, gradients, kept = step(model)
        configure_for_training(model, LESS)
        fast.use(model, kernels=False, loss_chunk=7)
        chunked_loss, chunked_gradients, less = step(model)
        torch.testing.assert_close(chunked_loss, loss)
        torch.testing.assert_close(chunked_gradients, gradients)
        assert less < 0.7 * kept

    def test_weights_names_and_evaluation_are_as_before(self):
        torch.manual_seed(0)
        model = GPT(replace(MODEL, num_layers=2), VOCAB_SIZE).eval()
        tokens, names = torch.arange(20)[None], list(model.state_dict())
        wanted, _ = model(tokens)
        configure_for_training(model, LESS)
        configure_for_training(model, LESS)
        assert torch.equal(model(tokens)[0], wanted) and list(model.state_dict()) == names
        fast.use(model, kernels=False), fast.undo(model)
        assert all(isinstance(layer, Layer) for layer in model.layers)

    def test_a_model_without_layers_is_refused_in_one_line(self):
        model = build_model(OWN["Trigram"], VOCAB_SIZE)
        wanted = "gradient_checkpointing=True", "'Trigram' has no layer strings", "leave it out"
        one_line_error(lambda: configure_for_training(model, LESS), *wanted)
        configure_for_training(model, TrainConfig())


def test_what_a_model_does_not_ask_for_is_refused_in_one_line():
    model = build_model(OWN["Recurrent"], VOCAB_SIZE)
    one_line_error(lambda: configure_for_training(model, TrainConfig()), "'Recurrent'", "story_ids", "--train.packing padded")
    growing = TrainConfig(packing="padded", window_start=4)
    one_line_error(lambda: configure_for_training(model, growing), "window_start=4", "'Recurrent'", "leave it out")
    for config in (TrainConfig(packing="padded"), TrainConfig(mask_stories=False)):
        configure_for_training(model, config)
